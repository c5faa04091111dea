"""Packing: nothing lost, nothing split without need, limits held, order restored."""

from __future__ import annotations

from collections import defaultdict
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packing_rule import Rule
from vitgraph.config import EncoderConfig
from vitgraph.core import Grid, Pack, Piece, fits, sum_counts
from vitgraph.errors import PatchError
from vitgraph.planning.budgets import make_budgets
from vitgraph.planning.packing import Planner

grids = st.builds(lambda t, h, w: Grid(t, 2 * h, 2 * w), st.integers(1, 12), st.integers(1, 20), st.integers(1, 20))
ladders = st.lists(st.integers(1, 800), min_size=1, max_size=8)
limits = st.one_of(st.none(), st.integers(1, 12))


@given(st.lists(grids, max_size=30), ladders, limits, limits, st.booleans())
def test_every_item_runs_once_within_every_limit(items, ladder, max_items, max_frames, splits) -> None:
    rule = Rule(splits)
    config = EncoderConfig(budgets=tuple(ladder), max_items=max_items, max_frames=max_frames)
    budgets = make_budgets(rule, config)
    packs = Planner(rule, budgets).plan(items)

    frames = defaultdict(list)
    for pack in packs:
        total = sum_counts(rule.counts(piece.grid) for piece in pack.pieces)
        for piece in pack.pieces:
            frames[piece.item] += range(piece.first_frame, piece.first_frame + piece.grid.t)
            assert piece.grid[1:] == items[piece.item][1:]
        assert pack.counts == total
        if pack.budget is None:
            assert pack.reason
            assert len(pack.pieces) == 1
        else:
            assert fits(total, budgets[pack.budget].capacity)
            assert not any(fits(total, smaller.capacity) for smaller in budgets[: pack.budget])
        assert list(pack.pieces) == sorted(pack.pieces)

    assert sorted(frames) == list(range(len(items)))
    assert all(sorted(seen) == list(range(items[item].t)) for item, seen in frames.items())


@given(st.lists(grids, max_size=30), ladders, st.booleans())
def test_a_pack_knows_where_its_rows_lie_in_those_of_the_batch(items, ladder, splits) -> None:
    rule = Rule(splits)
    planner = Planner(rule, make_budgets(rule, EncoderConfig(budgets=tuple(ladder))))
    starts = [0, *accumulate(grid.patches for grid in items)]
    for pack in planner.plan(items):
        rows = []
        for item, grid, first_frame in pack.pieces:
            first = starts[item] + first_frame * grid.h * grid.w
            rows += range(first, first + grid.patches)
        assert [row for first, count in pack.stretches for row in range(first, first + count)] == rows
        ends = [first + count for first, count in pack.stretches]
        assert all(end != first for end, (first, _) in zip(ends, pack.stretches[1:], strict=False))
        assert all(count for _, count in pack.stretches)


@given(st.lists(grids, max_size=30), ladders)
def test_items_that_fit_stay_whole_and_leave_the_graph_only_when_they_must(items, ladder) -> None:
    rule = Rule()
    budgets = make_budgets(rule, EncoderConfig(budgets=tuple(ladder)))
    largest = budgets[-1].capacity
    for pack in Planner(rule, budgets).plan(items):
        for piece in pack.pieces:
            whole = items[piece.item]
            if fits(rule.counts(whole), largest):
                assert piece.grid == whole
            one_frame = rule.counts(Grid(1, whole.h, whole.w))
            assert (pack.budget is None) == (not fits(one_frame, largest))


def test_clips_whose_frames_depend_on_each_other_are_not_cut() -> None:
    rule = Rule(splits_by_frame=False)
    budgets = make_budgets(rule, EncoderConfig(budgets=(64,)))
    (pack,) = Planner(rule, budgets).plan([Grid(9, 8, 8)])
    assert pack.budget is None
    assert "patch+token+segment" in pack.reason


def test_small_items_share_a_pack_and_keep_the_callers_order() -> None:
    rule = Rule()
    budgets = make_budgets(rule, EncoderConfig(budgets=(64, 256)))
    items = [Grid(1, 4, 4), Grid(1, 20, 20), Grid(1, 6, 4)]
    (pack,) = Planner(rule, budgets).plan(items)
    assert [piece.item for piece in pack.pieces] == [0, 1, 2]
    assert budgets[pack.budget].tokens == 256


@pytest.mark.parametrize("grid", [Grid(1, 1 << 30, 1 << 30), Grid(1 << 30, 1 << 30, 1 << 40)])
def test_a_grid_beyond_all_sums_is_refused(grid: Grid) -> None:
    rule = Rule()
    planner = Planner(rule, make_budgets(rule, EncoderConfig()))
    with pytest.raises(PatchError, match=f"{grid.t}x{grid.h}x{grid.w} has {grid.patches} patches"):
        planner.plan([Grid(1, 4, 4), grid])


def test_a_batch_beyond_all_requests_is_refused() -> None:
    rule = Rule()
    planner = Planner(rule, make_budgets(rule, EncoderConfig()))
    grid = Grid(1, 1 << 15, 1 << 15)
    assert [pack.counts["patch"] for pack in planner.plan([grid])] == [1 << 30]
    with pytest.raises(PatchError, match=f"2 items have {1 << 31} patches: .*Plan fewer"):
        planner.plan([grid] * 2)


@pytest.mark.parametrize("sides", [[16, 16, 16, 16], [16, 16, 16, 16, 2], [32, 32]])
def test_what_the_largest_budget_cannot_hold_runs_in_several_packs(sides: list[int]) -> None:
    rule = Rule()
    budgets = make_budgets(rule, EncoderConfig(budgets=(64, 256)))
    planner = Planner(rule, budgets)
    items = [Grid(1, side, side) for side in sides]
    rows = sum(grid.patches for grid in items)
    batch = planner.batch_of([planner.known(grid) for grid in items])
    assert list(planner.packs(batch, rows=rows)) == planner.plan(batch) == planner.plan(items)
    with pytest.raises(PatchError, match=f"{rows + 1} rows, but the grids hold {rows} "):
        next(planner.packs(batch, rows=rows + 1))
    assert (len(planner.plan(batch)) == 1) == (rows <= 1024)


def test_without_budgets_rows_are_counted_as_well() -> None:
    planner = Planner(Rule(), ())
    batch = planner.batch_of([planner.known(grid) for grid in (Grid(1, 4, 4), Grid(2, 6, 4))])
    assert [pack.reason for pack in planner.packs(batch, rows=64)] == ["no budgets"] * 2
    with pytest.raises(PatchError, match="65 rows, but the grids hold 64"):
        next(planner.packs(batch, rows=65))


def test_without_items_there_is_no_pack() -> None:
    rule = Rule()
    planner = Planner(rule, make_budgets(rule, EncoderConfig()))
    assert planner.plan([]) == [] == list(planner.packs([], rows=0))
    with pytest.raises(PatchError, match="4 rows, but the grids hold 0"):
        next(planner.packs([], rows=4))


def test_a_batch_that_is_one_pack_makes_its_pieces_when_they_are_asked_for() -> None:
    rule = Rule()
    budgets = make_budgets(rule, EncoderConfig(budgets=(64, 256)))
    planner = Planner(rule, budgets)
    items = planner.batch((Grid(1, 4, 4), Grid(2, 6, 4)))
    (pack,) = planner.plan(items)
    assert "pieces" not in vars(pack) and pack.grids == items
    assert pack.pieces == (Piece(0, items[0]), Piece(1, items[1]))
    assert pack == Pack(pack.pieces, pack.counts, pack.budget)
    assert pack.counts["patch"] == 64
    for some, rows in ((items, 64), (planner.batch(items[:1]), 16)):
        with pytest.raises(PatchError, match=f"7 rows, but the grids hold {rows} "):
            next(planner.packs(some, rows=7))
    with pytest.raises(AttributeError, match="nothing"):
        _ = pack.nothing
