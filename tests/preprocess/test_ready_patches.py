from __future__ import annotations

import numpy as np
import pytest
import torch

from vitgraph.core import Grid
from vitgraph.errors import ImageError, PatchError, VideoError
from vitgraph.preprocess import NavitProcessor, Patches, SmartResizeProcessor, Video

PROCESSOR = NavitProcessor()
GRID = Grid(1, 4, 2)


def rows(*shape: int) -> np.ndarray:
    return np.zeros(shape, dtype=np.float32)


@pytest.mark.parametrize("values", [rows(8, 588), rows(8, 3, 14, 14), rows(8, 3, 14, 14).astype(np.float16)])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_trailing_dimensions_are_flattened_and_dtype_is_kept(values, kind):
    given = kind(values)
    patches = PROCESSOR.prepare(Patches(given, (1, 4, 2)))
    assert tuple(patches.pixel_values.shape) == (8, 588)
    assert patches.pixel_values.dtype == given.dtype
    assert type(patches.pixel_values) is type(given)
    assert patches.grid == GRID and isinstance(patches.grid, Grid)


def test_bfloat16_tensors_pass():
    patches = PROCESSOR.prepare(Patches(torch.zeros(8, 588, dtype=torch.bfloat16), GRID))
    assert patches.pixel_values.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "values, grid, message",
    [
        (rows(8, 587), GRID, r"shape \[8, 587\]: expected \[8, 588\].*use its own processor"),
        (rows(8 * 588), GRID, r"expected \[8, 588\]"),
        (rows(7, 588), GRID, r"7 rows, but grid .* says 8.*one Patches per item"),
        (rows(8, 588).astype(np.uint8), GRID, "dtype uint8; expected normalised floating point"),
        (torch.zeros(8, 588, dtype=torch.int64), GRID, r"dtype torch\.int64"),
        ([[0.0] * 588] * 8, GRID, "is a list; expected a numpy array or a torch tensor"),
        (rows(8, 588), Grid(0, 4, 2), "t must be at least 1"),
        (rows(8, 588), Grid(1, 8, 1), "multiples of 2"),
        (rows(8, 588), (4, 2), "three integers"),
        (rows(8, 588), None, "three integers"),
    ],
)
def test_patches_that_do_not_fit_are_patch_errors(values, grid, message):
    with pytest.raises(PatchError, match=message):
        PROCESSOR.prepare(Patches(values, grid))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_values_that_are_not_finite_are_patch_errors(bad, kind):
    values = rows(8, 588)
    values[3, 17] = bad
    with pytest.raises(PatchError, match=r"NaN or infinite.*Repair"):
        PROCESSOR.prepare(Patches(kind(values), GRID))


def test_a_family_without_video_says_so():
    with pytest.raises(VideoError, match=r"images only.*Pass the frames you need as images"):
        PROCESSOR.prepare(Video([rows(4, 4)]))


def test_a_processor_accepts_what_it_made(cat):
    for processor in (PROCESSOR, SmartResizeProcessor()):
        made = processor.prepare(cat)
        again = processor.prepare(made)
        assert again.grid == made.grid
        np.testing.assert_array_equal(again.pixel_values, made.pixel_values)


def test_a_list_of_images_is_refused_with_the_accepted_kinds(cat):
    with pytest.raises(ImageError, match=r"builtins\.list is no image. Pass a path.*frames go into a Video"):
        PROCESSOR.prepare([cat, cat])
