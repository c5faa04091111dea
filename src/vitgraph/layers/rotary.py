"""Two-axis rotary position embedding, half-split pairing (i, i + Dh/2), rotated in fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def axis_frequencies(head_dim: int, theta: float) -> Tensor:
    """`theta^(-2k/n)` for the n = head_dim/2 dims that one axis owns: `[head_dim/4]` fp32 (RoFormer, eq. 15)."""
    n = head_dim // 2
    # Always real, also while the tower around it is built on the meta device.
    return 1.0 / (theta ** (torch.arange(0, n, 2, dtype=torch.float32, device="cpu") / n))


def axial_angles(position_ids: Tensor, frequencies: Tensor) -> Tensor:
    """`position_ids [P, 2]` int (first axis, second axis) -> angles `[P, head_dim/2]` fp32, axis after axis."""
    return (position_ids.to(torch.float32)[:, :, None] * frequencies).flatten(1)


def alternating_angles(position_ids: Tensor, frequencies: Tensor) -> Tensor:
    """As `axial_angles`, but the two axes alternate: [a0, b0, a1, b1, ...]."""
    return (position_ids.to(torch.float32)[:, None, :] * frequencies[:, None]).flatten(1)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates `x [P, ..., Dh]` by angles whose `cos`, `sin` are `[P, Dh/2]` fp32; keeps the dtype of `x`."""
    shape = (cos.shape[0], *(1,) * (x.dim() - 2), cos.shape[1])
    cos, sin = cos.view(shape), sin.view(shape)
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)


def interleaved_to_half_split(weight: Tensor, heads: int) -> Tensor:
    """Reorders the rows of a q or k projection so that pairs (2i, 2i+1) of each head become (i, i + Dh/2).

    Attention scores do not change, since q and k are permuted alike. `weight` is `[H*Dh, ...]`.
    """
    head_dim = weight.shape[0] // heads
    return weight.unflatten(0, (heads, head_dim // 2, 2)).transpose(1, 2).reshape(weight.shape)


def half_split_to_interleaved(weight: Tensor, heads: int) -> Tensor:
    """Inverse of `interleaved_to_half_split`."""
    head_dim = weight.shape[0] // heads
    return weight.unflatten(0, (heads, 2, head_dim // 2)).transpose(1, 2).reshape(weight.shape)


def settle_cos_and_sin() -> None:
    """Makes the process's first cos and sin on the CPU ones of a single element, which a single thread computes.

    PyTorch's come from a library that settles at its first call. Where several threads made that call together, a first
    result was seen to be off by 2e-4 in about one process of fifty.
    """
    one = torch.zeros(1)
    one.cos(), one.sin()
