"""From a clip to its sampled frames. Shapes: F sampled frames, H and W pixels."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vitgraph.errors import ImageError, InputError, MissingExtraError, VideoError
from vitgraph.preprocess.arrays import CHANNELS, is_array, pixels_to_uint8
from vitgraph.preprocess.inputs import Video
from vitgraph.preprocess.load import MAX_PIXELS, load_image
from vitgraph.preprocess.sampling import Sampling
from vitgraph.preprocess.sources import describe, resolve

MAX_DOWNLOAD_BYTES = 4 << 30
FRAME_LAYOUTS = "[frames, height, width, 3] or [frames, 3, height, width]"

FrameSize = Callable[[int, int, int], tuple[int, int]]
"""(frames, height, width) of the sampled clip -> (height, width) to resize its frames to."""

logger = logging.getLogger(__name__)


class Clip(NamedTuple):
    """Sampled frames.

    Attributes:
        frames: uint8 `[F, H, W, 3]`, RGB.
        indices: of the frames in the source.
        source_fps: rate of the source, if known.
        total_num_frames: frames of the source.
    """

    frames: np.ndarray
    indices: list[int]
    source_fps: float | None
    total_num_frames: int


def load_frames(video: Video, sampling: Sampling, frame_size: FrameSize | None = None, resample: int = 3) -> Clip:
    """Read the sampled frames of a clip, and no others.

    A file is decoded as a stream through PyAV, and each frame is resized as it comes, so memory holds what is
    returned and one frame more. As in the reference's PyAV reader, a display rotation stored in the file is
    not applied.

    Args:
        video: a file (path, bytes, URL, `data:` URI), images in order, or one array or tensor
            `[frames, height, width, 3]` or `[frames, 3, height, width]`, uint8 or floats in [0, 1].
        sampling: which frames; the clip's own fields take precedence.
        frame_size: size to resize to; None keeps the size.
        resample: Pillow's number of the filter, as in `resize_frame`.

    Raises:
        VideoError: the clip cannot be read or sampled, or its frames differ in size.
        MissingExtraError: a file was given and PyAV is not installed.
    """
    source = video.source
    if is_array(source):
        size = _array_size(source)
        indices = _indices(video, sampling, size[0], video.source_fps)
        frames = (_array_frame(source, i) for i in indices)
        return _collect(frames, indices, size[0], video.source_fps, size[1:], frame_size, resample)
    if isinstance(source, (list, tuple)):
        indices = _indices(video, sampling, len(source), video.source_fps)
        frames = (_listed_frame(source, i) for i in indices)
        return _collect(frames, indices, len(source), video.source_fps, None, frame_size, resample)
    try:
        encoded = resolve(source, VideoError, MAX_DOWNLOAD_BYTES)
    except TypeError as error:
        raise VideoError(
            f"{describe(source)} is no clip. Pass a file (path, bytes or URL), a list of images, or an array "
            f"{FRAME_LAYOUTS}."
        ) from error
    return _decode(encoded, video, sampling, frame_size, resample)


def resize_frame(frame: np.ndarray, height: int, width: int, resample: int = 3) -> np.ndarray:
    """Resize one frame as Transformers' video processors do on the CPU.

    They call torchvision's `resize` with antialias on uint8 tensors, which is
    `torch.nn.functional.interpolate` in 8-bit fixed point. It differs from Pillow's resize of images by one
    step of 255 in some pixels.

    Args:
        frame: uint8 `[H, W, 3]`.
        height, width: new size in pixels.
        resample: Pillow's number of the filter: 2 bilinear, 3 bicubic.

    Returns:
        uint8 `[height, width, 3]`; `frame` itself when it has that size.
    """
    if frame.shape[:2] == (height, width):
        return frame
    import torch

    mode = {2: "bilinear", 3: "bicubic"}.get(resample)
    if mode is None:
        raise VideoError(f"resample={resample} is not supported for clips; use 2 (bilinear) or 3 (bicubic).")
    planes = torch.from_numpy(np.ascontiguousarray(frame.transpose(2, 0, 1)))[None]
    resized = torch.nn.functional.interpolate(
        planes, size=(height, width), mode=mode, align_corners=False, antialias=True
    )
    return resized[0].permute(1, 2, 0).numpy()


def _indices(video: Video, sampling: Sampling, total: int, source_fps: float | None) -> list[int]:
    return sampling.indices(total, source_fps, fps=video.fps, num_frames=video.num_frames, max_frames=video.max_frames)


def _collect(
    frames: Iterable[np.ndarray],
    indices: list[int],
    total: int,
    source_fps: float | None,
    size: tuple[int, int] | None,
    frame_size: FrameSize | None,
    resample: int,
) -> Clip:
    """Resizes frames as they come; the first one fixes the size that all must have."""
    out: np.ndarray | None = None
    count = 0
    for frame in frames:
        size = size or frame.shape[:2]
        if frame.shape[:2] != size:
            raise VideoError(
                f"frame {indices[count]} has {frame.shape[0]}x{frame.shape[1]} pixels (height x width), the "
                f"first one {size[0]}x{size[1]}. Resize all frames of a clip to one size."
            )
        if out is None:
            target = frame_size(len(indices), *size) if frame_size else size
            out = np.empty((len(indices), *target, 3), dtype=np.uint8)
        out[count] = resize_frame(frame, out.shape[1], out.shape[2], resample)
        count += 1
    if out is None:
        raise VideoError("no frame of the clip could be decoded. Check that the file is complete.")
    return Clip(out[:count], indices[:count], source_fps, total)


def _array_size(array: Any) -> tuple[int, int, int]:
    """Frames, height, width of frames in one array."""
    shape = tuple(int(n) for n in array.shape)
    if len(shape) == 4 and shape[1] in CHANNELS:
        return shape[0], shape[2], shape[3]
    if len(shape) == 4 and shape[3] in CHANNELS:
        return shape[0], shape[1], shape[2]
    raise VideoError(f"{describe(array)} is no clip: expected {FRAME_LAYOUTS}.")


def _array_frame(array: Any, index: int) -> np.ndarray:
    frame = array[index]
    if array.shape[1] in CHANNELS:
        frame = frame.transpose(1, 2, 0) if isinstance(frame, np.ndarray) else frame.permute(1, 2, 0)
    name = f"frame {index} of {describe(array)}"
    pixels = pixels_to_uint8(frame, name, VideoError)
    if pixels.shape[-1] == 3:
        return pixels
    return np.asarray(load_image(pixels))


def _listed_frame(images: Sequence[Any], index: int) -> np.ndarray:
    try:
        return np.asarray(load_image(images[index]))
    except ImageError as error:
        raise VideoError(f"frame {index} of the clip: {error}") from error


def _decode(
    encoded: Path | bytes, video: Video, sampling: Sampling, frame_size: FrameSize | None, resample: int
) -> Clip:
    try:
        import av
    except ImportError as error:
        raise MissingExtraError("av", "video", "decoding a video file") from error
    name = describe(video.source)
    try:
        with av.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else str(encoded)) as container:
            if not container.streams.video:
                raise VideoError(f"{name} has no video stream. Pass a file with one.")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            _check_frame_size(name, stream)
            total = stream.frames or _count_frames(container, stream)
            source_fps = _rate(name, stream, video)
            indices = _indices(video, sampling, total, source_fps)
            frames = _stream(container, stream, indices)
            clip = _collect(frames, indices, total, source_fps, None, frame_size, resample)
    except InputError:
        raise
    except (av.error.FFmpegError, OSError, ValueError, IndexError, RuntimeError) as error:
        raise VideoError(
            f"{name} cannot be decoded as video: {type(error).__name__}: {error}. Check that the file is "
            "complete, or decode it yourself and pass the frames."
        ) from error
    if len(clip.indices) < len(indices):
        logger.warning(
            "%s ended early: %d of %d sampled frames were decoded (its header says %d frames)",
            name, len(clip.indices), len(indices), total,
        )  # fmt: skip
    return clip


def _stream(container: Any, stream: Any, indices: list[int]) -> Iterable[np.ndarray]:
    """The frames at `indices`, ascending, each as often as it is listed."""
    wanted = iter(indices)
    index = next(wanted, None)
    for position, frame in enumerate(container.decode(stream)):
        if position == index:
            pixels = frame.to_ndarray(format="rgb24")
            while position == index:
                yield pixels
                index = next(wanted, None)
        if index is None:
            return


def _count_frames(container: Any, stream: Any) -> int:
    """Packets with data, for containers whose header has no count (Matroska, WebM)."""
    count = sum(1 for packet in container.demux(stream) if packet.size)
    container.seek(0)
    return count


def _rate(name: str, stream: Any, video: Video) -> float | None:
    rate = stream.average_rate
    if rate:
        return float(rate)
    if video.source_fps is None and video.num_frames is None:
        raise VideoError(f"{name} does not state its frame rate. Give source_fps, or num_frames.")
    return video.source_fps


def _check_frame_size(name: str, stream: Any) -> None:
    if stream.width * stream.height > MAX_PIXELS:
        raise VideoError(
            f"{name} has frames of {stream.width}x{stream.height} pixels; at most {MAX_PIXELS} pixels are "
            "decoded. Scale the video down first."
        )
