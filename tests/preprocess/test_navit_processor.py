"""Kimi's image processing against a short reference written from its published steps."""

from __future__ import annotations

import math

import numpy as np
import PIL.Image
import pytest
import torch

from vitgraph.errors import ConfigError, ImageError
from vitgraph.preprocess import NavitProcessor

FILE = {
    "in_token_limit": 4096,
    "patch_size": 14,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "merge_kernel_size": [2, 2],
    "pad_input": True,
}


def reference(image: PIL.Image.Image, limit: int) -> tuple[torch.Tensor, tuple[int, int]]:
    """Shrink with Pillow, pad with black, bytes over 255, minus 0.5, over 0.5, cut in raster order."""
    width, height = image.size
    patches = (width // 14) * (height // 14)
    if patches > limit:
        scale = math.sqrt(limit / patches)
        image = image.resize((int(width * scale), int(height * scale)), PIL.Image.Resampling.BICUBIC)
    block = 28
    canvas = PIL.Image.new("RGB", tuple(math.ceil(side / block) * block for side in image.size), (0, 0, 0))
    canvas.paste(image, (0, 0))
    pixels = torch.from_numpy(np.array(canvas)).permute(2, 0, 1).to(torch.float32).div(255)
    pixels = pixels.sub(torch.full((3, 1, 1), 0.5)).div(torch.full((3, 1, 1), 0.5))
    h, w = pixels.shape[1] // 14, pixels.shape[2] // 14
    return pixels.reshape(3, h, 14, w, 14).permute(1, 3, 0, 2, 4).reshape(h * w, 3, 14, 14), (h, w)


@pytest.mark.parametrize("limit", [64, 500, 4096])
def test_photographs_equal_the_reference(limit, photographs):
    processor = NavitProcessor.from_hf({**FILE, "in_token_limit": limit})
    images = [*photographs.values(), photographs["cat.jpg"].resize((3, 5))]
    for image in images:
        expected, (h, w) = reference(image, limit)
        patches = processor.prepare(image)
        assert patches.grid == (1, h, w) == processor.image_grid(image.height, image.width)
        assert patches.pixel_values.dtype == np.float32 and patches.pixel_values.flags.c_contiguous
        np.testing.assert_array_equal(patches.pixel_values, expected.flatten(1).numpy())


def test_the_padding_is_black():
    rows = NavitProcessor().prepare(np.full((28, 30, 3), 255, dtype=np.uint8)).pixel_values
    pixels = rows.reshape(2, 4, 3, 14, 14).transpose(2, 0, 3, 1, 4).reshape(3, 28, 56)
    assert (pixels[:, :, :30] == 1).all() and (pixels[:, :, 30:] == -1).all()


def test_too_long_a_side_is_refused_or_shrunk():
    strip = np.zeros((28, 14 * 600, 3), dtype=np.uint8)
    with pytest.raises(ImageError, match="position table"):
        NavitProcessor().prepare(strip)
    assert NavitProcessor(fit_sides=True, max_patches=16384).prepare(strip).grid == (1, 2, 512)


def test_files_of_every_form_are_read():
    assert NavitProcessor.from_hf(FILE) == NavitProcessor()
    assert NavitProcessor.from_hf(None, patch_size=16).patch_size == 16
    k25 = NavitProcessor(max_patches=16384, fit_sides=True)
    own = {"in_patch_limit": 16384, "patch_size": 14, "merge_kernel_size": 2, "patch_limit_on_one_side": 512,
           "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}  # fmt: skip
    assert NavitProcessor.from_hf({"media_proc_cfg": own}) == k25
    transformers = {"max_patches": 16384, "patch_size": 14, "merge_size": 2,
                    "size": {"max_height": 512, "max_width": 512}}  # fmt: skip
    assert NavitProcessor.from_hf(transformers) == k25


@pytest.mark.parametrize(
    "change, message",
    [
        ({"pad_input": False}, "pad_input=false .* set it to true"),
        ({"merge_kernel_size": [2, 3]}, "two equal numbers"),
        ({"in_token_limit": 0}, "max_patches is 0; expected a positive number"),
        ({"image_std": [0.5, 0.5, 0.0]}, "three positive numbers"),
        ({"image_mean": [0.5, 0.5]}, "three numbers"),
    ],
)
def test_bad_settings_are_config_errors(change, message):
    with pytest.raises(ConfigError, match=message):
        NavitProcessor.from_hf({**FILE, **change})
