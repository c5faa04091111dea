"""Costs from timings: what a made-up GPU shows comes out again, also at budgets that were not timed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from vitgraph import EncoderConfig, VisionEncoder
from vitgraph.core import Grid, fits, sum_counts
from vitgraph.engine import measure
from vitgraph.engine.agenda import LARGE_TAKES, REST_SHARE, Runs, refining, worth_timing
from vitgraph.engine.fillings import large_items, long_fillings, long_items, one_item, usual_items
from vitgraph.engine.measure import measure_costs
from vitgraph.models.registry import families
from vitgraph.planning.budgets import Budget
from vitgraph.planning.cost import load_of
from vitgraph.planning.packing import EAGER_IS_FASTER, Planner

FLOOR, RATE, SLOPE, LAUNCH = 900.0, 2.0, 3e-4, 8000.0
LONG, BESIDE = 0.8, 700.0


class FakeGpu:
    """Replays take a floor, a rate per row of the budget and attention; eager runs wait for the host.

    Its clock counts them, the rests before them, and `host` seconds beside each.
    """

    def __init__(self, encoder: VisionEncoder) -> None:
        self.spec, self.budgets = encoder.spec, encoder.budgets
        self.timed: list[int] = []
        self.taken: list[float] = []
        self.eager_rows: list[int] = []
        self.has_long, self.long_from = False, 0
        self.beside, self.one_segment, self.fitting = 0.0, 1.0, 1.0
        self.first_eager, self.slow_above = 1.0, float("inf")
        self.filled: list[tuple[int, int, bool]] = []
        self.now, self.host, self.launch, self.seconds, self.replays = 0.0, 0.0, LAUNCH, 0.0, 0

    def clock(self) -> float:
        return self.now

    def long(self, budget: int) -> bool:
        return self.has_long and budget >= self.long_from

    def replay(self, budget: int, grids: list[Grid], long: bool = False) -> float:
        self.timed.append(budget)
        self.filled.append((budget, self._load(grids), long))
        assert fits(self._counts(grids), self.budgets[budget].capacity)
        assert self.long(budget) or not long, "no such graph"
        slope = SLOPE * (LONG if long else 1)
        slope *= self.one_segment if len(grids) == 1 else 1
        # Large images happen to fill every third budget to the last tile.
        slope *= self.fitting if budget % 3 == 0 and max(grid.patches for grid in grids) > 800 else 1
        beside = self.beside if long else 0.0
        time_us = FLOOR + RATE * self.budgets[budget].capacity["patch"] + slope * self._load(grids) + beside
        time_us *= 1.1 if time_us > self.slow_above else 1.0
        before = self.taken[-1] if self.taken else 0.0
        own = (time_us + REST_SHARE * before) / 1e6
        self.seconds += own
        self.replays += 1
        self.now += own + self.host
        self.taken.append(time_us)
        return time_us

    def eager(self, grids: list[Grid]) -> float:
        time_us = max(self.launch, FLOOR + RATE * self._counts(grids)["patch"] + SLOPE * self._load(grids))
        time_us *= 1.0 if self.eager_rows else self.first_eager
        self.now += time_us / 1e6
        self.eager_rows.append(self._counts(grids)["patch"])
        return time_us

    def _counts(self, grids: list[Grid]) -> dict[str, int]:
        return sum_counts(map(self.spec.counts, grids))

    def _load(self, grids: list[Grid]) -> int:
        return sum(load_of(self.spec.counts(grid), self.spec.load_sets) for grid in grids)


@pytest.fixture
def encoder() -> VisionEncoder:
    return VisionEncoder.from_config("qwen3_vl", device="cpu", config=EncoderConfig(max_tokens=1024))


def assert_ends_in_turn(gpu: FakeGpu) -> None:
    """The largest budget, whose time beyond its guess is made up for; then small ones between large ones, several of
    which would lower the clock."""
    largest, *others = dict.fromkeys(gpu.timed)
    small, large = others[::2], others[1::2]
    assert [*small, *reversed(large), largest] == [*sorted(others), len(gpu.budgets) - 1]


def expected(gpu: FakeGpu) -> dict[int, float]:
    """What the two budgets that were timed first tell about all of them: a line by rows."""
    rows = [budget.capacity["patch"] for budget in gpu.budgets]
    longest, shortest = gpu.taken[:2]
    return {i: shortest + (longest - shortest) * (n - rows[0]) / (rows[-1] - rows[0]) for i, n in enumerate(rows)}


@pytest.mark.parametrize("seconds", [10.0, 0.01], ids=["every budget", "a few"])
def test_the_model_predicts_what_was_not_timed(encoder: VisionEncoder, seconds: float) -> None:
    gpu = FakeGpu(encoder)
    everything = range(len(encoder.budgets))
    cost = measure_costs(encoder.spec, encoder.budgets, everything, gpu, seconds)
    assert all(cost.measured) == (seconds > 1)
    assert sum(cost.measured) >= 2
    assert len(set(gpu.filled)) == len(gpu.filled), "nothing is timed twice"
    assert_ends_in_turn(gpu)
    assert gpu.eager_rows == sorted(gpu.eager_rows, reverse=True), "replays follow what leaves the GPU idle"
    for index, budget in enumerate(encoder.budgets):
        for filling in (usual_items, large_items, one_item):
            grids = filling(encoder.spec, budget)
            load = gpu._load(grids)
            assert cost.replay(index, load) == pytest.approx(gpu.replay(index, grids), rel=0.01)
        small = [Grid(1, 8, 8)]
        assert cost.replay(index, gpu._load(small)) == pytest.approx(gpu.replay(index, small), rel=0.01)
    assert cost.eager(128, 0.0) == pytest.approx(LAUNCH, rel=0.05)


def test_the_slope_is_that_of_several_budgets(encoder: VisionEncoder) -> None:
    gpu = FakeGpu(encoder)
    gpu.fitting = 0.7
    cost = measure_costs(encoder.spec, encoder.budgets, range(len(encoder.budgets)), gpu, 10.0)
    last = len(encoder.budgets) - 1
    largest = [n for n in dict.fromkeys(gpu.timed) if gpu.timed.count(n) > 1 and n > last - 10]
    assert {n % 3 for n in largest} == {0, 1, 2}
    for index in largest:
        assert 0.7 * SLOPE < cost.slope[index] < SLOPE
    assert cost.slope[last] == pytest.approx(0.9 * SLOPE, rel=0.05)


def test_a_first_eager_run_does_not_count(encoder: VisionEncoder) -> None:
    gpu = FakeGpu(encoder)
    gpu.first_eager = 5.0
    cost = measure_costs(encoder.spec, encoder.budgets, range(len(encoder.budgets)), gpu, 10.0)
    assert max(cost.eager_time) < 2 * max(LAUNCH, cost.fixed[-1])


def test_budgets_of_one_graph_have_one_slope(encoder: VisionEncoder) -> None:
    gpu = FakeGpu(encoder)
    gpu.has_long, gpu.long_from, gpu.beside = True, 20, BESIDE
    cost = measure_costs(encoder.spec, encoder.budgets, range(len(encoder.budgets)), gpu, 10.0)
    assert cost.long_slope[:20] == cost.slope[:20]
    assert not any(cost.long_fixed[:20])
    assert min(cost.long_fixed[20:]) == pytest.approx(BESIDE, rel=0.05)
    assert cost.long_slope[20:] == pytest.approx([LONG * SLOPE] * len(cost.slope[20:]), rel=0.01)


def test_packs_of_one_segment_have_a_slope_of_their_own(encoder: VisionEncoder) -> None:
    gpu = FakeGpu(encoder)
    gpu.has_long = True
    cost = measure_costs(encoder.spec, encoder.budgets, range(len(encoder.budgets)), gpu, 10.0)
    for index in (-1, 20, 5):
        index %= len(encoder.budgets)
        grids = one_item(encoder.spec, encoder.budgets[index])
        load = gpu._load(grids)
        assert cost.replay(index, load) == pytest.approx(gpu.replay(index, grids), rel=0.01)
        assert cost.replay(index, load, long=True) == pytest.approx(gpu.replay(index, grids, long=True), rel=0.01)
    largest = encoder.budgets[-1]
    packs = Planner(encoder.spec, encoder.budgets, cost).plan(one_item(encoder.spec, largest))
    predicted = Planner(encoder.spec, encoder.budgets, cost).predicted(packs)
    assert predicted < cost.replay(len(encoder.budgets) - 1, float(largest.capacity["patch"]) ** 2)


def test_packs_of_several_long_segments_may_gain_less_than_one(encoder: VisionEncoder) -> None:
    encoder = VisionEncoder.from_config("qwen3_vl", device="cpu", config=EncoderConfig(max_tokens=4096))
    gpu = FakeGpu(encoder)
    gpu.has_long, gpu.beside = True, BESIDE
    cost = measure_costs(encoder.spec, encoder.budgets, range(len(encoder.budgets)), gpu, 10.0)
    last = len(encoder.budgets) - 1
    assert cost.long_fixed[last] == pytest.approx(BESIDE, rel=0.01)
    for index in (i for i, budget in enumerate(encoder.budgets) if budget.tokens >= 2048):
        for filling in (long_items, one_item):
            grids = filling(encoder.spec, encoder.budgets[index])
            want = gpu.replay(index, grids, long=True)
            assert cost.replay(index, gpu._load(grids), long=True) == pytest.approx(want, rel=0.02)
    assert min(cost.long_fixed) >= 0


def test_packs_of_several_long_segments_may_gain_more_than_one(encoder: VisionEncoder) -> None:
    encoder = VisionEncoder.from_config("qwen3_vl", device="cpu", config=EncoderConfig(max_tokens=4096))
    gpu = FakeGpu(encoder)
    gpu.has_long, gpu.beside = True, -BESIDE
    cost = measure_costs(encoder.spec, encoder.budgets, range(len(encoder.budgets)), gpu, 10.0)
    assert set(cost.long_fixed) == {0.0}, "no pack may seem to cost less than nothing"
    last = len(encoder.budgets) - 1
    several, one = (filling(encoder.spec, encoder.budgets[last]) for filling in (long_items, one_item))
    off = [cost.replay(last, gpu._load(g), long=True) - gpu.replay(last, g, long=True) for g in (several, one)]
    assert min(off) < 0 < max(off), "between them"


def test_one_slow_replay_of_a_long_segment_changes_others_by_little(encoder: VisionEncoder) -> None:
    encoder = VisionEncoder.from_config("qwen3_vl", device="cpu", config=EncoderConfig(max_tokens=4096))
    gpu = FakeGpu(encoder)
    gpu.has_long, gpu.beside, gpu.slow_above = True, BESIDE, 90e3
    cost = measure_costs(encoder.spec, encoder.budgets, range(len(encoder.budgets)), gpu, 10.0)
    assert sum(time_us > 90e3 for time_us in gpu.taken) == 1
    half = next(index for index, budget in enumerate(encoder.budgets) if budget.tokens == 2048)
    grids = one_item(encoder.spec, encoder.budgets[half])
    want = gpu.replay(half, grids, long=True)
    assert cost.long_fixed[-1] > 0.9 * BESIDE
    assert cost.replay(half, gpu._load(grids), long=True) == pytest.approx(want, rel=0.015)


def test_what_is_planned_is_timed(monkeypatch) -> None:
    encoder = VisionEncoder.from_config("qwen3_vl", device="cpu", config=EncoderConfig(max_tokens=4096))
    planned: dict[int, Runs] = {}

    def plan(*arguments: Any) -> dict[int, Runs]:
        planned.update(worth_timing(*arguments))
        return planned

    monkeypatch.setattr(measure, "worth_timing", plan)
    gpu = FakeGpu(encoder)
    gpu.has_long, gpu.long_from = True, 20
    measure_costs(encoder.spec, encoder.budgets, range(len(encoder.budgets)), gpu, 10.0, 60.0)
    assert {runs.long for runs in planned.values()} == {0, 1, 2}
    for index, runs in planned.items():
        in_second_graph = [long for budget, _, long in gpu.filled if budget == index]
        assert len(in_second_graph) == 1 + runs.large + runs.long
        assert sum(in_second_graph) == runs.long


def test_long_items_are_long(encoder: VisionEncoder) -> None:
    encoder = VisionEncoder.from_config("qwen3_vl", device="cpu", config=EncoderConfig(max_tokens=4096))
    for budget in encoder.budgets:
        counts = [encoder.spec.counts(grid) for grid in long_items(encoder.spec, budget)]
        total = sum_counts(counts)
        assert fits(total, budget.capacity)
        assert len(counts) == max(budget.tokens // 1024, 1)
        assert encoder.spec.is_long(total)
        one, *several = long_fillings(encoder.spec, budget)
        assert one == one_item(encoder.spec, budget)
        assert several == ([long_items(encoder.spec, budget)] if budget.tokens >= 2048 else [])
    unmerged = replace(encoder.spec, merge=1)
    budget = Budget(4096, unmerged.capacity(4096, 64, 64))
    assert len(long_items(unmerged, budget)) == 4
    assert long_fillings(unmerged, budget) == [one_item(unmerged, budget)], "items of a thousand rows are not long"


def test_budgets_without_a_graph_cost_what_eager_costs(encoder: VisionEncoder) -> None:
    gpu = FakeGpu(encoder)
    captured = range(5)
    cost = measure_costs(encoder.spec, encoder.budgets, captured, gpu, 10.0)
    assert set(gpu.timed) == set(captured)
    assert cost.fixed[10] > cost.fixed[4]
    grids = one_item(encoder.spec, encoder.budgets[10])
    (pack,) = Planner(encoder.spec, encoder.budgets, cost).plan(grids)
    assert pack.reason in ("", EAGER_IS_FASTER)
    many = [Grid(1, 8, 8)] * 20
    packs = Planner(encoder.spec, encoder.budgets, cost).plan(many)
    assert len(packs) > 1
    assert all(pack.budget is not None and pack.budget < 5 for pack in packs), "several graphs beat one eager run"


@pytest.mark.parametrize("family", [family.name for family in families()])
def test_budgets_of_every_family_can_be_filled(family: str) -> None:
    encoder = VisionEncoder.from_config(family, device="cpu")
    for budget in encoder.budgets:
        grids = usual_items(encoder.spec, budget)
        assert grids
        counts = [encoder.spec.counts(grid) for grid in grids]
        assert sum(c["token"] for c in counts) > 0.8 * budget.tokens
        assert fits(sum_counts(counts), budget.capacity)


@pytest.mark.parametrize("has_long", [False, True])
@pytest.mark.parametrize("seconds", [0.1, 0.2])
def test_timing_takes_no_longer_than_it_may(encoder: VisionEncoder, seconds: float, has_long: bool) -> None:
    gpu = FakeGpu(encoder)
    gpu.has_long = has_long
    cost = measure_costs(encoder.spec, encoder.budgets, range(len(encoder.budgets)), gpu, seconds)
    assert 2 < sum(cost.measured) < len(encoder.budgets)
    assert 0.6 * seconds < sum(gpu.taken) / 1e6 < 1.2 * seconds


@pytest.mark.parametrize("has_long", [False, True])
@pytest.mark.parametrize("host, launch", [(0.008, LAUNCH), (0.0, 7 * LAUNCH), (0.02, LAUNCH), (10.0, LAUNCH)])
def test_a_slow_host_has_fewer_budgets_timed(
    encoder: VisionEncoder, host: float, launch: float, has_long: bool
) -> None:
    everything, seconds, most = range(len(encoder.budgets)), 0.2, 0.55
    quick, slow = FakeGpu(encoder), FakeGpu(encoder)
    quick.has_long = slow.has_long = has_long
    slow.host, slow.launch, slow.seconds, slow.replays = host, launch, 100.0, 1000  # it timed others before
    usual = measure_costs(encoder.spec, encoder.budgets, everything, quick, seconds, most, quick.clock)
    just_enough, enough = 1.25 * quick.now, FakeGpu(encoder)
    enough.has_long = has_long
    tight = measure_costs(encoder.spec, encoder.budgets, everything, enough, seconds, just_enough, enough.clock)
    assert tight.measured == usual.measured
    found = measure_costs(encoder.spec, encoder.budgets, everything, slow, seconds, most, slow.clock)
    assert sum(found.measured) < sum(usual.measured)
    assert found.measured[0] and found.measured[-1]
    assert_ends_in_turn(slow)
    order = [index for index in refining(expected(slow)) if usual.measured[index]]
    timed_last = order.index(slow.timed[-1])
    assert all(found.measured[index] for index in order[:timed_last]), "who says least is left out"
    if host < 1:
        assert 0.85 * most < slow.now < most


def test_large_segments_that_take_long_are_made_up_for(encoder: VisionEncoder) -> None:
    gpu = FakeGpu(encoder)
    gpu.has_long, gpu.one_segment, most = True, 12.0, 0.3
    everything = range(len(encoder.budgets))
    measure_costs(encoder.spec, encoder.budgets, everything, gpu, 0.2, most, gpu.clock)
    guess = expected(gpu)
    times_guess = [time_us / guess[budget] for budget, time_us in zip(gpu.timed, gpu.taken, strict=True)]
    assert max(times_guess) > 1.5 * LARGE_TAKES, "more than a guess by the budget's size"
    assert 0.9 * most < gpu.now < most
