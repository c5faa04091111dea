"""How often a replay runs to be timed: start-up waits for it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vitgraph.core import Grid
from vitgraph.engine import timer


@pytest.mark.parametrize("each_us, timed_runs", [(100_000.0, 1), (3000.0, 1), (900.0, 3), (100.0, 6)])
def test_long_replays_run_once_and_short_ones_a_few_times(monkeypatch, each_us: float, timed_runs: int) -> None:
    replays = []

    def elapsed(call, runs: int = 1) -> float:
        for _ in range(runs):
            call()
        return each_us

    monkeypatch.setattr(timer, "elapsed", elapsed)
    graph = SimpleNamespace(replay=lambda: replays.append(1))
    staged = []
    engine = SimpleNamespace(
        stage=lambda budget, grids: staged.append((budget, grids)), captured=lambda budget, alone: graph
    )
    timed = timer.EngineTimer(engine)
    assert timed.replay(3, [Grid(1, 8, 8)]) == each_us
    assert len(replays) == timed_runs
    assert staged == [(3, [Grid(1, 8, 8)])]
