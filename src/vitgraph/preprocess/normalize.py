"""Pixel values from bytes: rescale and normalise through a table of 256 values per channel.

A byte has 256 values, so the table holds every result that the reference's arithmetic can give, and a lookup
is equal to it in every bit. It is also faster: one pass over the pixels instead of five.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np

Triple = tuple[float, float, float]
Arithmetic = Literal["stepwise", "fused", "divided"]
"""How a reference rounds on the way from byte to value.

`stepwise`: times 1/255 in float64, to float32, minus mean, over std (Transformers, PIL backend).
`fused`: minus 255 x mean, over 255 x std, in float32 (Transformers, torchvision backend and videos).
`divided`: over 255, minus mean, over std, in float32 (torchvision's `to_tensor` and `normalize`; Kimi's
processors).
"""


@lru_cache(maxsize=64)
def value_table(mean: Triple | None, std: Triple | None, factor: float | None, arithmetic: Arithmetic) -> np.ndarray:
    """Value of every byte in every channel.

    Args:
        mean, std: per channel, on the scale after `factor`; None leaves normalisation out.
        factor: what bytes are multiplied by, about 1/255; None leaves rescaling out.
        arithmetic: which reference's rounding.

    Returns:
        float32 `[3, 256]`, read-only.
    """
    values = np.broadcast_to(np.arange(256, dtype=np.float32), (3, 256))
    if arithmetic == "fused" and factor is not None and mean is not None and std is not None:
        unit = np.float32(1.0 / factor)
        mean_column, std_column = _column(mean) * unit, _column(std) * unit
        table = (values - mean_column) / std_column
    else:
        if factor is not None:
            if arithmetic == "stepwise":
                values = (values.astype(np.float64) * factor).astype(np.float32)
            elif arithmetic == "divided":
                values = values / np.float32(1.0 / factor)
            else:
                values = values * np.float32(factor)
        table = values if mean is None or std is None else (values - _column(mean)) / _column(std)
    table = np.ascontiguousarray(table)
    table.setflags(write=False)
    return table


def normalize(frames: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Look up every byte.

    Args:
        frames: uint8 `[F, H, W, 3]`.
        table: `[3, 256]` of `value_table`.

    Returns:
        float32 `[F, 3, H, W]`.
    """
    count, height, width, channels = frames.shape
    out = np.empty((count, channels, height, width), dtype=np.float32)
    for source, target in zip(frames, out, strict=True):
        planes = np.ascontiguousarray(source.transpose(2, 0, 1))
        for channel in range(channels):
            # bytes cannot be out of range; "clip" lets numpy write into `out` without a buffer
            np.take(table[channel], planes[channel], out=target[channel], mode="clip")
    return out


def _column(values: Triple) -> np.ndarray:
    return np.array(values, dtype=np.float32)[:, None]
