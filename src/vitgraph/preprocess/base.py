"""What all families have in common: the dispatch on the kind of input, and the check of ready patches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np

from vitgraph.core import Grid
from vitgraph.errors import PatchError, VideoError
from vitgraph.preprocess.arrays import is_array, is_tensor
from vitgraph.preprocess.inputs import ImageInput, Patches, Video
from vitgraph.preprocess.load import load_image

if TYPE_CHECKING:
    from PIL.Image import Image


class Processor(ABC):
    """Turns one input into patch rows, as a family's reference processor does. Immutable; safe to share by
    threads.

    Attributes:
        merge_size: patches on a side of a merge block; a grid's h and w are multiples of it.
    """

    merge_size: int

    @property
    @abstractmethod
    def patch_width(self) -> int:
        """Values in a patch row."""

    @abstractmethod
    def image(self, image: Image) -> Patches:
        """Patch rows of an upright RGB image: float32 `[P, patch_width]`, numpy, and its grid."""

    @abstractmethod
    def image_grid(self, height: int, width: int) -> Grid:
        """The grid that `image` gives an image of this size in pixels, without touching pixels."""

    def video(self, video: Video) -> Patches:
        """Patch rows of a clip: float32 `[P, patch_width]`, numpy, and its grid.

        Raises:
            VideoError: the clip cannot be read, or the family has no video.
        """
        raise VideoError("this model encodes images only, and got a Video. Pass the frames you need as images.")

    def prepare(self, item: ImageInput) -> Patches:
        """Patch rows of any input.

        Args:
            item: see `ImageInput`. Ready patches are checked and flattened to `[P, patch_width]`; they keep their
                dtype and device.

        Raises:
            InputError: an ImageError, VideoError or PatchError, by the kind of input.
        """
        if isinstance(item, Patches):
            return check_patches(item, self.patch_width, self.merge_size)
        if isinstance(item, Video):
            return self.video(item)
        return self.image(load_image(item))


def check_patches(patches: Patches, patch_width: int, merge_size: int) -> Patches:
    """Ready patches with trailing dimensions flattened.

    NaN and infinite values are looked for in host memory only: a look at a GPU tensor would wait for the device.

    Raises:
        PatchError: grid, rank, row count, width, dtype or values do not fit.
    """
    grid = _check_grid(patches.grid, merge_size)
    values = patches.pixel_values
    if not is_array(values):
        raise PatchError(f"pixel_values is a {type(values).__name__}; expected a numpy array or a torch tensor.")
    shape = tuple(values.shape)
    width = int(np.prod(shape[1:]))
    if len(shape) < 2 or width != patch_width:
        raise PatchError(
            f"pixel_values has shape {list(shape)}: expected [{grid.patches}, {patch_width}], or dimensions "
            f"that flatten to it. Rows of {patch_width} values are what this model's processor makes; use "
            "its own processor."
        )
    if shape[0] != grid.patches:
        raise PatchError(
            f"pixel_values has {shape[0]} rows, but grid (t, h, w) = {tuple(grid)} says {grid.patches}. "
            "Split a batch into one Patches per item, each with its own grid."
        )
    _check_values(values)
    return Patches(values.reshape(shape[0], width), grid)


def _check_grid(grid: Any, merge_size: int) -> Grid:
    try:
        t, h, w = (int(n) for n in grid)
    except (TypeError, ValueError) as error:
        raise PatchError(f"grid is {grid!r}; expected three integers (t, h, w), in patches.") from error
    if min(t, h, w) < 1 or h % merge_size or w % merge_size:
        raise PatchError(
            f"grid (t, h, w) = {(t, h, w)} is not valid: t must be at least 1, h and w positive multiples of "
            f"{merge_size}. Take it from the processor that made the rows."
        )
    return Grid(t, h, w)


def _check_values(values: Any) -> None:
    floating = values.is_floating_point() if is_tensor(values) else np.issubdtype(values.dtype, np.floating)
    if not floating:
        raise PatchError(
            f"pixel_values has dtype {values.dtype}; expected normalised floating point values. Pass an "
            "8-bit image as an image instead."
        )
    if is_tensor(values):
        if values.device.type != "cpu":
            return
        low, high = (float(bound) for bound in values.detach().aminmax())
    else:
        low, high = float(values.min()), float(values.max())  # NaN comes through both
    if not (np.isfinite(low) and np.isfinite(high)):
        raise PatchError("pixel_values holds NaN or infinite values. Repair the step that made it, or drop the item.")
