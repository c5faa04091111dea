"""The processor of Kimi-K2.5: Kimi's images, and clips as chunks of a few frames."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitgraph.errors import VideoError
from vitgraph.preprocess.hf import Json, check_positive, check_triples, first, triples
from vitgraph.preprocess.inputs import Patches, Video
from vitgraph.preprocess.normalize import Triple, normalize, value_table
from vitgraph.preprocess.patchify import patchify_raster
from vitgraph.preprocess.processor import NavitProcessor
from vitgraph.preprocess.resize import navit_resize
from vitgraph.preprocess.sampling import Sampling
from vitgraph.preprocess.video import load_frames


@dataclass(frozen=True)
class KimiChunkProcessor(NavitProcessor):
    """Kimi-K2.5: images as `NavitProcessor`, and one chunk of frames per clip.

    Chunks equal Transformers' `Kimi_K25VideoProcessor`, which resizes through torchvision and pads with black. It
    cuts a long clip into chunks that are separate items of the model; here the caller does.

    Attributes:
        chunk_frames: most frames of a chunk.
        frame_patches: most whole patches of a frame before padding.
        fps: frames to take per second of a file.
        video_mean, video_std: for clips; None takes the images'.
    """

    chunk_frames: int = 4
    frame_patches: int = 4096
    fps: float = 2.0
    video_mean: Triple | None = None
    video_std: Triple | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, ("chunk_frames", "frame_patches", "fps"))
        check_triples(self, "video_mean")
        check_triples(self, "video_std", positive=True)

    @classmethod
    def from_hf(
        cls, preprocessor_config: Json | None, video_preprocessor_config: Json | None = None, **family_defaults: Any
    ) -> NavitProcessor:
        """From a checkpoint's preprocessor_config.json and video_preprocessor_config.json, in the published form or
        in that of Transformers.

        Without a video file the image file's values hold for clips too.

        Raises:
            ConfigError: as for images.
        """
        config = dict(preprocessor_config or {})
        video = dict(config if video_preprocessor_config is None else video_preprocessor_config)
        video = dict(video.get("media_proc_cfg", video))
        values = {
            "chunk_frames": first(video, "temporal_merge_kernel_size", "temporal_patch_size"),
            "frame_patches": first(video, "in_patch_limit_each_frame", "in_patch_limit", "max_patches"),
            "fps": first(video, "sample_fps", "fps"),
            **triples(video, image_mean="video_mean", image_std="video_std"),
        }
        known = {name: value for name, value in values.items() if value is not None}
        return super().from_hf(config, **{**family_defaults, **known})

    def video(self, video: Video) -> Patches:
        """Patch rows of a chunk: float32 `[P, 3 * p * p]` and Grid(frames, h, w).

        Raises:
            VideoError: the clip cannot be read, or has more frames than a chunk.
        """
        sampling = Sampling("spread", self.fps, 1, sys.maxsize, 1)
        frames = load_frames(video, sampling, self.frame_size).frames
        _, height, width, channels = frames.shape
        block = self.patch_size * self.merge_size
        pixels = np.zeros((len(frames), -(-height // block) * block, -(-width // block) * block, channels), np.uint8)
        pixels[:, :height, :width] = frames
        mean, std = self.video_mean or self.image_mean, self.video_std or self.image_std
        table = value_table(mean, std, 1 / 255, "fused")
        return Patches(*patchify_raster(normalize(pixels, table), self.patch_size))

    def frame_size(self, num_frames: int, height: int, width: int) -> tuple[int, int]:
        """Height and width that the frames of a chunk are resized to before padding, in pixels."""
        if num_frames > self.chunk_frames:
            raise VideoError(
                f"the clip has {num_frames} sampled frames, but this model takes {self.chunk_frames} at a time. Pass "
                f"chunks of at most {self.chunk_frames} frames, one Video each, or sample fewer (num_frames, "
                "max_frames)."
            )
        limits = self.frame_patches, self.max_side_patches
        size = navit_resize(height, width, self.patch_size, self.merge_size, *limits, fit_sides=self.fit_sides)
        return size.height, size.width
