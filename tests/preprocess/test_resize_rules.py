from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitgraph.errors import ImageError
from vitgraph.preprocess.resize import navit_resize, smart_resize, smart_resize_clip

sides = st.integers(1, 6000)
factors = st.sampled_from([28, 32, 48])


def within_aspect(height: int, width: int) -> bool:
    return max(height, width) <= 200 * min(height, width)


@given(sides, sides, factors)
def test_smart_resize_gives_multiples_within_bounds(height, width, factor):
    low, high = 4 * factor**2, 1280 * factor**2
    if not within_aspect(height, width):
        with pytest.raises(ImageError):
            smart_resize(height, width, factor, low, high)
        return
    new_height, new_width = smart_resize(height, width, factor, low, high)
    assert new_height % factor == 0 and new_width % factor == 0
    assert low <= new_height * new_width <= high


@given(st.integers(200, 3000), st.integers(200, 3000))
def test_smart_resize_keeps_the_aspect_ratio_to_one_multiple(height, width):
    new_height, new_width = smart_resize(height, width, 28, 56 * 56, 28 * 28 * 16384)
    assert abs(new_height - height) <= 14 and abs(new_width - width) <= 14


@given(sides, sides, factors)
def test_smart_resize_equals_transformers(height, width, factor):
    reference = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl").smart_resize
    arguments = (height, width, factor, 56 * 56, 28 * 28 * 1280)
    if within_aspect(height, width):
        assert smart_resize(*arguments) == reference(*arguments)


@given(st.integers(2, 800), sides, sides, factors)
def test_clip_rule_equals_transformers(num_frames, height, width, factor):
    reference = pytest.importorskip("transformers.models.qwen3_vl.video_processing_qwen3_vl").smart_resize
    arguments = (num_frames, height, width, 2, factor, 4096, 25165824)
    try:
        expected = reference(*arguments)
    except ValueError:
        with pytest.raises(ImageError):
            smart_resize_clip(*arguments)
    else:
        assert smart_resize_clip(*arguments) == expected


@given(st.integers(2, 64), st.integers(30, 2000), st.integers(30, 2000))
def test_clip_rule_bounds_all_frames_together(num_frames, height, width):
    if not within_aspect(height, width):
        return
    new_height, new_width = smart_resize_clip(num_frames, height, width, 2, 32, 4096, 25165824)
    frames = round(num_frames / 2) * 2
    slack = max(frames / num_frames, 1)  # the rule scales by the real number of frames, and bounds the even one
    assert frames * new_height * new_width <= 25165824 * slack


def test_one_frame_counts_as_a_temporal_patch():
    assert smart_resize_clip(1, 300, 400) == smart_resize_clip(2, 300, 400)


@pytest.mark.parametrize("rule", [smart_resize, lambda h, w: smart_resize_clip(8, h, w, 2, 28)])
@pytest.mark.parametrize("height, width", [(1, 10_000), (10_000, 1), (20, 4_001)])
def test_a_strip_is_an_image_error_with_a_remedy(rule, height, width):
    with pytest.raises(ImageError, match=r"aspect ratio .* at most 200 .*Crop it"):
        rule(height, width)


@pytest.mark.parametrize("rule", [smart_resize, navit_resize, lambda h, w: smart_resize_clip(8, h, w)])
def test_an_empty_image_is_an_image_error(rule):
    with pytest.raises(ImageError, match="is empty"):
        rule(0, 10)


@given(sides, sides, st.sampled_from([64, 4096, 16384]))
def test_navit_equals_the_published_rule_of_kimi_vl(height, width, limit):
    """Written from the formula: scale by sqrt(limit / whole patches) if above the limit, then pad to 28."""
    new_height, new_width = height, width
    whole = (width // 14) * (height // 14)
    if whole > limit:
        scale = math.sqrt(limit / whole)
        new_height, new_width = int(height * scale), int(width * scale)
    padded = [side + (28 - side % 28) % 28 for side in (new_height, new_width)]
    if max(padded) // 14 >= 512:
        with pytest.raises(ImageError, match="512"):
            navit_resize(height, width, max_patches=limit)
    else:
        assert navit_resize(height, width, max_patches=limit) == (new_height, new_width, *padded)


@given(st.integers(1, 20_000), st.integers(1, 20_000))
def test_navit_with_fitted_sides_equals_transformers(height, width):
    module = pytest.importorskip("transformers.models.kimi_k25.video_processing_kimi_k25", exc_type=ImportError)
    resized, padded = module.navit_resize(height, width, 14, 2, 16384, 512)
    assert navit_resize(height, width, 14, 2, 16384, 512, fit_sides=True) == (*resized, *padded)


@given(st.integers(1, 100_000), st.integers(1, 100_000))
def test_navit_with_fitted_sides_never_fails_and_stays_in_bounds(height, width):
    size = navit_resize(height, width, 14, 2, 16384, 512, fit_sides=True)
    assert size.padded_height % 28 == 0 and size.padded_width % 28 == 0
    assert 0 <= size.padded_height - size.height < 28 and 0 <= size.padded_width - size.width < 28
    assert max(size.padded_height, size.padded_width) <= 512 * 14
    assert size.height <= height and size.width <= width


def test_navit_refuses_a_side_at_the_end_of_the_position_table():
    assert navit_resize(28, 510 * 14).padded_width == 510 * 14
    with pytest.raises(ImageError, match=r"512 patches .*resize its longer side to at most 7140 pixels"):
        navit_resize(28, 511 * 14)
