"""The host's and the device's way to a pack's metadata, side by side."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from vitgraph.core import Grid, KnownGrid
from vitgraph.engine.buffers import MetadataLayout
from vitgraph.engine.compose import Composer
from vitgraph.engine.mailbox import HEAD
from vitgraph.models.contract import Tower
from vitgraph.planning.metadata import MetadataCache


class TileBlocks:
    """An attention backend that wants tile schedules, smaller ones for small buffers."""

    name = "tiles"

    def block(self, rows: int, longest: int) -> int:
        return 16 if min(rows, longest) < 400 else 32

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: object, scale: float) -> Tensor:
        raise NotImplementedError


class Composing:
    """A tower's layouts for some budgets, and a composer of them.

    Args:
        tower: whose metadata is composed.
        capacities: of the budgets, ascending.
        device: of the block.
        most_bytes: of the composer.
    """

    def __init__(self, tower: Tower, capacities: list[dict[str, int]], device: torch.device, most_bytes: int) -> None:
        spec = tower.spec
        kinds = tuple(capacities[-1])
        self.layouts = [MetadataLayout(spec, capacity, TileBlocks()) for capacity in capacities]
        self.block = torch.full((self.layouts[-1].nbytes,), 0xAB, dtype=torch.uint8, device=device)
        self.composer = Composer(spec, self.layouts, kinds, self.block, most_bytes)
        self.plans = MetadataCache(spec.counts, tower.metadata, 64)
        self.known = cache(lambda grid: KnownGrid(grid, spec.counts(grid)))

    def composed(self, grids: list[Grid], budget: int) -> dict[str, np.ndarray] | None:
        """Buffers that the device made; None where it refused."""
        self.block.fill_(0xAB)
        layout = self.layouts[budget]
        known = [self.known(grid) for grid in grids]
        if not self.composer.learn(known, self.plans.get_all):
            return None
        places = np.frombuffer(b"".join([own.place for own in known]), np.int32)
        request = [len(places), *[0] * (HEAD - 1), *places]
        counts = torch.zeros(2, dtype=torch.int64, device=self.block.device)
        on_device = torch.tensor(request, dtype=torch.int32, device=self.block.device)
        self.composer.launch(on_device, (counts[0], counts[1]), layout)
        return layout.arrays(self.block.cpu().numpy())

    def written(self, grids: list[Grid], budget: int) -> dict[str, np.ndarray]:
        """Buffers that the host writes."""
        layout = self.layouts[budget]
        arrays = layout.arrays(np.full(layout.nbytes, 0xCD, np.uint8))
        layout.write(arrays, self.plans.get_all(grids))
        return arrays


def check(composing: Composing, grids: list[Grid], budget: int) -> None:
    """Both ways give the same, bit by bit."""
    got, want = composing.composed(grids, budget), composing.written(grids, budget)
    assert got is not None
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name].view(np.int32), want[name].view(np.int32), err_msg=name)
