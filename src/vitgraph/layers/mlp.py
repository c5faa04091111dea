"""The MLPs of transformer blocks, `[P, D] -> [P, D]`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitgraph.layers.ops import linear_gelu_tanh

Activation = Literal["gelu_tanh", "gelu", "quick_gelu", "silu"]
Weights = tuple[Tensor, Tensor | None]

ALIGNED, HIDDEN_MULTIPLE = 64, 128
"""A hidden width that is no multiple of the first is padded to a multiple of the second."""


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
    """An MLP in two halves, so that a block may merge the second one's GEMM with the residual.

    Its hidden width F may be padded with zeros; the activation of zero is zero, so that padding adds nothing.
    """

    ups: tuple[str, ...]
    """Linears from D to F."""

    last: str
    """The linear from F to D."""

    def __init__(self) -> None:
        super().__init__()
        self._padded: dict[str, Weights] = {}

    @abstractmethod
    def up(self, x: Tensor) -> Tensor:
        """`[P, D] -> [P, F]`."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.up(x), *self.down)

    @property
    def down(self) -> Weights:
        """Weight `[D, F]` and bias of the last linear."""
        return self.weights(self.last)

    def weights(self, name: str) -> Weights:
        """Weight and bias of a linear, padded if `pad_hidden` did so."""
        linear = self._linear(name)
        return self._padded.get(name) or (linear.weight, linear.bias)

    def pad_hidden(self) -> None:
        """Moves weights into zeroed storage of a hidden width that tensor cores like; does nothing where F has one.

        Parameters keep their shapes, as views of that storage, and lose their values: to be called before weights are
        loaded. With 4304 padded to 4352, the two GEMMs of 1024 rows take 41 us instead of 44 on an H100.
        """
        hidden = self._linear(self.last).in_features
        if hidden % ALIGNED == 0:
            return
        wide = -(-hidden // HIDDEN_MULTIPLE) * HIDDEN_MULTIPLE
        for name in (*self.ups, self.last):
            linear = self._linear(name)
            bias: Tensor | None = linear.bias
            if name == self.last:
                weight = linear.weight.new_zeros(linear.out_features, wide)
            else:
                weight = linear.weight.new_zeros(wide, linear.in_features)
                if bias is not None:
                    bias = bias.new_zeros(wide)
                    linear.bias = _view(bias, linear.bias)
            linear.weight = _view(weight, linear.weight)
            self._padded[name] = weight, bias

    def _linear(self, name: str) -> nn.Linear:
        linear = getattr(self, name)
        assert isinstance(linear, nn.Linear)
        return linear


def _view(storage: Tensor, parameter: Tensor) -> nn.Parameter:
    """A parameter of the same shape in the first rows and columns of `storage`."""
    view = storage[tuple(slice(n) for n in parameter.shape)]
    return nn.Parameter(view, requires_grad=parameter.requires_grad)


class Mlp(BlockMlp):
    """Linear, activation, Linear."""

    ups, last = ("fc1",), "fc2"

    def __init__(self, dim: int, hidden: int, activation: Activation = "gelu_tanh") -> None:
        super().__init__()
        self.activation: Activation = activation
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def up(self, x: Tensor) -> Tensor:
        weight, bias = self.weights("fc1")
        if self.activation == "gelu_tanh" and bias is not None:
            return linear_gelu_tanh(x, weight, bias)
        return activate(F.linear(x, weight, bias), self.activation)


class GatedMlp(BlockMlp):
    """`down(activation(gate(x)) * up(x))`, optionally with another output width."""

    ups, last = ("gate_proj", "up_proj"), "down_proj"

    def __init__(
        self, dim: int, hidden: int, bias: bool, activation: Activation = "silu", out_dim: int | None = None
    ) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.gate_proj = nn.Linear(dim, hidden, bias=bias)
        self.up_proj = nn.Linear(dim, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, out_dim or dim, bias=bias)

    def up(self, x: Tensor) -> Tensor:
        gate = activate(F.linear(x, *self.weights("gate_proj")), self.activation)
        return gate * F.linear(x, *self.weights("up_proj"))
