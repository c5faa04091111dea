"""A learned square position table, resampled to each item's grid by taps: index and weight per patch.

Taps are computed on the host, once per grid; the weighted sum runs inside the graph.
Formulas: torch.nn.functional.interpolate, as `transformers.vision_utils` states them for encoders.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitgraph.layers.order import frame_coordinates

Mode = Literal["bilinear", "bicubic"]
CUBIC_A = np.float32(-0.75)


def table_taps(
    h: int, w: int, side: int, mode: Mode, align_corners: bool, merge: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Taps of one frame of `h` x `w` patches into a `side` x `side` table.

    Args:
        h, w: size of the frame in patches.
        side: side of the table.
        mode: "bilinear" (4 taps) or "bicubic" (16 taps, Keys kernel with a = -0.75, border-clamped).
        align_corners: corner-aligned source coordinates, else half-pixel centres.
        merge: rows in block order of this side; 1 is raster order.

    Returns:
        Indexes into the flattened table `[h*w, taps]` int32, and weights `[h*w, taps]` float32.
    """
    y, x = frame_coordinates(h, w, merge).T
    rows, row_weights = (a[y] for a in _axis_taps(h, side, mode, align_corners))
    cols, col_weights = (a[x] for a in _axis_taps(w, side, mode, align_corners))
    index = (rows[:, :, None] * side + cols[:, None, :]).reshape(h * w, -1)
    weight = (row_weights[:, :, None] * col_weights[:, None, :]).reshape(h * w, -1)
    return index.astype(np.int32), weight


def _axis_taps(size: int, side: int, mode: Mode, align_corners: bool) -> tuple[np.ndarray, np.ndarray]:
    """Taps along one axis: `[size, 2 or 4]` int64 indexes and float32 weights."""
    position = np.arange(size, dtype=np.float32)
    if align_corners:
        source = position * np.float32(side - 1) / np.float32(max(size - 1, 1))
    else:
        source = (position + np.float32(0.5)) * np.float32(side) / np.float32(size) - np.float32(0.5)
    floor = np.floor(source)
    offsets = np.arange(2) if mode == "bilinear" else np.arange(-1, 3)
    taps = np.clip(floor.astype(np.int64)[:, None] + offsets, 0, side - 1)
    distance = np.abs(source[:, None] - floor[:, None] - offsets.astype(np.float32))
    if mode == "bilinear":
        return taps, np.maximum(np.float32(1) - distance, np.float32(0))
    near = ((CUBIC_A + 2) * distance - (CUBIC_A + 3)) * distance * distance + 1
    far = ((CUBIC_A * distance - 5 * CUBIC_A) * distance + 8 * CUBIC_A) * distance - 4 * CUBIC_A
    return taps, np.where(distance <= 1, near, far).astype(np.float32)


def gather_table(table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Weighted sum of table rows, in fp32: `table [side*side, D]`, `index`, `weight [P, taps]` -> `[P, D]` fp32."""
    return F.embedding_bag(index, table.to(torch.float32), per_sample_weights=weight, mode="sum")
