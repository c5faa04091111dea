"""Capture of the ladder: which budgets are warmed up first, and what a failed capture does. The pool is made up."""

from __future__ import annotations

from typing import cast

import pytest
import torch

from vitgraph import EncoderConfig, VisionEncoder
from vitgraph.engine import ladder as module
from vitgraph.engine.graph import CapturedGraph
from vitgraph.engine.ladder import Ladder

NO_GRAPH = cast(torch.cuda.CUDAGraph, None)


class Pool:
    """Notes whether captures come with a warm-up; fails as often as told."""

    nbytes = 0
    failures = 0
    calls: list[bool]

    def __init__(self, device: torch.device, mailbox: object = None) -> None:
        type(self).calls = []

    def capture(self, forward, inputs, outputs, warm_up=True, begin=None) -> CapturedGraph:
        self.calls.append(warm_up)
        if type(self).failures:
            type(self).failures -= 1
            raise RuntimeError("operation not permitted when stream is capturing")
        return CapturedGraph(NO_GRAPH, outputs, 0.0, 0)


@pytest.fixture
def captured(monkeypatch):
    """Captures a small ladder; returns the pool's notes."""
    monkeypatch.setattr(module, "GraphPool", Pool)

    def capture(failures: int = 0, **settings) -> Ladder:
        Pool.failures = failures
        config = EncoderConfig(budgets=(16, 32, 64, 128), **settings)
        with VisionEncoder.from_config("qwen3_vl", config=config) as encoder:
            engine = encoder.engine
            ladder = Ladder(engine.spec, engine._forward, engine.device, engine.dtype, config, engine.ladder._attention)
            ladder.capture()
        return ladder

    return capture


@pytest.mark.parametrize("compiled", [False, True])
def test_only_budgets_with_kernels_of_their_own_are_warmed_up(captured, compiled: bool) -> None:
    """Without tile schedules those are the largest and the smallest, compiled or not."""
    ladder = captured(compile=compiled)
    assert Pool.calls == [True, False, False, True]
    assert len(ladder.graphs) == 4


def test_a_capture_that_fails_without_warm_up_is_tried_with_one(captured, monkeypatch) -> None:
    monkeypatch.setattr(Ladder, "_warm_ups", lambda self, order: {order[0]})
    tries = []

    def fail_second(self, forward, inputs, outputs, warm_up=True, begin=None):
        tries.append(warm_up)
        if len(tries) == 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        return CapturedGraph(NO_GRAPH, outputs, 0.0, 0)

    monkeypatch.setattr(Pool, "capture", fail_second)
    ladder = captured()
    assert tries == [True, False, True, False, False]
    assert len(ladder.graphs) == 4


def test_a_late_capture_finds_metadata_that_is_valid_in_every_budget(captured, monkeypatch) -> None:
    ladder = captured(lazy=True)
    ladder.graphs.clear()
    ladder.complete = False
    arena = ladder.static(0).arena
    arena.block.fill_(99)
    seen = []

    def look(self, forward, inputs, outputs, warm_up=True, begin=None):
        seen.append(arena.block.any().item())
        return CapturedGraph(NO_GRAPH, outputs, 0.0, 0)

    monkeypatch.setattr(Pool, "capture", look)
    assert ladder.missing(1) == ""
    assert seen == [False]
    assert arena.holds is None


def test_a_capture_that_fails_with_a_warm_up_fails(captured) -> None:
    with pytest.raises(RuntimeError, match="not permitted"):
        captured(failures=1)
    assert Pool.calls == [True]
