"""Costs from timings: what a made-up GPU shows comes out again, also at budgets that were not timed."""

from __future__ import annotations

from itertools import pairwise
from math import log

import pytest

from vitgraph import EncoderConfig, VisionEncoder
from vitgraph.core import Grid, fits, sum_counts
from vitgraph.engine.measure import REST_SHARE, large_items, long_items, measure_costs, one_item, refining, usual_items
from vitgraph.models.registry import families
from vitgraph.planning.cost import FLOOR_TOKENS, CostModel, load_of
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
        self.has_long = False
        self.beside, self.one_segment = 0.0, 1.0
        self.now, self.host, self.launch, self.seconds = 0.0, 0.0, LAUNCH, 0.0

    def clock(self) -> float:
        return self.now

    def long(self, budget: int) -> bool:
        return self.has_long

    def replay(self, budget: int, grids: list[Grid], long: bool = False) -> float:
        self.timed.append(budget)
        assert fits(self._counts(grids), self.budgets[budget].capacity)
        slope = SLOPE * (LONG if long else 1)
        slope *= self.one_segment if len(grids) == 1 else 1
        beside = self.beside if long else 0.0
        time_us = FLOOR + RATE * self.budgets[budget].capacity["patch"] + slope * self._load(grids) + beside
        before = self.taken[-1] if self.taken else 0.0
        own = (time_us + REST_SHARE * before) / 1e6
        self.seconds += own
        self.now += own + self.host
        self.taken.append(time_us)
        return time_us

    def eager(self, grids: list[Grid]) -> float:
        time_us = max(self.launch, FLOOR + RATE * self._counts(grids)["patch"] + SLOPE * self._load(grids))
        self.now += time_us / 1e6
        self.eager_rows.append(self._counts(grids)["patch"])
        return time_us

    def _counts(self, grids: list[Grid]) -> dict[str, int]:
        return sum_counts(map(self.spec.counts, grids))

    def _load(self, grids: list[Grid]) -> float:
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


@pytest.mark.parametrize("seconds", [10.0, 0.01], ids=["every budget", "a few"])
def test_the_model_predicts_what_was_not_timed(encoder: VisionEncoder, seconds: float) -> None:
    gpu = FakeGpu(encoder)
    everything = range(len(encoder.budgets))
    cost = measure_costs(encoder.spec, encoder.budgets, everything, gpu, seconds)
    assert all(cost.measured) == (seconds > 1)
    assert sum(cost.measured) >= 2
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


def test_long_items_are_long(encoder: VisionEncoder) -> None:
    encoder = VisionEncoder.from_config("qwen3_vl", device="cpu", config=EncoderConfig(max_tokens=4096))
    for budget in encoder.budgets:
        counts = [encoder.spec.counts(grid) for grid in long_items(encoder.spec, budget)]
        total = sum_counts(counts)
        assert fits(total, budget.capacity)
        assert len(counts) == max(budget.tokens // 1024, 1)
        assert encoder.spec.is_long(total)


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


def test_refining_names_everything_once_and_the_middle_of_the_widest_gap_next() -> None:
    times = [FLOOR_TOKENS + 16.0 * n for n in range(1, 33)]
    order = list(refining(range(32), times))
    assert sorted(order) == list(range(32))
    assert order[:2] == [31, 0]
    for done in range(2, 32):
        known = sorted(order[:done])
        widest = max(pairwise(known), key=lambda gap: times[gap[1]] / times[gap[0]] if gap[1] > gap[0] + 1 else 0)
        assert widest[0] < order[done] < widest[1]
        off = {at: abs(log(times[at] ** 2 / (times[widest[0]] * times[widest[1]]))) for at in range(*widest)}
        assert off[order[done]] == pytest.approx(min(off.values()))
    assert list(refining([3], times)) == [3]
    assert list(refining([2, 5], times)) == [5, 2]


@pytest.mark.parametrize("has_long", [False, True])
@pytest.mark.parametrize("seconds", [0.1, 0.2])
def test_timing_takes_no_longer_than_it_may(encoder: VisionEncoder, seconds: float, has_long: bool) -> None:
    gpu = FakeGpu(encoder)
    gpu.has_long = has_long
    cost = measure_costs(encoder.spec, encoder.budgets, range(len(encoder.budgets)), gpu, seconds)
    assert 2 < sum(cost.measured) < len(encoder.budgets)
    assert 0.6 * seconds < sum(gpu.taken[1:]) / 1e6 < 1.2 * seconds


@pytest.mark.parametrize("has_long", [False, True])
@pytest.mark.parametrize("host, launch", [(0.008, LAUNCH), (0.0, 4 * LAUNCH), (0.02, LAUNCH), (10.0, LAUNCH)])
def test_a_slow_host_has_fewer_budgets_timed(
    encoder: VisionEncoder, host: float, launch: float, has_long: bool
) -> None:
    everything, seconds, most = range(len(encoder.budgets)), 0.2, 0.55
    quick, slow = FakeGpu(encoder), FakeGpu(encoder)
    quick.has_long = slow.has_long = has_long
    slow.host, slow.launch, slow.seconds = host, launch, 100.0  # it timed others before
    usual = measure_costs(encoder.spec, encoder.budgets, everything, quick, seconds, most, quick.clock)
    just_enough, enough = 1.25 * quick.now, FakeGpu(encoder)
    enough.has_long = has_long
    tight = measure_costs(encoder.spec, encoder.budgets, everything, enough, seconds, just_enough, enough.clock)
    assert tight.measured == usual.measured
    found = measure_costs(encoder.spec, encoder.budgets, everything, slow, seconds, most, slow.clock)
    assert sum(found.measured) < sum(usual.measured)
    assert found.measured[0] and found.measured[-1]
    assert_ends_in_turn(slow)
    guessed = CostModel.guess(encoder.budgets).fixed
    order = [index for index in refining(everything, guessed) if usual.measured[index]]
    timed_last = order.index(slow.timed[-1])
    assert all(found.measured[index] for index in order[:timed_last]), "who says least is left out"
    if host < 1:
        assert 0.85 * most < slow.now < most


def test_large_segments_that_take_long_are_made_up_for(encoder: VisionEncoder) -> None:
    gpu = FakeGpu(encoder)
    gpu.has_long, gpu.one_segment, most = True, 8.0, 0.45
    everything, last = range(len(encoder.budgets)), len(encoder.budgets) - 1
    measure_costs(encoder.spec, encoder.budgets, everything, gpu, 0.2, most, gpu.clock)
    longest = [time_us for budget, time_us in zip(gpu.timed, gpu.taken, strict=True) if budget == last]
    assert max(longest) > 2.5 * longest[0], "more than a guess by the budget's size"
    assert 0.9 * most < gpu.now < most
