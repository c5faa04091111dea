"""What a caller may hand to `encode`."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, Union

from vitgraph.core import Grid

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor


@dataclass(frozen=True)
class Patches:
    """One item that is already patchified, as the family's reference processor lays it out.

    Attributes:
        pixel_values: `[P, patch_width]` (or `[P, ...]` that flattens to it), floating point, numpy or torch.
        grid: its size in patches.
    """

    pixel_values: np.ndarray | Tensor
    grid: Grid


@dataclass(frozen=True)
class Video:
    """A clip: a file, or frames in order.

    Attributes:
        source: path, bytes or URL of a video file, or a sequence of images, or an array or tensor
            `[frames, height, width, 3]` or `[frames, 3, height, width]`.
        fps: frames to sample per second of video. Needs the source's own rate: a file has one.
        num_frames: frames to sample over the whole clip, instead of `fps`.
        max_frames: most frames to sample.
        source_fps: rate of `source` when it is a sequence of frames.
        min_pixels, max_pixels: bounds of the resized clip, instead of the checkpoint's; what they count is the
            family's rule: pixels of one frame, or of all frames together.
    """

    source: Any
    fps: float | None = None
    num_frames: int | None = None
    max_frames: int | None = None
    source_fps: float | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None


ImageInput = Union[str, "PathLike[str]", bytes, "Image", "np.ndarray", "Tensor", Patches, Video]
"""Path, URL, encoded bytes, PIL image, array or tensor (`[H, W, 3]`, `[3, H, W]` or `[H, W]`; uint8, or floats in
[0, 1]), patches, or a clip."""
