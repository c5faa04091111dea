"""Workloads: which items one timed call encodes."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from torch import Tensor, from_numpy

from vitgraph.core import Grid
from vitgraph.errors import ConfigError

MIXED = "2x20x20+1x32x48+3x16x28+1x64x40+1x24x24"
DEFAULT_WORKLOADS = ("1x20x20", "8x20x20", "mixed")


@dataclass(frozen=True)
class Workload:
    """Items encoded by one call.

    Attributes:
        name: as the caller wrote it.
        grids: one per item, in patches.
    """

    name: str
    grids: tuple[Grid, ...]

    @property
    def patches(self) -> int:
        return sum(grid.patches for grid in self.grids)


def parse_workload(text: str) -> Workload:
    """Reads `NxHxW` (N images of H x W patches), `NxTxHxW` (N clips of T temporal patches), several joined with '+',
    or `mixed`.

    Raises:
        ConfigError: when the text has another form.
    """
    grids: list[Grid] = []
    for part in (MIXED if text == "mixed" else text).split("+"):
        match = re.fullmatch(r"(\d+)(?:x(\d+))?x(\d+)x(\d+)", part.strip())
        if match is None or any(int(n) == 0 for n in match.groups() if n is not None):
            raise ConfigError(
                f"workload {text!r} is not understood at {part!r}; write NxHxW for N images of H x W patches "
                "(8x20x20), NxTxHxW for clips, several joined with '+', or 'mixed'."
            )
        count, t, h, w = match.groups()
        grids += [Grid(int(t or 1), int(h), int(w))] * int(count)
    return Workload(text, tuple(grids))


def random_patches(workload: Workload, patch_width: int, seed: int = 0) -> Tensor:
    """Pixel rows of all items, `[P, patch_width]` float32 on the host, spread as normalised pixels are."""
    rows = np.random.default_rng(seed).standard_normal((workload.patches, patch_width), dtype=np.float32)
    return from_numpy(rows)
