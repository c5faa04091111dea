"""From whatever a caller calls an image to an upright RGB picture."""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps

from vitgraph.errors import ImageError
from vitgraph.preprocess.arrays import image_to_uint8, is_array
from vitgraph.preprocess.sources import describe, resolve

MAX_PIXELS = 178_956_970
"""Largest image to decode, in pixels: where Pillow refuses, at its default settings."""

MAX_DOWNLOAD_BYTES = 256 << 20

_ORIENTATION = 0x0112
_open_lock = threading.Lock()


def load_image(source: Any, *, max_pixels: int | None = MAX_PIXELS) -> PIL.Image.Image:
    """Decode an image and make it upright RGB.

    EXIF orientation is applied, as in Transformers' `load_image`. Transparency is composited onto white, as
    in the `convert_to_rgb` of its image processors (its `load_image` drops the alpha channel of a file
    instead). A 16-bit grey file keeps its high byte, where Pillow's own conversion clips almost every value
    to white.

    Args:
        source: path, http(s) URL, `data:` URI, encoded bytes, PIL image, or an array or tensor (`[H, W, 3]`,
            `[3, H, W]`, `[H, W]`, `[H, W, 1]` or RGBA; uint8, or floats in [0, 1]). It is not changed.
        max_pixels: refuse a larger image before decoding it; None for no limit but Pillow's own.

    Returns:
        Mode "RGB", at least 1x1, decoded.

    Raises:
        ImageError: it cannot be read, is empty, too large, damaged, no image, or an array of the wrong kind.
    """
    if isinstance(source, PIL.Image.Image):
        return _to_rgb(source, source, max_pixels)
    if is_array(source):
        return _from_array(source, max_pixels)
    if not isinstance(source, (str, bytes, bytearray, memoryview, os.PathLike)):
        raise ImageError(
            f"{describe(source)} is no image. Pass a path, an http(s) URL, encoded bytes, a PIL image, an "
            "array or a tensor; frames go into a Video and patch rows into Patches."
        )
    with _open(resolve(source, ImageError, MAX_DOWNLOAD_BYTES), source) as image:
        return _to_rgb(image, source, max_pixels)


def _from_array(source: Any, max_pixels: int | None) -> PIL.Image.Image:
    pixels = image_to_uint8(source)
    image = PIL.Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))
    return _to_rgb(image, source, max_pixels)


def _open(encoded: Path | bytes, source: Any) -> PIL.Image.Image:
    """Reads the header only."""
    file: Any = io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded

    def read_header() -> PIL.Image.Image:
        # Our own limit is checked on the header; Pillow's softer one would only print a warning.
        with _open_lock, warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            return PIL.Image.open(file)

    return _guard(read_header, source, "is no image that can be decoded")


def _to_rgb(image: PIL.Image.Image, source: Any, max_pixels: int | None) -> PIL.Image.Image:
    _check_size(image, source, max_pixels)
    _guard(image.load, source, "cannot be decoded")
    return _guard(lambda: _without_alpha(_to_8_bits(_upright(image), source)), source, "cannot be converted to RGB")


def _check_size(image: PIL.Image.Image, source: Any, max_pixels: int | None) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(
            f"{describe(source)} is an image of {width}x{height} pixels: empty. Check the crop that made it."
        )
    if max_pixels is not None and width * height > max_pixels:
        raise ImageError(
            f"{describe(source)} is an image of {width}x{height} = {width * height} pixels; at most "
            f"{max_pixels} are decoded. Resize it first, or raise max_pixels if you trust it."
        )


def _upright(image: PIL.Image.Image) -> PIL.Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF says nothing about orientation, and the pixels are whole
        return image
    return PIL.ImageOps.exif_transpose(image) if orientation != 1 else image


def _to_8_bits(image: PIL.Image.Image, source: Any) -> PIL.Image.Image:
    """Deep grey modes, which Pillow would clip."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F") and not _fits_bytes(image):
        raise ImageError(
            f"{describe(source)} has {'floating point' if image.mode == 'F' else '32-bit'} pixels from "
            "{:.4g} to {:.4g}, and what is white is unknown. Scale it to 8 bits and pass the array.".format(
                *image.getextrema()
            )
        )
    return image


def _fits_bytes(image: PIL.Image.Image) -> bool:
    low, high = (float(np.asarray(bound)) for bound in image.getextrema())
    return bool(low >= 0 and high <= 255 and (image.mode == "I" or high > 1))


def _without_alpha(image: PIL.Image.Image) -> PIL.Image.Image:
    if "A" in image.getbands() or "a" in image.getbands() or image.info.get("transparency") is not None:
        white = PIL.Image.new("RGBA", image.size, (255, 255, 255, 255))
        return PIL.Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _guard(step: Callable[[], Any], source: Any, problem: str) -> Any:
    """Runs a step of Pillow, whose decoders raise anything up to SyntaxError on damaged data."""
    try:
        return step()
    except ImageError:
        raise
    except PIL.Image.DecompressionBombError as error:
        raise ImageError(
            f"{describe(source)} {problem}: {error} Resize it first, or raise PIL.Image.MAX_IMAGE_PIXELS if "
            "you trust it."
        ) from error
    except Exception as error:
        raise ImageError(
            f"{describe(source)} {problem}: {type(error).__name__}: {error}. Check that the file is "
            "complete and in a format that Pillow reads, such as JPEG, PNG or WebP."
        ) from error
