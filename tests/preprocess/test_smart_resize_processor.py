"""Equality with Transformers' image processors, bit by bit."""

from __future__ import annotations

import warnings

import numpy as np
import PIL.Image
import pytest

from vitgraph.core import Grid
from vitgraph.errors import ImageError
from vitgraph.preprocess import SmartResizeProcessor

QWEN3_FILE = {
    "size": {"shortest_edge": 65536, "longest_edge": 16777216},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
QWEN2_FILE = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
SMALL_FILE = {**QWEN2_FILE, "max_pixels": 28 * 28 * 100}
SIZES = [(224, 224), (451, 300), (37, 53), (1, 1), (5, 900), (333, 77), (29, 28), (1023, 511)]


def reference(file: dict, image: object) -> tuple[np.ndarray, Grid]:
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = module.Qwen2VLImageProcessorPil(**file)(images=[image], return_tensors="np")
    return out["pixel_values"], Grid(*(int(n) for n in out["image_grid_thw"][0]))


def assert_equals_reference(file: dict, image: object) -> None:
    expected, grid = reference(file, image)
    processor = SmartResizeProcessor.from_hf(file)
    patches = processor.prepare(image)
    assert patches.grid == grid
    assert patches.pixel_values.dtype == np.float32 and patches.pixel_values.flags.c_contiguous
    assert patches.pixel_values.shape == (grid.patches, processor.patch_width)
    np.testing.assert_array_equal(patches.pixel_values, expected)


@pytest.mark.parametrize("file", [QWEN3_FILE, QWEN2_FILE, SMALL_FILE], ids=["qwen3", "qwen2", "small"])
def test_photographs_equal_the_reference(file, photographs):
    for image in photographs.values():
        assert_equals_reference(file, image)


@pytest.mark.parametrize("width, height", SIZES)
@pytest.mark.parametrize("file", [QWEN2_FILE, SMALL_FILE], ids=["qwen2", "small"])
def test_odd_and_tiny_sizes_equal_the_reference(file, width, height, photographs):
    assert_equals_reference(file, photographs["rocket.jpg"].resize((width, height)))


def composites_alpha() -> bool:
    from transformers.image_transforms import convert_to_rgb

    clear = PIL.Image.new("RGBA", (1, 1), (0, 0, 0, 0))
    return convert_to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "PA", "1", "CMYK", "YCbCr", "HSV"])
def test_other_modes_equal_the_reference(mode, cat):
    if mode in ("LA", "RGBA", "PA") and not composites_alpha():
        pytest.skip("this Transformers drops alpha instead of putting it onto white")
    rgba = cat.convert("RGBA")
    rgba.putalpha(PIL.Image.linear_gradient("L").resize(cat.size))
    source = rgba if mode in ("LA", "RGBA", "PA") else cat
    image = source.convert("P").convert("PA") if mode == "PA" else source.convert(mode)
    assert_equals_reference(QWEN2_FILE, image)


@pytest.mark.parametrize("channels_first", [False, True])
def test_arrays_equal_the_reference(channels_first, cat):
    array = np.asarray(cat)
    assert_equals_reference(QWEN2_FILE, array.transpose(2, 0, 1) if channels_first else array)


def test_without_rescaling_or_normalisation(cat):
    for switch in ({"do_rescale": False}, {"do_normalize": False}):
        assert_equals_reference({**QWEN2_FILE, **switch}, cat)


def test_other_filters(cat):
    for resample in (0, 1, 2):
        assert_equals_reference({**QWEN2_FILE, "resample": resample}, cat)


def test_without_resizing(cat):
    file = {**QWEN2_FILE, "do_resize": False}
    assert_equals_reference(file, cat.resize((56 * 3, 56)))
    with pytest.raises(ImageError, match=r"300x451 .* do_resize=False. Resize it to multiples of 28"):
        SmartResizeProcessor.from_hf(file).prepare(cat)


def test_bounds_over_all_frames_equal_glm(photographs):
    module = pytest.importorskip("transformers.models.glm4v.image_processing_pil_glm4v")
    processor = SmartResizeProcessor.from_hf(None, min_pixels=112 * 112, max_pixels=28 * 28 * 200, image_scope="clip")
    theirs = module.Glm4vImageProcessorPil(size={"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 200})
    images = [*photographs.values(), photographs["cat.jpg"].resize((11, 90))]
    for image in images:
        expected = theirs(images=[image], return_tensors="np")
        patches = processor.prepare(image)
        assert list(patches.grid) == expected["image_grid_thw"][0].tolist()
        np.testing.assert_array_equal(patches.pixel_values, expected["pixel_values"])


@pytest.mark.parametrize("width, height", SIZES)
def test_the_grid_is_known_without_pixels(width, height):
    for file in (QWEN2_FILE, QWEN3_FILE, SMALL_FILE):
        processor = SmartResizeProcessor.from_hf(file)
        image = PIL.Image.new("RGB", (width, height))
        assert processor.image_grid(height, width) == processor.image(image).grid


def test_an_image_is_not_changed(cat):
    before = cat.tobytes()
    SmartResizeProcessor().prepare(cat)
    assert cat.tobytes() == before and cat.mode == "RGB"


def test_a_strip_is_a_typed_error():
    with pytest.raises(ImageError, match="aspect ratio"):
        SmartResizeProcessor().prepare(np.zeros((1, 10_000, 3), dtype=np.uint8))
