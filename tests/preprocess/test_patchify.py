from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitgraph.core import Grid
from vitgraph.preprocess.patchify import patchify_blocks, patchify_raster

small = st.integers(1, 3)


def numbered(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def unpatchify_blocks(rows: np.ndarray, grid: Grid, p: int, T: int, m: int) -> np.ndarray:
    """Pixel by pixel, from the definition of the order."""
    frames = np.empty((grid.t * T, 3, grid.h * p, grid.w * p), dtype=rows.dtype)
    rows = iter(rows.reshape(-1, 3, T, p, p))
    for t in range(grid.t):
        for block_y in range(grid.h // m):
            for block_x in range(grid.w // m):
                for y in range(block_y * m, (block_y + 1) * m):
                    for x in range(block_x * m, (block_x + 1) * m):
                        patch = next(rows).transpose(1, 0, 2, 3)
                        frames[t * T : (t + 1) * T, :, y * p : (y + 1) * p, x * p : (x + 1) * p] = patch
    return frames


@given(small, small, small, st.integers(1, 4), st.integers(1, 2), st.integers(1, 3))
def test_blocks_round_trip(t, blocks_y, blocks_x, p, T, m):
    frames = numbered(t * T, 3, blocks_y * m * p, blocks_x * m * p)
    rows, grid = patchify_blocks(frames, p, T, m)
    assert grid == Grid(t, blocks_y * m, blocks_x * m)
    assert rows.shape == (grid.patches, 3 * T * p * p)
    assert rows.flags.c_contiguous and rows.dtype == np.float32
    np.testing.assert_array_equal(unpatchify_blocks(rows, grid, p, T, m), frames)


@given(small, st.integers(1, 5), st.integers(1, 5), st.integers(1, 4))
def test_raster_round_trip(t, h, w, p):
    frames = numbered(t, 3, h * p, w * p)
    rows, grid = patchify_raster(frames, p)
    assert grid == Grid(t, h, w)
    assert rows.shape == (grid.patches, 3 * p * p)
    assert rows.flags.c_contiguous and rows.dtype == np.float32
    back = rows.reshape(t, h, w, 3, p, p).transpose(0, 3, 1, 4, 2, 5).reshape(frames.shape)
    np.testing.assert_array_equal(back, frames)
    np.testing.assert_array_equal(rows[w - 1].reshape(3, p, p), frames[0, :, :p, -p:])


@pytest.mark.parametrize("count, T, grid_t", [(1, 2, 1), (3, 2, 2), (5, 4, 2), (4, 2, 2), (1, 1, 1)])
def test_the_last_frame_fills_up_a_temporal_patch(count, T, grid_t):
    frames = numbered(count, 3, 8, 8)
    rows, grid = patchify_blocks(frames, 4, T, 2)
    assert grid.t == grid_t
    filled = unpatchify_blocks(rows, grid, 4, T, 2)
    np.testing.assert_array_equal(filled[:count], frames)
    for frame in filled[count:]:
        np.testing.assert_array_equal(frame, frames[-1])


def test_sides_that_do_not_divide_are_our_own_bug():
    with pytest.raises(AssertionError, match="30x32 is not a multiple of 16"):
        patchify_blocks(numbered(1, 3, 30, 32), 8)
