"""The processor of towers with fixed tiles: an image is cut into tiles of one size, a clip is one tile per frame."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import PIL.Image

from vitgraph.core import Grid
from vitgraph.errors import ConfigError, ImageError, VideoError
from vitgraph.preprocess.base import Processor
from vitgraph.preprocess.hf import Json, check_choice, check_order, check_positive, check_triples, triples
from vitgraph.preprocess.inputs import Patches, Video
from vitgraph.preprocess.normalize import Arithmetic, Triple, normalize, value_table
from vitgraph.preprocess.patchify import patchify_raster
from vitgraph.preprocess.sampling import Sampling
from vitgraph.preprocess.video import load_frames

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class TileProcessor(Processor):
    """InternVL: the layout of tiles whose shape is nearest to the image's, then a thumbnail of the whole image.

    Images equal Transformers' PIL backend (`GotOcr2ImageProcessorPil` as InternVL's processor calls it) with
    `arithmetic="stepwise"`, and the loader that the original checkpoints publish with "divided". Clips equal
    `InternVLVideoProcessor` on the CPU: every frame is resized to one tile, whatever its shape.

    Attributes:
        image_size: side of a tile in pixels.
        patch_size: side of a patch in pixels.
        merge_size: patches on a side of a merge block.
        min_tiles, max_tiles: bounds of the number of tiles, without the thumbnail.
        thumbnail: add the whole image as a last tile when it was cut.
        image_mean, image_std: per channel, on the scale [0, 1].
        arithmetic: rounding of an image's values, see `Arithmetic`; clips are always "fused".
        resample: Pillow's number of the filter; 3 is bicubic.
        num_frames: frames to take of a clip of known rate when the caller names neither a rate nor a number.
        max_frames: most frames of a clip when the caller names no number.
        video_mean, video_std: for clips; None takes the images'.
    """

    image_size: int = 448
    patch_size: int = 14
    merge_size: int = 2
    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True
    image_mean: Triple = IMAGENET_MEAN
    image_std: Triple = IMAGENET_STD
    arithmetic: Arithmetic = "stepwise"
    resample: int = 3
    num_frames: int = 8
    max_frames: int = 768
    video_mean: Triple | None = None
    video_std: Triple | None = None

    def __post_init__(self) -> None:
        sizes = ("image_size", "patch_size", "merge_size", "min_tiles", "max_tiles", "num_frames", "max_frames")
        check_positive(self, sizes)
        check_order(self, "min_tiles", "max_tiles")
        check_triples(self, "image_mean", "video_mean")
        check_triples(self, "image_std", "video_std", positive=True)
        check_choice(self, "arithmetic", get_args(Arithmetic))
        check_choice(self, "resample", tuple(int(filter) for filter in PIL.Image.Resampling))

    @classmethod
    def from_hf(
        cls,
        preprocessor_config: Json | None,
        video_preprocessor_config: Json | None = None,
        **family_defaults: Any,
    ) -> TileProcessor:
        """From a checkpoint's preprocessor_config.json and video_preprocessor_config.json.

        What the files leave out comes from `family_defaults` (fields of this class), then from the class.
        `crop_to_patches` in the file has no effect: in Transformers, InternVL's processor overrules it.

        Raises:
            ConfigError: a value is invalid, or a file's tile is not that of the tower.
        """
        image = dict(preprocessor_config or {})
        video = dict(image if video_preprocessor_config is None else video_preprocessor_config)
        values = {
            "min_tiles": image.get("min_patches"),
            "max_tiles": image.get("max_patches"),
            "resample": image.get("resample"),
            "num_frames": video.get("num_frames"),
            **triples(image, image_mean="image_mean", image_std="image_std"),
            **triples(video, image_mean="video_mean", image_std="video_std"),
        }
        processor = cls(**{**family_defaults, **{name: value for name, value in values.items() if value is not None}})
        for config in (image, video):
            _check_file(config, processor.image_size)
        return processor

    @property
    def patch_width(self) -> int:
        return 3 * self.patch_size**2

    def image(self, image: Image) -> Patches:
        """Patch rows of an upright RGB image: float32 `[P, 3 * p * p]` and Grid(tiles, side, side)."""
        columns, rows = self._layout(image.height, image.width)
        side = self.image_size
        canvas = np.asarray(image.resize((columns * side, rows * side), resample=self.resample))
        tiles = canvas.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
        if self._has_thumbnail(len(tiles)):
            whole = np.asarray(image.resize((side, side), resample=self.resample))
            tiles = np.concatenate([tiles, whole[None]])
        table = value_table(self.image_mean, self.image_std, 1 / 255, self.arithmetic)
        return Patches(*patchify_raster(normalize(tiles, table), self.patch_size))

    def image_grid(self, height: int, width: int) -> Grid:
        """The grid that `image` gives an image of this size in pixels."""
        columns, rows = self._layout(height, width)
        side, tiles = self.image_size // self.patch_size, columns * rows
        return Grid(tiles + self._has_thumbnail(tiles), side, side)

    def video(self, video: Video) -> Patches:
        """Patch rows of a clip: float32 `[P, 3 * p * p]` and Grid(sampled frames, side, side)."""
        if video.min_pixels is not None or video.max_pixels is not None:
            raise VideoError(
                f"this model takes frames of {self.image_size}x{self.image_size} pixels and no others: leave "
                "min_pixels and max_pixels out."
            )
        sampling = MiddleSampling("spread", min_frames=1, max_frames=self.max_frames, num_frames=self.num_frames)
        size = self.image_size, self.image_size
        frames = load_frames(video, sampling, lambda *_: size, self.resample).frames
        mean, std = self.video_mean or self.image_mean, self.video_std or self.image_std
        return Patches(*patchify_raster(normalize(frames, value_table(mean, std, 1 / 255, "fused")), self.patch_size))

    def _layout(self, height: int, width: int) -> tuple[int, int]:
        if min(height, width) < 1:
            raise ImageError(
                f"an image of {height}x{width} pixels (height x width) is empty; both sides must be at least 1 pixel. "
                "Check the step that made it."
            )
        return tile_layout(height, width, self.image_size, self.min_tiles, self.max_tiles)

    def _has_thumbnail(self, tiles: int) -> bool:
        return self.thumbnail and tiles > 1


@lru_cache(maxsize=1024)
def tile_layout(height: int, width: int, image_size: int, min_tiles: int, max_tiles: int) -> tuple[int, int]:
    """Columns and rows of tiles for an image of `height` x `width` pixels.

    The ratio of columns to rows is as near as possible to that of width to height. Of equally near layouts the first
    is taken, or the last one whose tiles have less than twice the image's pixels; they are tried from few tiles to
    many, and those of one number from narrow to wide.
    """
    columns_up = range(1, max_tiles + 1)
    layouts = [(c, r) for c in columns_up for r in range(1, max_tiles // c + 1) if c * r >= min_tiles]
    best, nearest = (1, 1), float("inf")
    for columns, rows in sorted(layouts, key=lambda layout: layout[0] * layout[1]):
        distance = abs(width / height - columns / rows)
        larger = distance == nearest and height * width > 0.5 * image_size**2 * columns * rows
        if distance < nearest or larger:
            best, nearest = (columns, rows), distance
    return best


@dataclass(frozen=True)
class MiddleSampling(Sampling):
    """The middle frames of equal parts of the clip, as `sample_frames` of Transformers' `InternVLVideoProcessor`.

    Attributes:
        num_frames: frames to take of a clip of known rate when the caller names neither a rate nor a number.
    """

    num_frames: int = 8

    def indices(
        self,
        total_num_frames: int,
        source_fps: float | None,
        *,
        fps: float | None = None,
        num_frames: int | None = None,
        max_frames: int | None = None,
    ) -> list[int]:
        """As `Sampling.indices`; as many frames as its rule "spread" takes."""
        if fps is None and num_frames is None and source_fps is not None:
            num_frames = max(min(self.num_frames, total_num_frames), 1)
        asked = {"fps": fps, "num_frames": num_frames, "max_frames": max_frames}
        count = len(super().indices(total_num_frames, source_fps, **asked))  # type: ignore[arg-type]
        if count > total_num_frames:
            raise VideoError(
                f"{count} frames were asked of a clip that has {total_num_frames}. Ask for at most {total_num_frames}."
            )
        import torch  # its arange rounds in its own way, and the reference uses it

        step = total_num_frames / count
        return torch.arange(step / 2, total_num_frames, step).int().tolist()


def _check_file(config: Json, image_size: int) -> None:
    size = config.get("size", image_size)
    sides = {size} if isinstance(size, int) else {size.get("height"), size.get("width")}
    if sides != {image_size}:
        raise ConfigError(f"size={size!r} in a preprocessor file, but the tower takes tiles of {image_size} pixels.")
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if config.get(name) is False:
            raise ConfigError(f"{name}=false in a preprocessor file is not supported; set it to true.")
