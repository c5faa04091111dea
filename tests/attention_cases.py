"""Packings that every attention backend must get right, and the fp32 reference for them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import numpy as np
import pytest
import torch
from torch import Tensor

from vitgraph.attention.base import Segments, tile_bound, write_tiles
from vitgraph.attention.sdpa import SdpaAttention

CASES = {
    "one": (400, [400]),
    "ragged": (1024, [1, 64, 333, 2, 129, 65]),
    "half empty": (512, [100, 60]),
    "many": (2304, [36] * 60),
    "long": (2560, [2500]),
    "empty": (128, []),
}
"""Rows of the buffer, and the lengths of its segments; the buffer has three empty segments more."""

EMPTY_SEGMENTS = 3


def _interprets_loops() -> bool:
    try:
        return tuple(int(part) for part in version("triton").split(".")[:2]) >= (3, 7)
    except PackageNotFoundError:
        return True


interpreted_loops = pytest.mark.skipif(
    not _interprets_loops(), reason="before 3.7 Triton's interpreter cannot run a loop whose bounds lie in memory"
)


def make_segments(rows: int, lengths: list[int], block: int, device: str = "cpu") -> Segments:
    """Static segments of a pack, with a tile schedule of this block size unless it is 0."""
    cu = np.zeros(len(lengths) + EMPTY_SEGMENTS + 1, np.int32)
    cu[1 : len(lengths) + 1] = np.cumsum(lengths)
    cu[len(lengths) + 1 :] = sum(lengths)
    tiles = None
    if block:
        schedule = np.empty((tile_bound(rows, len(cu) - 1, block), 4), np.int32)
        write_tiles(cu, rows, block, schedule)
        tiles = torch.from_numpy(schedule).to(device)
    return Segments(torch.from_numpy(cu).to(device), rows, tiles=tiles, block=block)


def make_qkv(rows: int, filled: int, heads: int, head_dim: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """`[rows, 3, H, Dh]` random, with NaN past the filled rows."""
    qkv = torch.randn(rows, 3, heads, head_dim, device=device, dtype=torch.float32).to(dtype)
    qkv[filled:] = float("nan")
    return qkv


def check(out: Tensor, qkv: Tensor, segments: Segments, filled: int, tolerance: float) -> None:
    """Zeros past the last segment, and elsewhere the reference in fp32."""
    q, k, v = qkv.float().unbind(1)
    want = SdpaAttention()(q, k, v, segments, q.shape[-1] ** -0.5)
    assert out.shape == q.shape
    assert (out[filled:] == 0).all()
    if filled:
        assert ((out.float() - want).norm() / want.norm()).item() < tolerance
