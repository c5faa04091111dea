"""Target sizes: which height and width an image or clip is resized to. Integers in, integers out."""

from __future__ import annotations

import math
from typing import NamedTuple

from vitgraph.errors import ImageError

MAX_ASPECT_RATIO = 200
"""Longest side over shortest side that the Qwen and GLM processors accept."""


class NavitSize(NamedTuple):
    """What Kimi's rule makes of an image, in pixels.

    Attributes:
        height, width: size to resize to; the image's own size when it is within the limits.
        padded_height, padded_width: size after zero padding on the right and at the bottom.
    """

    height: int
    width: int
    padded_height: int
    padded_width: int


def smart_resize(
    height: int, width: int, factor: int = 28, min_pixels: int = 56 * 56, max_pixels: int = 28 * 28 * 1280
) -> tuple[int, int]:
    """Height and width in multiples of `factor`, the aspect ratio kept as well as they allow, the area in
    bounds.

    The rule of Qwen2-VL's `smart_resize` in Transformers: each side is rounded to its nearest multiple
    (halves to even). If the area is then out of bounds, both sides are scaled by one ratio and rounded
    towards the inside of the bounds.

    Args:
        height, width: size of the image in pixels.
        factor: what both sides must be a multiple of: patch size times merge size.
        min_pixels, max_pixels: bounds of the area.

    Raises:
        ImageError: a side is not positive, or one is more than 200 times the other.
    """
    return smart_resize_clip(1, height, width, 1, factor, min_pixels, max_pixels, grow=False)


def smart_resize_clip(
    num_frames: int,
    height: int,
    width: int,
    temporal_factor: int = 2,
    factor: int = 32,
    min_pixels: int = 128 * 128,
    max_pixels: int = 16 * 16 * 2 * 2 * 2 * 6144,
    *,
    grow: bool = True,
) -> tuple[int, int]:
    """As `smart_resize`, with bounds on the pixels of all frames together.

    The rule of Qwen3-VL's video `smart_resize` (and of GLM-4V) in Transformers. A clip shorter than
    `temporal_factor` counts as that long, since patchify repeats its last frame; Transformers refuses it.

    Args:
        num_frames: frames of the clip.
        height, width: size of a frame in pixels.
        temporal_factor: frames in a temporal patch.
        factor: what both sides must be a multiple of.
        min_pixels, max_pixels: bounds of frames x height x width.
        grow: enlarge a frame with a side below `factor` first, as the video rule does and the image rule does
            not.

    Raises:
        ImageError: a side is not positive, or one is more than 200 times the other.
    """
    num_frames = max(num_frames, temporal_factor)
    if grow and 0 < min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    _check_aspect_ratio(height, width)
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    area = round(num_frames / temporal_factor) * temporal_factor * new_height * new_width
    if area > max_pixels:
        shrink = math.sqrt(num_frames * height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif area < min_pixels:
        enlarge = math.sqrt(min_pixels / (num_frames * height * width))
        new_height = math.ceil(height * enlarge / factor) * factor
        new_width = math.ceil(width * enlarge / factor) * factor
    return new_height, new_width


def navit_resize(
    height: int,
    width: int,
    patch_size: int = 14,
    merge_size: int = 2,
    max_patches: int = 4096,
    max_side_patches: int = 512,
    *,
    fit_sides: bool = False,
) -> NavitSize:
    """Scale down until the patches fit, then pad to whole merge blocks. Never enlarges.

    The rule of Kimi-VL's image processor (`fit_sides=False`, limit 4096), and with `fit_sides=True` that of
    Kimi-K2.5 in Transformers (`navit_resize`, limit 16384), which also shrinks an image that is too long for
    the rotary table.

    Args:
        height, width: size of the image in pixels.
        patch_size: side of a patch in pixels.
        merge_size: patches on a side of a merge block; padded sides are multiples of `patch_size *
            merge_size`.
        max_patches: most whole patches before padding.
        max_side_patches: patches on a side that the model's position table ends at.
        fit_sides: shrink to `max_side_patches` instead of refusing a side that reaches it.

    Raises:
        ImageError: a side is not positive, or is too long and `fit_sides` is off.
    """
    _check_sides(height, width)
    smallest = 1 if fit_sides else 0  # Kimi-VL leaves an image alone that is thinner than a patch
    patches = max(smallest, height // patch_size) * max(smallest, width // patch_size)
    scale = min(1.0, math.sqrt(max_patches / patches)) if patches else 1.0
    if fit_sides:
        longest = max_side_patches * patch_size
        scale = min(scale, longest / height, longest / width)
        new_height, new_width = min(int(height * scale), longest), min(int(width * scale), longest)
    else:
        new_height, new_width = int(height * scale), int(width * scale)
    new_height, new_width = max(1, new_height), max(1, new_width)
    block = patch_size * merge_size
    size = NavitSize(new_height, new_width, -(-new_height // block) * block, -(-new_width // block) * block)
    side = max(size.padded_height, size.padded_width) // patch_size
    if not fit_sides and side >= max_side_patches:
        raise ImageError(
            f"an image of {height}x{width} pixels (height x width) gives {side} patches of {patch_size} "
            f"pixels on one side after scaling; the position table of this model ends below "
            f"{max_side_patches}. Crop it, or resize its longer side to at most "
            f"{(max_side_patches - merge_size) * patch_size} pixels."
        )
    return size


def _check_sides(height: int, width: int) -> None:
    if min(height, width) < 1:
        raise ImageError(
            f"an image of {height}x{width} pixels (height x width) is empty; both sides must be at least 1 "
            "pixel. Check the step that made it."
        )


def _check_aspect_ratio(height: int, width: int) -> None:
    _check_sides(height, width)
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_ASPECT_RATIO:
        raise ImageError(
            f"an image of {height}x{width} pixels (height x width) has an aspect ratio of {ratio:.1f}; at "
            f"most {MAX_ASPECT_RATIO} is supported. Crop it, pad its shorter side, or cut it into tiles."
        )
