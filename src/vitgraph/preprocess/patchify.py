"""From normalised frames to patch rows, in the two orders that the families use.

Shapes: F frames, t temporal patches, T frames in a temporal patch, p side of a patch, m patches on a side of
    a merge
block, h and w patches on the sides of a frame, P = t * h * w.
"""

from __future__ import annotations

import numpy as np

from vitgraph.core import Grid


def patchify_blocks(
    frames: np.ndarray, patch_size: int, temporal_patch_size: int = 2, merge_size: int = 2
) -> tuple[np.ndarray, Grid]:
    """Rows in block order: the m x m patches that will be merged into one token are neighbours.

    The layout of the Qwen-VL and GLM processors. A number of frames that does not divide by T is filled up by
    repeating the last one, so an image becomes T equal frames.

    Args:
        frames: `[F, 3, H, W]`, H and W multiples of `patch_size * merge_size`.
        patch_size: p.
        temporal_patch_size: T.
        merge_size: m.

    Returns:
        `[P, 3 * T * p * p]`, C-contiguous, of the dtype of `frames`: rows of (3, T, p, p) in the order
        (t, h/m, w/m, m, m); and the grid.
    """
    p, m, T = patch_size, merge_size, temporal_patch_size
    frames = _fill_up(frames, T)
    count, channels, height, width = frames.shape
    _assert_divides(height, width, p * m)
    grid = Grid(count // T, height // p, width // p)
    parts = frames.reshape(grid.t, T, channels, grid.h // m, m, p, grid.w // m, m, p)
    rows = parts.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return np.ascontiguousarray(rows).reshape(grid.patches, channels * T * p * p), grid


def patchify_raster(frames: np.ndarray, patch_size: int) -> tuple[np.ndarray, Grid]:
    """Rows in raster order: left to right, then top to bottom, frame by frame.

    The layout of the Kimi processors, flattened from `[P, 3, p, p]`.

    Args:
        frames: `[F, 3, H, W]`, H and W multiples of `patch_size`.
        patch_size: p.

    Returns:
        `[P, 3 * p * p]`, C-contiguous, of the dtype of `frames`: rows of (3, p, p) in the order (F, h, w);
        and the grid, with t = F.
    """
    p = patch_size
    count, channels, height, width = frames.shape
    _assert_divides(height, width, p)
    grid = Grid(count, height // p, width // p)
    parts = frames.reshape(count, channels, grid.h, p, grid.w, p)
    rows = parts.transpose(0, 2, 4, 1, 3, 5)
    return np.ascontiguousarray(rows).reshape(grid.patches, channels * p * p), grid


def _fill_up(frames: np.ndarray, multiple: int) -> np.ndarray:
    """Repeats the last frame up to the next multiple; a view where there is one frame only."""
    missing = -len(frames) % multiple
    if not missing:
        return frames
    tail = np.broadcast_to(frames[-1:], (missing + 1, *frames.shape[1:]))
    return tail if len(frames) == 1 else np.concatenate([frames[:-1], tail])


def _assert_divides(height: int, width: int, factor: int) -> None:
    assert height % factor == 0 and width % factor == 0, f"{height}x{width} is not a multiple of {factor}"
