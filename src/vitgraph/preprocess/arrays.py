"""Images and frames that come as arrays or tensors: to uint8, channels last, three channels."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from vitgraph.errors import ImageError, InputError
from vitgraph.preprocess.sources import describe

LAYOUTS = "[H, W, 3], [3, H, W], [H, W], [H, W, 1] or [H, W, 4]"
CHANNELS = (1, 3, 4)


def is_tensor(value: Any) -> bool:
    """Whether `value` is a torch tensor. Does not import torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def is_array(value: Any) -> bool:
    """Whether `value` is a numpy array or a torch tensor."""
    return isinstance(value, np.ndarray) or is_tensor(value)


def to_numpy(value: Any) -> np.ndarray:
    """A numpy array or torch tensor as a numpy array; bfloat16 becomes float32."""
    if isinstance(value, np.ndarray):
        return value
    value = value.detach().cpu()
    if value.is_floating_point():
        value = value.float()
    return value.resolve_neg().numpy()


def image_to_uint8(image: Any) -> np.ndarray:
    """One image as bytes.

    Floats in [0, 1] are scaled by 255 and rounded to the nearest byte, so an 8-bit image that was divided by
    255 comes back unchanged. Transformers scales too, but truncates. Where both ends of the shape could be
    channels, channels come first, as in Transformers.

    Args:
        image: array or tensor, `[H, W, 3]`, `[3, H, W]`, `[H, W]`, `[H, W, 1]` or RGBA; uint8, or floats in
            [0, 1].

    Returns:
        uint8 `[H, W, C]`, C is 1, 3 or 4.

    Raises:
        ImageError: another rank, dtype or range, NaN, or no pixels.
    """
    shape = tuple(image.shape)
    if len(shape) == 2:
        image = image[..., None]
    elif len(shape) != 3 or not ({shape[0], shape[-1]} & set(CHANNELS)):
        hint = " Pass a batch one image at a time, or frames as a Video." if len(shape) == 4 else ""
        raise ImageError(f"{describe(image)} is no image: expected {LAYOUTS} (or RGBA with 4 first).{hint}")
    elif shape[0] in CHANNELS:
        image = image.transpose(1, 2, 0) if isinstance(image, np.ndarray) else image.permute(1, 2, 0)
    return pixels_to_uint8(image, describe(image), ImageError)


def pixels_to_uint8(pixels: Any, name: str, error: type[InputError]) -> np.ndarray:
    """Bytes of any shape from uint8 or floats in [0, 1]; see `image_to_uint8`.

    Raises:
        InputError: of class `error`; dtype, range, NaN or no pixels.
    """
    if 0 in pixels.shape:
        raise error(f"{name} has no pixels. Check the crop or slice that made it.")
    values = to_numpy(pixels)
    if values.dtype == np.uint8:
        return values
    if not np.issubdtype(values.dtype, np.floating):
        raise error(
            f"{name} has dtype {values.dtype}; expected uint8, or floats in [0, 1]. Convert it with "
            ".astype('uint8') if its values are 0 to 255."
        )
    low, high = values.min(), values.max()  # NaN comes through both
    if not (np.isfinite(low) and np.isfinite(high)):
        raise error(f"{name} holds NaN or infinite values; expected floats in [0, 1]. Repair the step that made it.")
    if low < 0 or high > 1:
        raise error(
            f"{name} has float values from {low:.4g} to {high:.4g}; expected [0, 1]. Divide by 255, pass "
            "uint8, or undo an earlier normalisation."
        )
    return np.rint(values.astype(np.float32, copy=False) * np.float32(255)).astype(np.uint8)
