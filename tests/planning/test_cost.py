"""Plans by predicted time: never worse than the plain packings, and eager only where that is predicted faster."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packing_rule import RULE, grids, models
from vitgraph.config import EncoderConfig
from vitgraph.core import Grid, KnownGrid, fits
from vitgraph.planning.budgets import make_budgets
from vitgraph.planning.cost import SPLIT_US, CostModel, are_long, load_of, segments_are_long
from vitgraph.planning.packing import EAGER_IS_FASTER, Planner
from vitgraph.planning.search import Prices, best_fit, best_runs, greedy


@given(models(), st.lists(grids, min_size=1, max_size=24))
def test_a_plan_is_never_worse_than_the_plain_packings(model, items) -> None:
    budgets, cost = model
    planner = Planner(RULE, budgets, cost)
    largest = budgets[-1].capacity
    items = sorted((g for g in items if fits(RULE.counts(g), largest)), key=lambda g: -g.patches)
    if not items:
        return
    sizes = [tuple(RULE.counts(g)[kind] for kind in largest) for g in items]
    chosen = planner.predicted(planner.plan(items))
    for plain in (greedy, best_fit):
        other = 0.0
        for group in plain(sizes, tuple(largest.values())):
            load = sum(load_of(RULE.counts(items[i]), RULE.load_sets) for i in group)
            total = {kind: sum(sizes[i][k] for i in group) for k, kind in enumerate(largest)}
            smallest = next(i for i, b in enumerate(budgets) if fits(total, b.capacity))
            other += cost.replay(smallest, load, RULE.is_long(total))
        # A made-up model may predict less than nothing.
        assert chosen <= other + 1e-9 * abs(other), plain.__name__


def holds(free: list[int], size: tuple[int, ...]) -> bool:
    return all(n <= f for n, f in zip(size, free, strict=True))


def plain_best_fit(sizes: list, largest: tuple) -> list[list[int]]:
    groups: list[list[int]] = []
    room: list[list[int]] = []
    for item, size in enumerate(sizes):
        among = [g for g, free in enumerate(room) if holds(free, size)]
        if not among:
            groups.append([])
            room.append(list(largest))
            among = [len(room) - 1]
        best = min(among, key=lambda g: room[g])
        groups[best].append(item)
        room[best] = [f - n for n, f in zip(size, room[best], strict=True)]
    return groups


def plain_greedy(sizes: list, largest: tuple) -> list[list[int]]:
    groups: list[list[int]] = []
    room: list[int] = []
    for item in range(len(sizes) - 1, -1, -1):
        if not groups or not holds(room, sizes[item]):
            groups.append([])
            room = list(largest)
        groups[-1].append(item)
        room = [f - n for n, f in zip(sizes[item], room, strict=True)]
    return groups


some_sizes = st.lists(st.tuples(*[st.one_of(st.integers(0, 9), st.integers(0, 1 << 40))] * 3), min_size=1, max_size=24)


@given(some_sizes, st.tuples(*[st.integers(0, 20)] * 3))
def test_sizes_as_numbers_pack_as_sizes_kind_by_kind_do(sizes, spare) -> None:
    largest = tuple(max(size[k] for size in sizes) + spare[k] for k in range(3))
    assert best_fit(sizes, largest) == plain_best_fit(sizes, largest)
    assert greedy(sizes, largest) == plain_greedy(sizes, largest)


@given(models(), st.lists(grids, min_size=1, max_size=4), st.tuples(st.floats(1, 9000), st.floats(1, 9000)))
def test_what_is_settled_for_a_budget_is_what_every_pack_would_find(model, items, eager) -> None:
    budgets, cost = model
    cost = replace(cost, eager_rows=(cost.rows[0], cost.rows[-1] + 1), eager_time=eager)
    quick, thorough = Planner(RULE, budgets, cost), Planner(RULE, budgets, cost)
    thorough._prices.settled = dict.fromkeys((True, False), [float("inf")] * len(budgets))
    for may_run_eager in (True, False):
        assert quick.plan(items, eager=may_run_eager) == thorough.plan(items, eager=may_run_eager)


@st.composite
def uneven_costs(draw: st.DrawFn) -> CostModel:
    """Costs that nothing but their order of rows ties together."""
    budgets, knots = draw(st.integers(1, 4)), draw(st.integers(0, 4))

    def times(count: int, most: float) -> tuple[float, ...]:
        return tuple(draw(st.lists(st.floats(0, most), min_size=count, max_size=count)))

    def rows(count: int) -> tuple[int, ...]:
        return tuple(sorted(draw(st.sets(st.integers(1, 60), min_size=count, max_size=count))))

    return CostModel(
        times(budgets, 100), times(budgets, 1), rows(budgets), rows(knots), times(knots, 150),
        long_slope=times(budgets, 1), long_fixed=times(budgets, 20),
    )  # fmt: skip


@given(uneven_costs(), st.floats(0.5, 1.0))
def test_what_a_budget_is_settled_from_holds_for_every_load(cost, margin) -> None:
    for budget, most in enumerate(cost.rows):
        for rows in range(most + 1):
            for load, long in product((0.0, 1.0, 1e6), (False, True)):
                if rows >= cost.settled_from(budget, None):
                    assert cost.cheapest(budget, load, long)[0] == budget
                if rows >= cost.settled_from(budget, margin):
                    assert cost.cheapest(budget, load, long)[0] == budget
                    assert cost.eager(rows, load, long) >= margin * cost.replay(budget, load, long) * (1 - 1e-9) - 1e-9


def test_packs_of_few_rows_may_run_eager_where_others_are_settled() -> None:
    budgets = ladder(64, 512)
    curve = (1, 256, 257, 2048), (1000.0, 1000.0, 3000.0, 3200.0)
    cost = CostModel((2000.0, 2500.0), (1e-6,) * 2, rows_of(budgets), *curve)
    assert [cost.settled_from(budget, 0.97) for budget in (0, 1)] == [float("inf"), 257]
    assert [cost.settled_from(budget, None) for budget in (0, 1)] == [0, 0]
    planner = Planner(RULE, budgets, cost)
    (large,), (many,) = planner.plan([Grid(1, 32, 32)]), planner.plan([Grid(1, 2, 2)] * 5)
    assert (large.budget, many.budget, many.reason) == (1, None, EAGER_IS_FASTER)
    assert [pack.budget for pack in planner.plan([Grid(1, 2, 2)] * 5, eager=False)] == [1]
    faster, slower = (replace(cost, fixed=(time, time + 10.0)) for time in (1000.0, 3500.0))
    assert [faster.settled_from(budget, 0.97) for budget in (0, 1)] == [0, 0]
    assert [slower.settled_from(budget, 0.97) for budget in (0, 1)] == [float("inf")] * 2
    dip = replace(cost, eager_rows=(1, 600, 2048), eager_time=(3000.0, 1000.0, 3000.0))
    assert dip.settled_from(1, 0.97) == float("inf")


@given(models(), st.lists(grids, min_size=1, max_size=7))
def test_runs_are_the_cheapest_cut_of_the_sorted_items(model, items) -> None:
    budgets, cost = model
    largest = budgets[-1].capacity
    items = sorted((g for g in items if fits(RULE.counts(g), largest)), key=lambda g: -g.patches)
    if not items:
        return
    table = np.array([[RULE.counts(g)[kind] for kind in largest] for g in items])
    loads = np.array([load_of(RULE.counts(g), RULE.load_sets) for g in items])
    columns = [[b.capacity[kind] for b in budgets] for kind in largest]
    prices = Prices(cost, columns, 0, [(0, 3)])

    def price(cuts) -> float:
        ends = [0, *cuts, len(items)]
        spans = [slice(a, b) for a, b in pairwise(ends)]
        return float(
            prices.of(np.stack([table[s].sum(0) for s in spans]), np.array([loads[s].sum() for s in spans])).sum()
        )

    inner = range(1, len(items))
    every = [price(cuts) for n in range(len(items)) for cuts in combinations(inner, n)]
    runs = best_runs(prices, table, loads)
    assert [i for run in sorted(runs) for i in run] == list(range(len(items)))
    assert price(sorted(run[0] for run in runs)[1:]) == pytest.approx(min(every))


@given(models(), st.lists(grids, min_size=1, max_size=12))
def test_no_plan_costs_less_than_the_bound(model, items) -> None:
    budgets, cost = model
    planner = Planner(RULE, budgets, cost)
    known = [own for own in map(planner.known, items) if own.fits]
    if known:
        assert bound_of(planner, known) <= planner.predicted(planner.plan([own.grid for own in known])) + 1e-6


@pytest.mark.parametrize("beside", [-20.0, -150.0])
def test_nor_do_packs_of_long_segments_that_take_less_than_their_budget(beside: float) -> None:
    budgets = ladder(64, 512)
    cost = CostModel((100.0, 600.0), (0.0, 0.0), rows_of(budgets), long_slope=(0.0, 0.0), long_fixed=(beside,) * 2)
    planner = Planner(RULE, budgets, cost)
    for items in ([Grid(1, 2, 2)], [Grid(1, 16, 16)] * 2):
        assert bound_of(planner, [*map(planner.known, items)]) <= planner.predicted(planner.plan(items))


def test_the_bound_is_what_budgets_cost_that_hold_the_rows() -> None:
    budgets = make_budgets(RULE, EncoderConfig(budgets=(64, 256)))
    planner = Planner(RULE, budgets, CostModel((100.0, 250.0), (0.0, 0.0), (256, 1024)))
    for rows, least in ((4, 100), (256, 100), (512, 200), (1024, 250), (1280, 350), (2048, 500), (4096, 1000)):
        assert bound_of(planner, [planner.known(Grid(1, 2, rows // 2))]) == least
    assert bound_of(planner, [planner.known(Grid(1, 2, 20480))]) == 10000, "by the rate per row"


def bound_of(planner: Planner, known: list[KnownGrid]) -> float:
    return planner._prices.bound(np.array([own.size for own in known]), np.array([float(own.load) for own in known]))


def ladder(*tokens: int) -> tuple:
    return make_budgets(RULE, EncoderConfig(budgets=tokens))


def rows_of(budgets) -> tuple[int, ...]:
    return tuple(b.capacity["patch"] for b in budgets)


def test_the_search_prices_long_segments_as_plans_are_priced() -> None:
    budgets = ladder(64, 4096)
    cost = CostModel((100.0, 1000.0), (1e-3, 2e-3), rows_of(budgets), long_slope=(1e-4, 5e-4))
    kinds = list(budgets[-1].capacity)
    columns = [[b.capacity[kind] for b in budgets] for kind in kinds]
    prices = Prices(cost, columns, 0, [(0, kinds.index("segment"))])
    for items in ([Grid(1, 8, 8)], [Grid(1, 8, 8)] * 2, [Grid(1, 64, 64)] * 3, [Grid(1, 64, 64), Grid(1, 8, 8)]):
        counts = [RULE.counts(grid) for grid in items]
        total = np.array([[sum(c[kind] for c in counts) for kind in kinds]])
        load = sum(load_of(c, RULE.load_sets) for c in counts)
        index = next(i for i, b in enumerate(budgets) if sum(c["token"] for c in counts) <= b.tokens)
        want = cost.replay(index, load, RULE.is_long(dict(zip(kinds, total[0], strict=True))))
        assert prices.of(total, np.array([load])).tolist() == pytest.approx([want])


def test_long_segments_are_told_from_counts() -> None:
    rows, segments = np.array([0, 100, 6144, 6144, 9000]), np.array([0, 1, 2, 3, 2])
    want = [False, True, True, False, True]
    assert are_long((rows, segments)).tolist() == want
    assert [bool(are_long((int(r), int(s)))) for r, s in zip(rows, segments, strict=True)] == want
    assert [segments_are_long(int(r), int(s)) for r, s in zip(rows, segments, strict=True)] == want
    assert not are_long((9000, 1), (9000, 9)) and are_long()


def test_a_wide_gap_in_the_ladder_is_filled_by_two_replays() -> None:
    budgets = ladder(64, 512)
    cost = CostModel((100.0, 1000.0), (0.0, 0.0), rows_of(budgets))
    items = [Grid(1, 16, 16), Grid(1, 16, 16)]
    assert cost.splitting_helps(1)
    assert [pack.budget for pack in Planner(RULE, budgets, cost).plan(items)] == [0, 0]
    even = CostModel((100.0, 150.0), (0.0, 0.0), rows_of(budgets))
    assert not even.splitting_helps(1)
    assert [pack.budget for pack in Planner(RULE, budgets, even).plan(items)] == [1]
    slight = CostModel((100.0, 204.0), (0.0, 0.0), rows_of(budgets))
    assert not slight.splitting_helps(1), "2 % are within the noise of timings"
    assert not replace(slight, unit="token").splitting_helps(1)
    assert not replace(slight, fixed=(50_000.0, 102_000.0)).splitting_helps(1), "however long 2 % are"
    assert replace(slight, fixed=(50_000.0, 104_000.0)).splitting_helps(1)


def test_a_batch_is_split_only_for_more_time_than_the_search_takes() -> None:
    rows = rows_of(ladder(64, 512))
    little = CostModel((1000.0, 2000.0 + SPLIT_US), (0.0, 0.0), rows)
    assert not little.splitting_helps(1)
    assert replace(little, unit="token").splitting_helps(1), "a guess tells no microseconds"
    assert replace(little, fixed=(1000.0, 2001.0 + SPLIT_US)).splitting_helps(1)


def test_a_larger_budget_is_taken_where_it_is_cheaper() -> None:
    budgets = ladder(64, 80, 512)
    cost = CostModel((200.0, 150.0, 900.0), (0.0,) * 3, rows_of(budgets))
    (pack,) = Planner(RULE, budgets, cost).plan([Grid(1, 8, 8)])
    assert pack.budget == 1


def test_eager_runs_only_where_it_is_predicted_faster() -> None:
    budgets = ladder(64, 512)
    cost = CostModel((100.0, 5000.0), (0.0, 0.0), rows_of(budgets), (0, 2048), (1000.0, 3000.0))
    planner = Planner(RULE, budgets, cost)
    (small,) = planner.plan([Grid(1, 8, 8)])
    assert small.budget == 0
    (large,) = planner.plan([Grid(1, 32, 32)])
    assert (large.budget, large.reason) == (None, EAGER_IS_FASTER)
    assert planner.predicted([large]) == pytest.approx(2000.0)
    near = CostModel((100.0, 2050.0), (0.0, 0.0), rows_of(budgets), (0, 2048), (1000.0, 3000.0))
    (replayed,) = Planner(RULE, budgets, near).plan([Grid(1, 32, 32)])
    assert replayed.budget == 1, "a gain within the margin is no reason"
    (kept,) = planner.plan([Grid(1, 32, 32)], eager=False)
    assert kept.budget == 1
    assert cost.crossover == 2048


def test_load_is_the_sum_of_squared_segments() -> None:
    cost = CostModel((100.0,), (1e-3,), (1024,))
    assert load_of(RULE.counts(Grid(1, 32, 32)), RULE.load_sets) == 1024**2
    assert load_of(RULE.counts(Grid(4, 16, 16)), RULE.load_sets) == 4 * 256**2
    assert cost.replay(0, 1024**2) == pytest.approx(100.0 + 1048.576)


def test_eager_beyond_the_measured_curve_goes_on_at_its_last_rate() -> None:
    cost = CostModel((1.0,), (0.0,), (64,), (100, 200), (10.0, 30.0))
    assert cost.eager(150, 0.0) == pytest.approx(20.0)
    assert cost.eager(300, 0.0) == pytest.approx(50.0)
    assert CostModel((1.0,), (0.0,), (64,)).eager(10, 0.0) == float("inf")


def test_plans_follow_the_costs() -> None:
    budgets = ladder(64, 80)
    planner = Planner(RULE, budgets)
    assert planner.plan([Grid(1, 8, 8)])[0].budget == 0
    planner.cost = CostModel((200.0, 100.0), (0.0, 0.0), rows_of(budgets))
    assert planner.plan([Grid(1, 8, 8)])[0].budget == 1
