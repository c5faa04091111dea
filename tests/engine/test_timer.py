"""How often a replay runs to be timed: start-up waits for it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vitgraph.core import Grid
from vitgraph.engine import timer


@pytest.mark.parametrize("each_us, timed_runs", [(100_000.0, 1), (7000.0, 1), (3000.0, 4), (100.0, 7)])
def test_long_replays_run_once_and_short_ones_a_few_times(monkeypatch, each_us: float, timed_runs: int) -> None:
    replays, leads = [], []

    def elapsed(call, runs: int = 1, lead: bool = True) -> float:
        for _ in range(runs + lead):
            call()
        return each_us

    monkeypatch.setattr(timer, "elapsed", elapsed)
    monkeypatch.setattr(timer.torch.cuda, "_sleep", leads.append)
    graph = SimpleNamespace(replay=lambda: replays.append(1))
    staged = []
    engine = SimpleNamespace(
        stage=lambda budget, grids: staged.append((budget, grids)), captured=lambda budget, alone: graph
    )
    timed = timer.EngineTimer(engine)
    assert timed.replay(3, [Grid(1, 8, 8)]) == each_us
    assert len(replays) == timed_runs
    assert staged == [(3, [Grid(1, 8, 8)])]
    assert len(leads) == 1, "the device is busy while the host launches"
