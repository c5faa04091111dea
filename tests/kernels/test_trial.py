"""Trials of kernels: a long call is timed as it runs under load."""

from __future__ import annotations

import pytest

from vitgraph.attention import trial


def test_a_kernel_that_slows_down_under_load_is_timed_as_it_runs_then(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def elapsed(call, runs: int = 1, lead: bool = True) -> float:
        assert not lead, "runs follow each other"
        calls.append(call)
        return 100.0 if len(calls) <= 3 else 110.0

    clock = iter(range(100))
    monkeypatch.setattr(trial, "elapsed", elapsed)
    monkeypatch.setattr(trial.time, "perf_counter", lambda: float(next(clock)))
    assert trial.under_load(lambda: None, seconds=10.0) == 110.0
    assert len(calls) == 9


def test_at_least_one_run_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "elapsed", lambda call, lead: 5.0)
    assert trial.under_load(lambda: None, seconds=0.0) == 5.0


@pytest.mark.parametrize("us, runs", [(10.0, trial.RUNS), (2400.0, 3), (12000.0, 2)])
def test_long_calls_are_timed_less_often(us: float, runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setattr(trial, "elapsed", lambda replay: (calls.append(replay), us + len(calls))[1])
    assert trial._best(lambda: None) == us + 1
    assert len(calls) == runs
