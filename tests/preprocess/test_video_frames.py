"""Clips as frames and as files; resize and arithmetic against the reference."""

from __future__ import annotations

import builtins
import io
import warnings

import numpy as np
import PIL.Image
import pytest
import torch

from vitgraph.core import Grid
from vitgraph.errors import MissingExtraError, VideoError
from vitgraph.preprocess import Sampling, SmartResizeProcessor, Video, load_frames
from vitgraph.preprocess.video import resize_frame

ALL = Sampling()
QWEN3 = SmartResizeProcessor(
    patch_size=16, image_mean=(0.5,) * 3, image_std=(0.5,) * 3, video_min_pixels=4096,
    video_max_pixels=25165824, video_scope="clip", sampling="spread",
)  # fmt: skip
QWEN2 = SmartResizeProcessor()


def encode_video(frames: np.ndarray, rate: int = 10, format: str = "mp4") -> bytes:
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format=format) as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 4_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


@pytest.fixture(scope="module")
def counting() -> np.ndarray:
    """30 grey frames, each as bright as its number tells."""
    return np.stack([np.full((48, 64, 3), 8 * i, dtype=np.uint8) for i in range(30)])


# Frames


def test_every_form_of_frames_agrees(panning):
    pictures = [PIL.Image.fromarray(frame) for frame in panning]
    first = panning.transpose(0, 3, 1, 2)
    forms = [panning, first, torch.from_numpy(panning), torch.tensor(first) / 255, list(panning), pictures]
    for form in [*forms, tuple(pictures), first.astype(np.float32) / 255]:
        clip = load_frames(Video(form), ALL)
        np.testing.assert_array_equal(clip.frames, panning)
        assert clip.indices == list(range(10)) and clip.total_num_frames == 10 and clip.source_fps is None


def test_frames_are_sampled(panning):
    clip = load_frames(Video(panning, num_frames=4), ALL)
    assert clip.indices == [0, 3, 6, 9]
    np.testing.assert_array_equal(clip.frames, panning[[0, 3, 6, 9]])
    assert len(load_frames(Video(panning, fps=1.0, source_fps=2.0), ALL).indices) == 5
    assert len(load_frames(Video(panning, max_frames=3), ALL).indices) == 3


def test_frames_that_are_not_sampled_are_not_read(panning):
    frames: list = [panning[0], "no such file", "no such file", panning[3]]
    assert len(load_frames(Video(frames, num_frames=2), ALL).frames) == 2


def test_grey_and_transparent_frames(panning):
    grey = panning[..., :1]
    np.testing.assert_array_equal(load_frames(Video(grey), ALL).frames, np.repeat(grey, 3, axis=-1))
    opaque = np.concatenate([panning, np.full_like(panning[..., :1], 255)], axis=-1)
    np.testing.assert_array_equal(load_frames(Video(opaque), ALL).frames, panning)


@pytest.mark.parametrize(
    "source, message",
    [
        ([], "no frames. Pass at least one"),
        (np.zeros((0, 4, 4, 3), np.uint8), "no frames"),
        (np.zeros((4, 4, 3), np.uint8), r"is no clip: expected \[frames, height, width, 3\]"),
        (np.zeros((2, 4, 4, 3), np.int32), r"frame 0 of .*dtype int32"),
        (np.full((2, 4, 4, 3), np.nan), "NaN"),
        (np.zeros((2, 0, 4, 3), np.uint8), "no pixels"),
        ([np.zeros((4, 4), np.uint8), np.zeros((4, 5), np.uint8)], r"frame 1 has 4x5 pixels.*first one 4x4"),
        (["gone.jpg"], r"frame 0 of the clip: there is no file"),
        (7, r"is no clip. Pass a file"),
        (None, r"is no clip. Pass a file"),
        ("gone.mp4", "there is no file"),
        (b"", "no data"),
    ],
)
def test_bad_clips_are_video_errors(source, message):
    with pytest.raises(VideoError, match=message):
        load_frames(Video(source), ALL)


# Files


@pytest.mark.parametrize("format", ["mp4", "matroska"])
def test_a_file_gives_the_sampled_frames(format, counting, tmp_path):
    data = encode_video(counting, rate=10, format=format)
    path = tmp_path / "clip"
    path.write_bytes(data)
    for source in (data, path, str(path)):
        clip = load_frames(Video(source), ALL)  # 3 seconds at 2 frames a second
        assert clip.source_fps == 10 and clip.total_num_frames == 30
        assert clip.indices == [0, 6, 12, 17, 23, 29]
        means = clip.frames.mean(axis=(1, 2, 3))
        np.testing.assert_allclose(means, [8 * i for i in clip.indices], atol=3)


def test_a_file_is_decoded_like_the_reference(panning, tmp_path):
    theirs = pytest.importorskip("transformers.video_utils").read_video_pyav
    path = tmp_path / "clip.mp4"
    path.write_bytes(encode_video(panning))
    clip = load_frames(Video(path, num_frames=4), ALL)
    expected, _ = theirs(str(path), lambda metadata, **_: np.array(clip.indices))
    np.testing.assert_array_equal(clip.frames, expected)


def test_the_clip_chooses_its_frames(counting):
    data = encode_video(counting)
    assert len(load_frames(Video(data, fps=5.0), ALL).indices) == 15
    assert load_frames(Video(data, num_frames=3), ALL).indices == [0, 14, 29]
    assert len(load_frames(Video(data, fps=10.0, max_frames=7), ALL).indices) == 7


def test_damaged_files_are_video_errors(counting, cat_jpeg):
    data = encode_video(counting)
    for damaged in (data[: len(data) // 2], b"\0" * 1000, b"not a video at all", data[:40]):
        with pytest.raises(VideoError, match="Check that the file is complete"):
            load_frames(Video(damaged), ALL)


def test_a_file_without_pyav_names_the_extra(monkeypatch, tmp_path):
    real = builtins.__import__

    def without_av(name, *arguments, **options):
        if name == "av":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_av)
    with pytest.raises(MissingExtraError, match=r"pip install 'vitgraph\[video\]'"):
        load_frames(Video(b"some bytes"), ALL)


# Processing


def reference_rows(frames: np.ndarray, height: int, width: int, processor: SmartResizeProcessor) -> np.ndarray:
    """The whole clip at once in torch, as the reference's tensor code does it."""
    p, T, m = processor.patch_size, processor.temporal_patch_size, processor.merge_size
    clip = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()
    clip = torch.nn.functional.interpolate(
        clip, size=(height, width), mode="bicubic", align_corners=False, antialias=True
    )
    mean = torch.tensor(processor.image_mean) * (1.0 / (1 / 255))
    std = torch.tensor(processor.image_std) * (1.0 / (1 / 255))
    clip = (clip.to(torch.float32) - mean[:, None, None]) / std[:, None, None]
    clip = torch.cat([clip, clip[-1:].expand(-len(clip) % T, -1, -1, -1)])
    clip = clip.reshape(len(clip) // T, T, 3, height // p // m, m, p, width // p // m, m, p)
    return clip.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, 3 * T * p * p).numpy()


@pytest.mark.parametrize("processor, height, width", [(QWEN3, 128, 192), (QWEN2, 252, 420)], ids=["3", "2"])
@pytest.mark.parametrize("count", [1, 2, 5, 10])
def test_rows_equal_an_independent_derivation(processor, height, width, count, panning):
    patches = processor.prepare(Video(panning[:count]))
    p = processor.patch_size
    assert patches.grid == Grid(-(-count // 2), height // p, width // p)
    assert patches.pixel_values.dtype == np.float32 and patches.pixel_values.flags.c_contiguous
    np.testing.assert_array_equal(patches.pixel_values, reference_rows(panning[:count], height, width, processor))


@pytest.mark.parametrize("processor", [QWEN3, QWEN2], ids=["3", "2"])
@pytest.mark.parametrize("cap", [False, True])
def test_rows_equal_transformers(processor, cap, panning):
    pytest.importorskip("torchvision")
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    limits = {"cap_pixels_per_frame": cap, "max_video_tokens": 24}
    bounds = {"shortest_edge": processor.video_min_pixels, "longest_edge": processor.video_max_pixels}
    kind = Qwen3VLVideoProcessor if processor is QWEN3 else Qwen2VLVideoProcessor
    ours = SmartResizeProcessor(**{**vars(processor), **limits})
    for frames in (panning, panning[:5, :37, :50], panning[:3, :, :61]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = kind(size=bounds, do_sample_frames=False, **limits)(
                videos=[torch.from_numpy(frames.copy())], return_tensors="np"
            )
        patches = ours.prepare(Video(frames))
        assert list(patches.grid) == theirs["video_grid_thw"][0].tolist()
        np.testing.assert_array_equal(patches.pixel_values, theirs["pixel_values_videos"])


def test_bilinear_and_unknown_filters(panning):
    assert resize_frame(panning[0], 60, 100, resample=2).shape == (60, 100, 3)
    with pytest.raises(VideoError, match=r"use 2 \(bilinear\) or 3 \(bicubic\)"):
        resize_frame(panning[0], 60, 100, resample=1)


def test_a_frame_of_the_right_size_is_not_touched(panning):
    frame = panning[0]
    assert resize_frame(frame, 120, 200) is frame


def test_a_file_goes_all_the_way(counting):
    patches = QWEN3.prepare(Video(encode_video(counting)))
    assert patches.grid == Grid(3, 4, 4)
    assert np.isfinite(patches.pixel_values).all()


def test_a_clip_may_bring_its_own_bounds_of_pixels():
    frames = np.zeros((4, 300, 400, 3), np.uint8)
    processor = SmartResizeProcessor(patch_size=16, video_min_pixels=64 * 64, video_max_pixels=1024 * 1024)
    plain = processor.video(Video(frames)).grid
    small = processor.video(Video(frames, max_pixels=128 * 128)).grid
    large = processor.video(Video(frames, min_pixels=512 * 512)).grid
    assert small.h * small.w * 16**2 <= 128 * 128 < plain.h * plain.w * 16**2
    assert large.h * large.w * 16**2 >= 512 * 512 > plain.h * plain.w * 16**2
    with pytest.raises(VideoError, match="max_pixels=1 are no bounds"):
        processor.video(Video(frames, max_pixels=1))
