"""Capture of the ladder: which budgets are warmed up first, and what a failed capture does. The pool is made up."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import cast

import pytest
import torch

from vitgraph import EncoderConfig, VisionEncoder
from vitgraph.attention.sdpa import SdpaAttention
from vitgraph.engine import ladder as module
from vitgraph.engine.graph import CapturedGraph
from vitgraph.engine.ladder import Ladder

NO_GRAPH = cast(torch.cuda.CUDAGraph, None)


class Pool:
    """Notes whether captures come with a warm-up; fails as often as told."""

    nbytes = 0
    failures = 0
    calls: list[bool]
    finished: list[int]
    """How many captures there were when they were waited for."""

    def __init__(self, device: torch.device, mailbox: object = None) -> None:
        type(self).calls, type(self).finished = [], []

    def capture(self, forward, inputs, outputs, warm_up=True, begin=None) -> CapturedGraph:
        self.calls.append(warm_up)
        if type(self).failures:
            type(self).failures -= 1
            raise RuntimeError("operation not permitted when stream is capturing")
        return CapturedGraph(NO_GRAPH, outputs, 0.0)

    def finish(self) -> None:
        self.finished.append(len(self.calls))


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
        return CapturedGraph(NO_GRAPH, outputs, 0.0)

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
        return CapturedGraph(NO_GRAPH, outputs, 0.0)

    monkeypatch.setattr(Pool, "capture", look)
    assert ladder.missing(1) == ""
    assert seen == [False]
    assert arena.holds is None


def test_a_capture_that_fails_with_a_warm_up_fails(captured) -> None:
    with pytest.raises(RuntimeError, match="not permitted"):
        captured(failures=1)
    assert Pool.calls == [True]


@pytest.mark.parametrize("failures", [0, 1])
def test_what_is_captured_can_be_replayed_afterwards(captured, failures: int) -> None:
    """Also what was captured before a failure."""
    with pytest.raises(RuntimeError) if failures else nullcontext():
        captured(failures)
    assert Pool.finished == [len(Pool.calls)]


def test_a_late_capture_can_be_replayed_afterwards(captured) -> None:
    ladder = captured(lazy=True)
    ladder.graphs.clear()
    ladder.complete = False
    assert ladder.missing(1) == ""
    assert Pool.finished == [4, 5]


def test_what_a_memory_limit_is_compared_with_is_complete(captured, monkeypatch) -> None:
    monkeypatch.setattr(Pool, "nbytes", property(lambda self: self.finished[-1] * 10))
    ladder = captured(memory_limit=15)
    assert Pool.finished[:3] == [0, 1, 2]
    assert sorted(ladder.graphs) == [0, 1], "the smallest, and the one that exceeds the limit"


@pytest.mark.parametrize("lazy", [False, True])
def test_garbage_is_collected_after_the_last_capture_and_in_no_later_one(captured, monkeypatch, lazy: bool) -> None:
    """A full collection takes longer than most requests."""
    before: list[int] = []
    capture = Pool.capture

    def noting(self, *args, **settings) -> CapturedGraph:
        before.append(full_collections())
        return capture(self, *args, **settings)

    monkeypatch.setattr(Pool, "capture", noting)
    gc.disable()
    try:
        ladder = captured(lazy=lazy)
        assert full_collections() == before[-1] + 1
        del ladder.graphs[0]
        ladder.complete, so_far = False, full_collections()
        assert not ladder.missing(0)
        assert full_collections() == so_far
    finally:
        gc.enable()


def full_collections() -> int:
    """How many there were in this process."""
    return int(gc.get_stats()[2]["collections"])


class Chosen:
    """Stands for `Gemms`: notes for which budgets algorithms are chosen, and when."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, list[int], int]] = []

    @contextmanager
    def seeing(self) -> Iterator[dict]:
        yield {}

    def choose(self, seen: dict, rows: int, budgets: Iterable[int], tell: object = None) -> None:
        captures = len(Pool.calls) if "calls" in Pool.__dict__ else 0
        self.asked.append((rows, sorted(budgets), captures))


@pytest.mark.parametrize("lazy", [False, True])
def test_algorithms_are_chosen_before_the_capture_that_needs_them(monkeypatch, lazy: bool) -> None:
    monkeypatch.setattr(module, "GraphPool", Pool)
    Pool.failures, Pool.calls = 0, []
    config, chosen = EncoderConfig(budgets=(16, 32, 64), lazy=lazy), Chosen()
    with VisionEncoder.from_config("qwen3_vl", config=config) as encoder:
        engine, attention = encoder.engine, encoder.engine.ladder._attention
        ladder = Ladder(engine.spec, engine._forward, engine.device, engine.dtype, config, attention, chosen)  # type: ignore[arg-type]
        if lazy:
            ladder.complete = False
            assert ladder.missing(2) == ladder.missing(0) == ""
        else:
            ladder.capture()
    # A ladder's budgets are of the smallest one's products; a late one is of its own.
    assert chosen.asked == ([(256, [256], 0), (64, [64], 1)] if lazy else [(64, [64, 128, 256], 0)])
    assert ladder.capture_seconds > 0


def test_kernels_are_compiled_by_the_smallest_budget_of_each_and_once(monkeypatch) -> None:
    blocks, inside, ran = {64: 1, 128: 1, 256: 2, 512: 2}, [], []

    @contextmanager
    def compiling(device: torch.device) -> Iterator[None]:
        inside.append(device)
        yield
        inside.append(None)

    monkeypatch.setattr(module, "compiling", compiling)
    monkeypatch.setattr(module, "kernel_of", lambda attention, rows, longest: blocks[rows])
    config = EncoderConfig(budgets=(16, 32, 64, 128))
    with VisionEncoder.from_config("qwen3_vl", config=config) as encoder:
        engine = encoder.engine

        def forward(buffers):
            assert inside and inside[-1] is not None
            ran.append(len(buffers.pixel_values))
            return ()

        ladder = Ladder(engine.spec, forward, engine.device, engine.dtype, config, Tiled())
        static = [ladder.static(index) for index in range(4)]
        ladder._device = torch.device("cuda", 0)
        told: list[str] = []
        ladder._settled.clear()
        ladder.settle(1)
        assert ran == [128], "one budget is asked for, whose kernel is compiled"
        ladder._settle([3, 2, 1, 0], lambda done, total, text: told.append(text))
        assert ran == [128, 256], "the other kernel is compiled by the smallest budget that runs it"
        ladder._settle([3, 2, 1, 0], lambda done, total, text: told.append(text))
    assert len(ran) == 2 and told == ["compiling kernels"]
    assert inside == [torch.device("cuda", 0), None] * 2 and len(static) == 4


class Tiled(SdpaAttention):
    """Wants tile schedules."""

    def block(self, rows: int, longest: int) -> int:
        return 16
