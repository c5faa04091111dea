"""Patch mergers: m*m patch rows in block order become one token."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vitgraph.layers.gemm import linear
from vitgraph.layers.ops import layer_norm


class PatchMerger(nn.Module):
    """Norm, concatenate m*m rows, Linear, GELU (exact), Linear: `[P, D] -> [P / m^2, C]`.

    Args:
        dim: D, width of a patch row.
        merge: m.
        out_dim: C.
        eps: of the LayerNorm.
        norm_after_concat: normalise the concatenated row (m*m*D) instead of each patch row (D).
    """

    def __init__(self, dim: int, merge: int, out_dim: int, eps: float, norm_after_concat: bool = False) -> None:
        super().__init__()
        self.width = dim * merge**2
        self.norm_after_concat = norm_after_concat
        self.norm = nn.LayerNorm(self.width if norm_after_concat else dim, eps=eps)
        self.fc1 = nn.Linear(self.width, self.width)
        self.fc2 = nn.Linear(self.width, out_dim)

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """`x [P, D]` -> `[P / m^2, C]`, in `out` if given."""
        rows = x.view(-1, self.width) if self.norm_after_concat else x
        x = layer_norm(rows, self.norm).view(-1, self.width)
        y = F.gelu(linear(x, self.fc1.weight, self.fc1.bias))
        return linear(y, self.fc2.weight, self.fc2.bias, out)
