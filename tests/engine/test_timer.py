"""Replays are timed once, from rest."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vitgraph.core import Grid
from vitgraph.engine import timer


def test_a_replay_is_timed_once_after_a_rest(monkeypatch) -> None:
    done: list[object] = []
    times = iter((40_000.0, 100.0, 7000.0))

    def elapsed(call, runs: int = 1, lead: bool = True) -> float:
        for _ in range(runs + lead):
            call()
        return next(times)

    monkeypatch.setattr(timer, "elapsed", elapsed)
    monkeypatch.setattr(timer, "spin", done.append)
    engine = SimpleNamespace(
        stage=lambda budget, grids: done.append((budget, grids)),
        captured=lambda budget, long: SimpleNamespace(replay=lambda: done.append(long)),
    )
    timed = timer.EngineTimer(engine)
    grids = [Grid(1, 8, 8)]
    assert timed.replay(3, grids) == 40_000
    assert timed.replay(1, grids, long=True) == 100
    assert timed.replay(2, grids) == 7000
    assert timed.replays == 3
    assert timed.seconds == pytest.approx((47_100 + timer.REST_SHARE * 40_100) / 1e6)
    rests = [timer.LEAD_US, pytest.approx(40_000 * timer.REST_SHARE), timer.LEAD_US]
    assert done == [(3, grids), rests[0], False, (1, grids), rests[1], True, (2, grids), rests[2], False]
