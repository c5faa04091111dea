"""How often a replay runs to be timed: start-up waits for it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vitgraph.core import Grid
from vitgraph.engine import timer


@pytest.mark.parametrize("each_us, first, again", [(100_000.0, 2, 1), (3000.0, 2, 1), (900.0, 4, 3), (100.0, 7, 6)])
def test_long_replays_run_once_and_short_ones_a_few_times(monkeypatch, each_us: float, first: int, again: int) -> None:
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
    for grids, expected in (([Grid(1, 8, 8)], first), ([Grid(1, 4, 4)], again)):
        replays.clear()
        assert timed.replay(3, grids) == each_us
        assert len(replays) == expected
    assert staged == [(3, [Grid(1, 8, 8)]), (3, [Grid(1, 4, 4)])]
