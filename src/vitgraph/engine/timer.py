"""Timing of one engine's replays and eager runs on CUDA."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import torch

from vitgraph.attention.trial import elapsed
from vitgraph.core import Grid
from vitgraph.engine.graph import CapturedGraph
from vitgraph.engine.ladder import Ladder

ENOUGH_US = 6000.0
MOST_RUNS = 5
LEAD_CYCLES = 2_000_000
"""Of the GPU's clock, about a millisecond."""


class Timed(Protocol):
    """The part of an engine that is timed; see `Engine`."""

    device: torch.device
    ladder: Ladder

    def stage(self, budget: int, grids: Sequence[Grid]) -> None: ...

    def captured(self, budget: int, long: bool = False) -> CapturedGraph: ...

    def run_unpacked(self, grids: Sequence[Grid]) -> object: ...


class EngineTimer:
    """See `measure.Timer`. The pixels are whatever the static buffer holds: values do not change a time."""

    def __init__(self, engine: Timed) -> None:
        self._engine = engine

    def long(self, budget: int) -> bool:
        """Whether the budget has a graph of its own for packs of one or of long segments."""
        return budget in self._engine.ladder.long

    def replay(self, budget: int, grids: Sequence[Grid], long: bool = False) -> float:
        """Microseconds of one replay on the device: a long one runs once, short ones once more, a few in a row."""
        self._engine.stage(budget, grids)
        graph = self._engine.captured(budget, long)
        # Meanwhile the host gets ahead; the first launch of a graph also uploads it.
        torch.cuda._sleep(LEAD_CYCLES)
        once = elapsed(graph.replay, lead=False)
        if once > ENOUGH_US:
            return once
        return elapsed(graph.replay, min(int(ENOUGH_US / max(once, 1.0)), MOST_RUNS))

    def eager(self, grids: Sequence[Grid]) -> float:
        """Microseconds until an eager run is done, host time included."""
        self._synchronize()
        start = time.perf_counter()
        self._engine.run_unpacked(grids)
        self._synchronize()
        return (time.perf_counter() - start) * 1e6

    def _synchronize(self) -> None:
        torch.cuda.synchronize(self._engine.device)
