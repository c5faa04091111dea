"""The MLPs of transformer blocks, `[P, D] -> [P, D]`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitgraph.layers.ops import linear_gelu_tanh

Activation = Literal["gelu_tanh", "gelu", "quick_gelu", "silu"]


def activate(x: Tensor, activation: Activation) -> Tensor:
    """The named activation: GELU in its tanh or exact (erf) form, x * sigmoid(1.702 x), or SiLU."""
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation == "gelu":
        return F.gelu(x)
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.silu(x)


class BlockMlp(nn.Module, ABC):
    """An MLP in two halves, so that a block may merge the second one's GEMM with the residual."""

    @abstractmethod
    def up(self, x: Tensor) -> Tensor:
        """`[P, D] -> [P, F]`."""

    @property
    @abstractmethod
    def down(self) -> nn.Linear:
        """The last linear, F -> D."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


class Mlp(BlockMlp):
    """Linear, activation, Linear."""

    def __init__(self, dim: int, hidden: int, activation: Activation = "gelu_tanh") -> None:
        super().__init__()
        self.activation: Activation = activation
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def up(self, x: Tensor) -> Tensor:
        if self.activation == "gelu_tanh":
            return linear_gelu_tanh(x, self.fc1.weight, self.fc1.bias)
        return activate(self.fc1(x), self.activation)

    @property
    def down(self) -> nn.Linear:
        return self.fc2


class GatedMlp(BlockMlp):
    """`down(activation(gate(x)) * up(x))`, optionally with another output width."""

    def __init__(
        self, dim: int, hidden: int, bias: bool, activation: Activation = "silu", out_dim: int | None = None
    ) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.gate_proj = nn.Linear(dim, hidden, bias=bias)
        self.up_proj = nn.Linear(dim, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, out_dim or dim, bias=bias)

    def up(self, x: Tensor) -> Tensor:
        return activate(self.gate_proj(x), self.activation) * self.up_proj(x)

    @property
    def down(self) -> nn.Linear:
        return self.down_proj
