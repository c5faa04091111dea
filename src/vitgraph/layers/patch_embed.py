"""Patch embedding: a convolution whose kernel equals its stride is a Linear on flattened patches."""

from __future__ import annotations

from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """`[P, C*T*p*p] -> [P, D]`. The weight is the convolution's, flattened in its own order (C, T, p, p)."""

    def __init__(self, patch_width: int, dim: int, bias: bool = True) -> None:
        super().__init__()
        self.proj = nn.Linear(patch_width, dim, bias=bias)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.proj(pixel_values)
