from __future__ import annotations

import pytest

from vitgraph.errors import ConfigError
from vitgraph.preprocess import SmartResizeProcessor

FAMILY = {"patch_size": 16, "video_min_pixels": 4096, "video_max_pixels": 25165824, "video_scope": "clip"}


@pytest.mark.parametrize(
    "image",
    [
        {"min_pixels": 3136, "max_pixels": 12845056},
        {"size": {"shortest_edge": 3136, "longest_edge": 12845056}},
        {"size": {"min_pixels": 3136, "max_pixels": 12845056}},
        {"min_pixels": 3136, "max_pixels": 12845056, "size": {"shortest_edge": 1, "longest_edge": 2}},
        {"min_pixels": None, "max_pixels": None, "size": {"shortest_edge": 3136, "longest_edge": 12845056}},
    ],
)
def test_bounds_are_read_in_every_form(image):
    processor = SmartResizeProcessor.from_hf(image)
    assert (processor.min_pixels, processor.max_pixels) == (3136, 12845056)


def test_files_come_before_family_defaults_and_these_before_the_class():
    processor = SmartResizeProcessor.from_hf({"patch_size": 18}, {}, **FAMILY, temporal_patch_size=1)
    assert processor.patch_size == 18
    assert processor.temporal_patch_size == 1
    assert processor.merge_size == 2
    assert processor.video_max_pixels == 25165824
    assert SmartResizeProcessor.from_hf(None) == SmartResizeProcessor()


def test_the_video_file_sets_video_values_only():
    image = {"size": {"shortest_edge": 65536, "longest_edge": 16777216}, "image_mean": [0.5, 0.5, 0.5]}
    video = {"size": {"shortest_edge": 4096, "longest_edge": 25165824}, "image_mean": 0.25, "fps": 4,
             "max_frames": 32}  # fmt: skip
    processor = SmartResizeProcessor.from_hf(image, video)
    assert (processor.min_pixels, processor.max_pixels) == (65536, 16777216)
    assert (processor.video_min_pixels, processor.video_max_pixels) == (4096, 25165824)
    assert processor.image_mean == (0.5, 0.5, 0.5) and processor.video_mean == (0.25, 0.25, 0.25)
    assert processor.fps == 4 and processor.max_frames == 32 and processor.min_frames == 4


def test_without_a_video_file_clips_take_the_images_values():
    processor = SmartResizeProcessor.from_hf({"min_pixels": 3136, "max_pixels": 50176}, None, **FAMILY)
    assert (processor.video_min_pixels, processor.video_max_pixels) == (3136, 50176)


@pytest.mark.parametrize(
    "image, message",
    [
        ({"size": {"height": 224, "width": 224}}, r"size has \['height', 'width'\]"),
        ({"size": 224}, "size is 224"),
        ({"min_pixels": 100, "max_pixels": 99}, "min_pixels=100 is above max_pixels=99"),
        ({"patch_size": 0}, "patch_size is 0; expected a positive number"),
        ({"patch_size": "14"}, "patch_size is '14'"),
        ({"resample": 9}, "resample is 9; expected one of"),
        ({"image_std": [0, 1, 1]}, "three positive numbers"),
    ],
)
def test_bad_settings_are_config_errors(image, message):
    with pytest.raises(ConfigError, match=message):
        SmartResizeProcessor.from_hf(image)


def test_an_unknown_rule_lists_the_known_ones():
    with pytest.raises(
        ConfigError, match=r"sampling is 'random'; expected one of \['spread', 'stride', 'seconds', 'duration'\]"
    ):
        SmartResizeProcessor(sampling="random")
