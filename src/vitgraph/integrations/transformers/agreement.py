"""Whether a tower computes what its module computes: checked once, on the first item of the first call.

A table of classes cannot know what the next version of Transformers changes inside of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vitgraph.core import Grid

MOST_FP32 = 1e-2
MOST_HALF = 0.15
"""Largest |tower - module| / |module|. TF32 may have been allowed for float32. Two roundings to bfloat16 of a deep
tower lie a few hundredths apart; another rotation, order or norm gives several tenths."""

LEAST = 1e-30
"""Stands for |module| where it is zero."""


def disagreement(module: nn.Module, arguments: Mapping[str, Any], grid: Grid, output: Any) -> str | None:
    """Runs the module's own forward on the first item and compares. Waits for the device.

    Args:
        module: whose class's forward is the reference.
        arguments: of the call.
        grid: of its first item.
        output: what the tower made of the whole call.

    Returns:
        What differs, or "" when nothing does; None when the module's own output is not finite, which shows nothing.
    """
    judged = False
    with torch.no_grad():
        want = type(module).forward(module, **_first_item(arguments, grid), return_dict=True)
    for name, own, theirs in _pairs(output, want):
        theirs = theirs.float()
        size = float(theirs.norm())
        if not math.isfinite(size):
            continue
        judged = True
        error = float((own[: len(theirs)].float() - theirs).norm()) / max(size, LEAST)
        if not error <= (MOST_FP32 if own.dtype == torch.float32 else MOST_HALF):
            return f"the tower's {name} differs from the module's own by {error:.1e}: is this Transformers too new?"
    return "" if judged else None


def _first_item(arguments: Mapping[str, Any], grid: Grid) -> dict[str, Any]:
    """The same call with the first item alone."""
    grids = arguments.get("grid_thw")
    pixels = next(name for name in ("hidden_states", "pixel_values") if name in arguments)
    if grids is None:
        return {pixels: arguments[pixels][:1]}
    rows: Tensor = arguments[pixels]
    # Rows may come in another shape, but always patch after patch.
    width = rows.numel() // int(sum(t * h * w for t, h, w in grids.tolist()))
    first = rows.reshape(-1)[: grid.patches * width].view(-1, *rows.shape[1:])
    return {pixels: first, "grid_thw": grids[:1]}


def _pairs(output: Any, want: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    for name, theirs in want.items():
        own = output[name]
        if isinstance(theirs, Tensor):
            yield name, own, theirs
        elif isinstance(theirs, list):
            yield from ((f"{name}[{i}]", a, b) for i, (a, b) in enumerate(zip(own, theirs, strict=True)))
