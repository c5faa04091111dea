"""Timing of one engine's replays and eager runs on CUDA."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import torch

from vitgraph.attention.trial import elapsed, spin
from vitgraph.core import Grid
from vitgraph.engine.agenda import REST_SHARE
from vitgraph.engine.graph import CapturedGraph
from vitgraph.engine.ladder import Ladder

LEAD_US = 600.0
"""Before each replay the GPU spins, which counts as rest, for so long, or for REST_SHARE of the time of the replay
before, if that is longer."""


class Timed(Protocol):
    """The part of an engine that is timed; see `Engine`."""

    device: torch.device
    ladder: Ladder

    def stage(self, budget: int, grids: Sequence[Grid]) -> None: ...

    def captured(self, budget: int, long: bool = False) -> CapturedGraph: ...

    def run_unpacked(self, grids: Sequence[Grid]) -> object: ...


class EngineTimer:
    """See `agenda.Timer`. The pixels are whatever the static buffer holds: values do not change a time.

    Replays are timed from rest, at the clock that a request finds. Under load a GPU lowers it, an H100 by up to an
    eighth within some hundredths of a second, and what is timed late would seem slow.

    Attributes:
        replays, seconds: see `agenda.Timer`. What a spin takes beyond REST_SHARE is the host's, which gets ahead
            meanwhile.
    """

    def __init__(self, engine: Timed) -> None:
        self._engine = engine
        self.replays, self.seconds, self._before_us = 0, 0.0, 0.0

    def long(self, budget: int) -> bool:
        """Whether the budget has a graph of its own for packs of one or of long segments."""
        return budget in self._engine.ladder.long

    def replay(self, budget: int, grids: Sequence[Grid], long: bool = False) -> float:
        """Microseconds of one replay on the device."""
        self._engine.stage(budget, grids)
        graph = self._engine.captured(budget, long)
        rest_us = REST_SHARE * self._before_us
        # The first launch of a graph also uploads it, during the spin.
        spin(max(LEAD_US, rest_us))
        self._before_us = elapsed(graph.replay, lead=False)
        self.replays += 1
        self.seconds += (rest_us + self._before_us) / 1e6
        return self._before_us

    def eager(self, grids: Sequence[Grid]) -> float:
        """Microseconds until an eager run is done, host time included."""
        self._synchronize()
        start = time.perf_counter()
        self._engine.run_unpacked(grids)
        self._synchronize()
        return (time.perf_counter() - start) * 1e6

    def _synchronize(self) -> None:
        torch.cuda.synchronize(self._engine.device)
