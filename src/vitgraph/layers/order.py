"""Orders of the patch rows of one item, as host integers.

Raster order is (t, h, w). Block order is (t, h/m, w/m, m, m): each run of m*m rows is one merge cell.
"""

from __future__ import annotations

import numpy as np

from vitgraph.core import Grid


def frame_coordinates(h: int, w: int, merge: int = 1) -> np.ndarray:
    """(y, x) of each patch of one frame, `[h*w, 2]` int64, in block order of side `merge` (1: raster order)."""
    y, x = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
    return np.stack([to_block_order(y, merge), to_block_order(x, merge)], axis=-1)


def to_block_order(values: np.ndarray, merge: int) -> np.ndarray:
    """A `[h, w]` array flattened in block order, `[h*w]`."""
    h, w = values.shape
    return values.reshape(h // merge, merge, w // merge, merge).transpose(0, 2, 1, 3).reshape(-1)


def repeat_frames(values: np.ndarray, grid: Grid) -> np.ndarray:
    """Rows of one frame, repeated for every frame of the item."""
    return np.tile(values, (grid.t, *(1,) * (values.ndim - 1)))


def segment_ends(grid: Grid, per_frame: bool = True) -> np.ndarray:
    """Ends of the item's attention segments in patch rows, int32: one per temporal patch, or one for the clip."""
    if not per_frame:
        return np.array([grid.patches], np.int32)
    return np.arange(1, grid.t + 1, dtype=np.int32) * np.int32(grid.h * grid.w)


def merge_gather(grid: Grid, merge: int) -> np.ndarray:
    """For each row in block order, the row in raster order that it comes from: `[P]` int32."""
    frame = to_block_order(np.arange(grid.h * grid.w, dtype=np.int32).reshape(grid.h, grid.w), merge)
    starts = np.arange(grid.t, dtype=np.int32) * np.int32(grid.h * grid.w)
    return (starts[:, None] + frame[None]).reshape(-1)
