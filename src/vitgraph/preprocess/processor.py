"""The processors of the families: which size, which arithmetic, which row order."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import PIL.Image

from vitgraph.core import Grid
from vitgraph.errors import ConfigError, ImageError, VideoError
from vitgraph.preprocess.base import Processor
from vitgraph.preprocess.hf import (
    Json,
    check_choice,
    check_order,
    check_positive,
    check_triples,
    first,
    pixel_bounds,
    side,
    triples,
)
from vitgraph.preprocess.inputs import Patches, Video
from vitgraph.preprocess.normalize import Arithmetic, Triple, normalize, value_table
from vitgraph.preprocess.patchify import patchify_blocks, patchify_raster
from vitgraph.preprocess.resize import navit_resize, smart_resize, smart_resize_clip
from vitgraph.preprocess.sampling import Rule, Sampling
from vitgraph.preprocess.video import load_frames

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["NavitProcessor", "Processor", "SmartResizeProcessor"]

CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)
HALF: Triple = (0.5, 0.5, 0.5)

Scope = Literal["frame", "clip"]
"""Whether bounds on pixels count one frame, or all frames of a clip together."""


@dataclass(frozen=True)
class SmartResizeProcessor(Processor):
    """Qwen2-VL, Qwen2.5-VL, Qwen3-VL, GLM-4V and GLM-OCR: smart resize, rows in block order.

    Images equal Transformers' PIL backend (`Qwen2VLImageProcessorPil`), clips its video processors on the CPU, which
    resize through torchvision. Defaults are Qwen2-VL's class defaults.

    Attributes:
        patch_size: side of a patch in pixels.
        temporal_patch_size: frames in a temporal patch.
        merge_size: patches on a side of a merge block.
        min_pixels, max_pixels: bounds of a resized image's area.
        image_scope: what they count; "clip" counts an image as `temporal_patch_size` frames, as GLM-4V does.
        image_mean, image_std: per channel, on the scale [0, 1].
        do_resize: resize at all. Without, sides must be multiples of `patch_size * merge_size`.
        do_rescale, rescale_factor, do_normalize: as in Transformers.
        resample: Pillow's number of the filter; 3 is bicubic.
        video_min_pixels, video_max_pixels: bounds of a resized frame's or clip's pixels, by `video_scope`.
        video_scope: "frame" for Qwen2-VL and Qwen2.5-VL, "clip" for Qwen3-VL and GLM-4V.
        video_mean, video_std: for clips; None takes the images'.
        sampling: rule by which frames are taken, see `Sampling`.
        fps, min_frames, max_frames, max_duration: see `Sampling`.
        cap_pixels_per_frame, max_video_tokens: Transformers' optional cap, which is off by default there and here.
    """

    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    image_scope: Scope = "frame"
    image_mean: Triple = CLIP_MEAN
    image_std: Triple = CLIP_STD
    do_resize: bool = True
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    resample: int = 3
    video_min_pixels: int = 128 * 28 * 28
    video_max_pixels: int = 28 * 28 * 768
    video_scope: Scope = "frame"
    video_mean: Triple | None = None
    video_std: Triple | None = None
    sampling: Rule = "stride"
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    max_duration: float = 300.0
    cap_pixels_per_frame: bool = False
    max_video_tokens: int = 128_000

    def __post_init__(self) -> None:
        check_positive(self, ("patch_size", "temporal_patch_size", "merge_size", "rescale_factor"))
        check_positive(self, ("min_pixels", "max_pixels", "video_min_pixels", "video_max_pixels"))
        check_positive(self, ("fps", "min_frames", "max_frames", "max_duration", "max_video_tokens"))
        check_order(self, "min_pixels", "max_pixels")
        check_order(self, "video_min_pixels", "video_max_pixels")
        check_order(self, "min_frames", "max_frames")
        check_triples(self, "image_mean", "video_mean")
        check_triples(self, "image_std", "video_std", positive=True)
        check_choice(self, "image_scope", ("frame", "clip"))
        check_choice(self, "video_scope", ("frame", "clip"))
        check_choice(self, "sampling", get_args(Rule))
        check_choice(self, "resample", tuple(int(filter) for filter in PIL.Image.Resampling))

    @classmethod
    def from_hf(
        cls,
        preprocessor_config: Json | None,
        video_preprocessor_config: Json | None = None,
        **family_defaults: Any,
    ) -> SmartResizeProcessor:
        """From a checkpoint's preprocessor_config.json and video_preprocessor_config.json.

        What the files leave out comes from `family_defaults` (fields of this class), then from the class. As in
        Transformers, a checkpoint without a video file takes the image file's values for clips too.

        Raises:
            ConfigError: a value is invalid, or `size` has neither edges nor pixels.
        """
        image = dict(preprocessor_config or {})
        video = dict(image if video_preprocessor_config is None else video_preprocessor_config)
        values = dict(family_defaults)
        sizes = ("patch_size", "temporal_patch_size", "merge_size")
        shared = (*sizes, "do_resize", "do_rescale", "rescale_factor", "do_normalize", "resample")
        values |= {name: image[name] for name in shared if image.get(name) is not None}
        values |= triples(image, image_mean="image_mean", image_std="image_std")
        values |= triples(video, image_mean="video_mean", image_std="video_std")
        values |= dict(zip(("min_pixels", "max_pixels"), pixel_bounds(image), strict=True))
        values |= dict(zip(("video_min_pixels", "video_max_pixels"), pixel_bounds(video), strict=True))
        own = ("fps", "min_frames", "max_frames", "max_duration", "cap_pixels_per_frame", "max_video_tokens")
        values |= {name: video[name] for name in own if video.get(name) is not None}
        defaults = {**{field.name: field.default for field in fields(cls)}, **family_defaults}
        return cls(**{name: defaults[name] if value is None else value for name, value in values.items()})

    @property
    def patch_width(self) -> int:
        return 3 * self.temporal_patch_size * self.patch_size**2

    @property
    def factor(self) -> int:
        """What the sides of a resized image are multiples of, in pixels."""
        return self.patch_size * self.merge_size

    def image(self, image: Image) -> Patches:
        """Patch rows of an upright RGB image: float32 `[P, 3 * T * p * p]` and Grid(1, h, w)."""
        height, width = self._image_size(image.height, image.width)
        if (height, width) != (image.height, image.width):
            image = image.resize((width, height), resample=self.resample)
        frames = normalize(np.asarray(image)[None], self._table("stepwise", self.image_mean, self.image_std))
        return Patches(*patchify_blocks(frames, self.patch_size, self.temporal_patch_size, self.merge_size))

    def image_grid(self, height: int, width: int) -> Grid:
        """The grid that `image` gives an image of this size in pixels."""
        new_height, new_width = self._image_size(height, width)
        return Grid(1, new_height // self.patch_size, new_width // self.patch_size)

    def video(self, video: Video) -> Patches:
        """Patch rows of a clip: float32 `[P, 3 * T * p * p]` and Grid(ceil(sampled frames / T), h, w)."""
        limits = self.fps, self.min_frames, self.max_frames, self.temporal_patch_size, self.max_duration
        sampling = Sampling(self.sampling, *limits)
        clip = load_frames(video, sampling, self._bounded(video).frame_size, self.resample)
        table = self._table("fused", self.video_mean or self.image_mean, self.video_std or self.image_std)
        frames = normalize(clip.frames, table)
        return Patches(*patchify_blocks(frames, self.patch_size, self.temporal_patch_size, self.merge_size))

    def _bounded(self, video: Video) -> SmartResizeProcessor:
        """This processor with the bounds that the caller gave for one clip."""
        if video.min_pixels is None and video.max_pixels is None:
            return self
        low = self.video_min_pixels if video.min_pixels is None else video.min_pixels
        high = self.video_max_pixels if video.max_pixels is None else video.max_pixels
        try:
            return replace(self, video_min_pixels=low, video_max_pixels=high)
        except ConfigError as error:
            raise VideoError(f"min_pixels={low} and max_pixels={high} are no bounds for a clip: {error}") from error

    def frame_size(self, num_frames: int, height: int, width: int) -> tuple[int, int]:
        """Height and width that the frames of a clip are resized to, in pixels."""
        if not self.do_resize:
            return self._whole_blocks(height, width)
        max_pixels = self._max_video_pixels(num_frames)
        if self.video_scope == "frame":
            return smart_resize(height, width, self.factor, self.video_min_pixels, max_pixels)
        return smart_resize_clip(
            num_frames,
            height,
            width,
            self.temporal_patch_size,
            self.factor,
            self.video_min_pixels,
            max_pixels,
        )

    def _max_video_pixels(self, num_frames: int) -> int:
        """With the cap of Transformers' `cap_pixels_per_frame`, whose form differs by scope."""
        if not self.cap_pixels_per_frame:
            return self.video_max_pixels
        token, floor = self.factor**2, int(self.video_min_pixels * 1.05)
        if self.video_scope == "frame":
            share = int(self.max_video_tokens * token * 0.9) * self.temporal_patch_size // num_frames
            return max(min(self.video_max_pixels, share), floor)
        share = min(self.max_video_tokens * token, self.video_max_pixels // num_frames)
        return max(share, floor) * num_frames

    def _image_size(self, height: int, width: int) -> tuple[int, int]:
        if not self.do_resize:
            return self._whole_blocks(height, width)
        if self.image_scope == "frame":
            return smart_resize(height, width, self.factor, self.min_pixels, self.max_pixels)
        T = self.temporal_patch_size
        return smart_resize_clip(T, height, width, T, self.factor, self.min_pixels, self.max_pixels)

    def _whole_blocks(self, height: int, width: int) -> tuple[int, int]:
        if height % self.factor or width % self.factor or not height * width:
            raise ImageError(
                f"an image of {height}x{width} pixels (height x width) cannot be cut into blocks of "
                f"{self.factor}, and this processor has do_resize=False. Resize it to multiples of "
                f"{self.factor}."
            )
        return height, width

    def _table(self, arithmetic: Arithmetic, mean: Triple, std: Triple) -> np.ndarray:
        factor = self.rescale_factor if self.do_rescale else None
        return value_table(*((mean, std) if self.do_normalize else (None, None)), factor, arithmetic)


@dataclass(frozen=True)
class NavitProcessor(Processor):
    """Kimi-VL, and the images of Kimi-K2.5: shrink to a number of patches, zero-pad, rows in raster order.

    Equals the image processors that these checkpoints ship (Pillow's bicubic filter; padding before
    normalisation, so a padded pixel is black). Transformers' own `Kimi_K25ImageProcessor` resizes through
    torchvision instead.

    Attributes:
        patch_size: side of a patch in pixels.
        merge_size: patches on a side of a merge block.
        max_patches: most whole patches before padding.
        max_side_patches: patches on a side that the position table ends at.
        fit_sides: shrink a longer side (Kimi-K2.5) instead of refusing it (Kimi-VL).
        image_mean, image_std: per channel, on the scale [0, 1].
    """

    patch_size: int = 14
    merge_size: int = 2
    max_patches: int = 4096
    max_side_patches: int = 512
    fit_sides: bool = False
    image_mean: Triple = HALF
    image_std: Triple = HALF

    def __post_init__(self) -> None:
        check_positive(self, ("patch_size", "merge_size", "max_patches", "max_side_patches"))
        check_triples(self, "image_mean")
        check_triples(self, "image_std", positive=True)

    @classmethod
    def from_hf(cls, preprocessor_config: Json | None, **family_defaults: Any) -> NavitProcessor:
        """From a checkpoint's preprocessor_config.json, in the form of Kimi-VL, of Kimi-K2.5 or of
        Transformers.

        Raises:
            ConfigError: a value is invalid, or `pad_input` is off: such patches would not form merge blocks.
        """
        config = dict(preprocessor_config or {})
        k25 = "media_proc_cfg" in config or "max_patches" in config
        config = dict(config.get("media_proc_cfg", config))
        if config.get("pad_input") is False:
            raise ConfigError("pad_input=false in preprocessor_config.json is not supported; set it to true.")
        size = config.get("size") or {}
        values = {
            "patch_size": config.get("patch_size"),
            "merge_size": side(config.get("merge_kernel_size", config.get("merge_size"))),
            "max_patches": first(config, "in_token_limit", "in_patch_limit", "max_patches"),
            "max_side_patches": config.get("patch_limit_on_one_side", size.get("max_height")),
            "fit_sides": True if k25 else None,
            **triples(config, image_mean="image_mean", image_std="image_std"),
        }
        return cls(**{**family_defaults, **{name: value for name, value in values.items() if value is not None}})

    @property
    def patch_width(self) -> int:
        return 3 * self.patch_size**2

    def image(self, image: Image) -> Patches:
        """Patch rows of an upright RGB image: float32 `[P, 3 * p * p]` and Grid(1, h, w)."""
        size = self._size(image.height, image.width)
        if (size.height, size.width) != (image.height, image.width):
            image = image.resize((size.width, size.height), resample=PIL.Image.Resampling.BICUBIC)
        pixels = np.zeros((1, size.padded_height, size.padded_width, 3), dtype=np.uint8)
        pixels[0, : size.height, : size.width] = np.asarray(image)
        table = value_table(self.image_mean, self.image_std, 1 / 255, "divided")
        return Patches(*patchify_raster(normalize(pixels, table), self.patch_size))

    def image_grid(self, height: int, width: int) -> Grid:
        """The grid that `image` gives an image of this size in pixels."""
        size = self._size(height, width)
        return Grid(1, size.padded_height // self.patch_size, size.padded_width // self.patch_size)

    def _size(self, height: int, width: int) -> Any:
        limits = self.max_patches, self.max_side_patches
        return navit_resize(height, width, self.patch_size, self.merge_size, *limits, fit_sides=self.fit_sides)
