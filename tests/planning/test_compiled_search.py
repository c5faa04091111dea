"""The compiled search finds what the search in Python finds, and where it cannot be built, that one runs."""

from __future__ import annotations

import logging
import os
import shutil
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packing_rule import RULE, Rule, grids, models
from vitgraph.config import EncoderConfig
from vitgraph.core import NOWHERE, Grid, KnownGrid, Pack, Stretches
from vitgraph.errors import PatchError
from vitgraph.planning import compiled_search
from vitgraph.planning import search as search_module
from vitgraph.planning.budgets import make_budgets
from vitgraph.planning.compiled_search import COMPILERS, FLAGS, MOST_ROWS, CompiledSearch, load_library
from vitgraph.planning.cost import LONG_ROWS, CostModel, are_long
from vitgraph.planning.packing import Planner
from vitgraph.planning.search import MOST_EXHAUSTIVE, Prices, Searched, search

pytestmark = pytest.mark.skipif(
    not (os.environ.get("CC") or any(map(shutil.which, COMPILERS))), reason="needs a C compiler"
)


def forget() -> None:
    """Nothing is loaded any more."""
    load_library.cache_clear()
    compiled_search._begun.cache_clear()


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VITGRAPH_CACHE", str(tmp_path_factory.mktemp("cache")))
        forget()
        yield
    forget()


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache, and nothing loaded."""
    monkeypatch.setenv("VITGRAPH_CACHE", str(tmp_path))
    forget()
    yield tmp_path
    forget()


def prices_of(budgets: tuple, cost: CostModel) -> Prices:
    kinds = list(budgets[-1].capacity)
    columns = [[budget.capacity[kind] for budget in budgets] for kind in kinds]
    return Prices(cost, columns, kinds.index("patch"), [(kinds.index("patch"), kinds.index("segment"))])


def same(prices: Prices, known: list[KnownGrid], compiled: CompiledSearch | None = None) -> bool:
    """Whether the compiled search finds of these items what the search in Python finds."""
    compiled = compiled or compiled_search.compiled_search(prices)
    size = tuple(sum(own.size[kind] for own in known) for kind in range(len(prices.columns)))
    if any(smallest(prices, own.size) == len(prices.columns[0]) for own in known):
        return compiled(known, False) is None is compiled(known, True)
    groups = search(prices, known) if prices.splits[smallest(prices, size)] else [range(len(known))]
    for eager in (False, True):
        got = compiled(known, eager)
        if got is None or got.rows != sum(own.patches for own in known):
            return False
        if describe(got) != [expected(prices, known, group, eager) for group in sorted(map(sorted, groups))]:
            return False
    return True


def describe(found: Searched) -> list[tuple]:
    """Per group its items, where their pixel rows and their metadata lie, and what else is said of it."""
    described = []
    for begin, end, first, last, *of in found.groups:
        stretches = list(Stretches(found.table[8 * first : 8 * last]))
        described.append((found.order[begin:end], stretches, found.places[4 * begin : 4 * end], *of))
    return described


def expected(prices: Prices, known: list[KnownGrid], group: list[int], eager: bool = False) -> tuple:
    """As `describe`, counted one by one."""
    first = [sum(own.size[prices.rows] for own in known[:at]) for at in group]
    stretches: list[tuple[int, int]] = []
    for at, begin in zip(group, first, strict=True):
        rows = known[at].size[prices.rows]
        if stretches and sum(stretches[-1]) == begin:
            begin, before = stretches.pop()
            rows += before
        stretches.append((begin, rows))
    size = tuple(sum(known[at].size[kind] for at in group) for kind in range(len(prices.columns)))
    budget, rows = smallest(prices, size), size[prices.rows]
    sets = [(size[rows], size[segments]) for rows, segments in prices.sets]
    placed = b"".join(known[at].place for at in group) if all(own.place for own in known) else b""
    settled, load = rows >= prices.settled[eager][budget], sum(known[at].load for at in group)
    return group, stretches, placed, budget, settled, bool(are_long(*sets)), load, *size


def smallest(prices: Prices, size: tuple[int, ...]) -> int:
    """The smallest budget that holds so many rows; how many there are where none does."""
    holds = [
        all(n <= column[budget] for n, column in zip(size, prices.columns, strict=True))
        for budget in range(len(prices.columns[0]))
    ]
    return [*holds, True].index(True)


few = st.sampled_from([Grid(1, 2, 2), Grid(1, 8, 8), Grid(1, 8, 8), Grid(2, 6, 8), Grid(1, 20, 24)])
"""Many of one size: equal costs, of which both must choose the same."""


@given(models(), st.lists(st.one_of(grids, few), min_size=1, max_size=40))
@settings(max_examples=300)
def test_it_finds_the_groups_that_python_finds(model, items) -> None:
    budgets, cost = model
    planner, prices = Planner(RULE, budgets, cost), prices_of(budgets, cost)
    known = [planner.known(grid) for grid in items]
    fitting = [own for own in known if own.fits]
    compiled = compiled_search.compiled_search(prices)
    for some in filter(None, (known, fitting)):
        assert same(prices, some)
        assert (compiled(some, False) is None) == (len(some) > len(fitting))


@pytest.mark.parametrize("grid", [Grid(1, 1 << 15, 1 << 15), Grid(1, 1 << 10, (1 << 21) - 1), Grid(1 << 9, 2, 2)])
def test_what_exceeds_every_budget_is_told(grid: Grid) -> None:
    budgets = make_budgets(RULE, EncoderConfig(max_frames=64, max_items=64))
    planner = Planner(RULE, budgets)
    prices = prices_of(budgets, planner.cost)
    known = [planner.known(one) for one in (Grid(1, 8, 8), grid)]
    compiled = compiled_search.compiled_search(prices)
    assert compiled(known, False) is None is planner.find(known, False)
    assert same(prices, known[:1])
    (found,) = describe(compiled(known[:1], False))
    assert found[:2] == ([0], [(0, 64)])


@given(models(), st.lists(few, min_size=1, max_size=12), st.sampled_from([1.0, 0.5, 0.0]))
def test_of_equal_costs_it_takes_the_same(model, items, share) -> None:
    budgets, cost = model
    cost = replace(cost, fixed=tuple(float(round(one * share)) for one in cost.fixed), slope=(0.0,) * len(cost.rows))
    planner, prices = Planner(RULE, budgets, cost), prices_of(budgets, cost)
    known = [own for own in map(planner.known, items) if own.fits]
    if known:
        assert same(prices, known)


def test_long_segments_are_told_apart_at_the_same_length() -> None:
    budgets = make_budgets(RULE, EncoderConfig(budgets=(1024, 4096)))
    rows = tuple(budget.capacity["patch"] for budget in budgets)
    # Whoever takes a pack of exactly the least length for long, or not, finds another plan.
    for long_slope in (1e-6, 1e-2):
        cost = CostModel((4000.0, 14000.0), (1e-3,) * 2, rows, long_slope=(long_slope,) * 2)
        planner, prices = Planner(RULE, budgets, cost), prices_of(budgets, cost)
        for items in (
            [LONG_ROWS] * 4,
            [LONG_ROWS, LONG_ROWS + 8, LONG_ROWS - 8],
            [LONG_ROWS, 64, 64],
            [4096, 2048, 64],
        ):
            known = [planner.known(Grid(1, 2, n // 2)) for n in items]
            assert same(prices, known)


@pytest.mark.parametrize("items", [MOST_EXHAUSTIVE, MOST_EXHAUSTIVE + 1, 3000])
def test_many_items(items: int) -> None:
    budgets = make_budgets(RULE, EncoderConfig())
    rows = tuple(budget.capacity["patch"] for budget in budgets)
    # Each budget a little dearer per row than the one below.
    prices = prices_of(budgets, CostModel(tuple(n**1.05 + 900.0 for n in rows), (1e-5,) * len(rows), rows))
    planner = Planner(RULE, budgets)
    known = [planner.known(Grid(1, 2 + 2 * (i * 7 % 13), 2 + 2 * (i * 5 % 11))) for i in range(items)]
    compiled = compiled_search.compiled_search(prices)
    assert same(prices, known, compiled)
    assert sorted(compiled(known, False).order) == list(range(items))
    assert same(prices, known[:5], compiled), "after many"


def test_what_was_found_stays_while_others_are_searched() -> None:
    budgets = make_budgets(RULE, EncoderConfig(budgets=(64,)))
    planner = Planner(RULE, budgets)
    compiled = compiled_search.compiled_search(prices_of(budgets, planner.cost))
    sides = [4, 12, 8, 16, 12, 4]
    some, others = ([planner.known(Grid(1, side, side)) for side in order] for order in (sides, sides[::-1] * 2))
    want = describe(compiled(some, False))
    found = compiled(some, False)
    assert len(compiled(others, False).groups) > len(want) > 1
    assert describe(found) == want


@given(st.lists(grids, max_size=30), st.lists(st.integers(1, 800), min_size=1, max_size=8), st.booleans())
def test_plans_are_the_same(items, ladder, splits) -> None:
    rule = Rule(splits)
    budgets = make_budgets(rule, EncoderConfig(budgets=tuple(ladder)))
    compiled, plain = (Planner(rule, budgets, compiled=compiled) for compiled in (True, False))
    assert compiled.plan(items) == plain.plan(items)
    for pack, other in zip(compiled.plan(items), plain.plan(items), strict=True):
        assert pack.stretches.table == other.stretches.table
    known = [plain.known(grid) for grid in items]
    for eager in (False, True):
        assert compiled.find(known, eager) == plain.find(known, eager)
    assert compiled.searched_in_python == 0
    rows = sum(grid.patches for grid in items)
    for planner in (compiled, plain):
        assert list(planner.packs(items, rows=rows)) == planner.plan(items)
        for came in (rows - 1, rows + 1):
            with pytest.raises(PatchError, match=f"{came} rows, but the grids hold {rows} patches"):
                next(planner.packs(items, rows=came))


def test_searches_in_python_are_counted() -> None:
    budgets = make_budgets(RULE, EncoderConfig(budgets=(64,)))
    planner = Planner(RULE, budgets)
    planner.plan([Grid(1, 16, 16)])
    assert planner.searched_in_python == 0, "one pack needs no search"
    for times in (1, 2):
        assert len(planner.plan([Grid(1, 16, 16)] * 2)) == 2
        assert planner.searched_in_python == times


@pytest.mark.parametrize("kinds", [1, 2, 3, 9])
def test_it_serves_any_number_of_kinds(kinds: int) -> None:
    """The last kind is the one that two items have too much of."""
    prices = Prices(CostModel((5.0, 9.0), (0.0, 0.0), (40, 80)), [[40, 80]] * (kinds - 1) + [[1, 1]], 0, [])
    known = [KnownGrid(Grid(1, 1, 1), {}, (1,) * kinds) for _ in range(3)]
    assert same(prices, known)
    assert [group for group, *_ in describe(compiled_search.compiled_search(prices)(known, True))] == [[0], [1], [2]]


def test_budgets_that_are_too_large_are_searched_in_python(caplog, monkeypatch) -> None:
    monkeypatch.setattr(search_module.np, "arange", lambda stop: np.zeros(1))  # no table of a billion rows
    prices = Prices(CostModel((1.0, 2.0), (0.0, 0.0), (4, 8)), [[4, MOST_ROWS]] * 2, 0, [])
    assert compiled_search.compiled_search(prices) is None
    assert f"less than {MOST_ROWS} rows, not of {MOST_ROWS}" in caplog.text


def test_three_and_four_kinds_share_a_library(anew: Path) -> None:
    for kinds in (3, 4):
        compiled_search.compiled_search(Prices(CostModel((1.0,), (0.0,), (8,)), [[8]] * kinds, 0, []))
    assert load_library.cache_info().currsize == len(list(anew.iterdir())) == 1


@given(st.lists(st.tuples(*[st.integers(1, 80)] * 2), min_size=1, max_size=12), st.sampled_from([1, 2, 3, 8, 24, 64]))
def test_budgets_may_be_any_number_of_rows_apart(sizes, step) -> None:
    rows = tuple(step * n for n in (3, 5, 9, 17, 80))
    cost = CostModel(tuple(50.0 + n for n in rows), (0.0,) * 5, rows)
    prices = Prices(cost, [list(rows), [9, 18, 30, 60, 200]], 0, [])
    assert same(prices, [KnownGrid(Grid(1, 1, n), {}, (n, other)) for n, other in sizes])


@pytest.mark.parametrize("sets", [0, 1, 2])
def test_it_serves_any_number_of_segment_sets(sets: int) -> None:
    rows = (LONG_ROWS, 4 * LONG_ROWS)
    cost = CostModel((1000.0, 3900.0), (1e-3,) * 2, rows, long_slope=(1e-5,) * 2)
    prices = Prices(cost, [list(rows), [8, 8], [8, 8]], 0, [(0, 1), (0, 2)][:sets])
    for segments in [(1, 1), (1, 2), (2, 1), (2, 2)]:
        items = [KnownGrid(Grid(1, 2, n // 2), {}, (n, *segments), n * n) for n in (LONG_ROWS, LONG_ROWS, 64, 2000)]
        assert same(prices, items)


def test_it_is_built_once_and_kept(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_library(4, 1) is not None
    (kept,) = anew.iterdir()
    written = kept.stat().st_mtime_ns
    monkeypatch.setenv("CC", "no-such-compiler")
    forget()
    assert load_library(4, 1) is not None, "the kept one needs no compiler"
    assert [(path, path.stat().st_mtime_ns) for path in anew.iterdir()] == [(kept, written)]


def test_what_cannot_be_loaded_is_built_anew(anew: Path) -> None:
    kept = anew / f"search-{compiled_search._key((*FLAGS, '-DKINDS=4', '-DSETS=1'))}.so"
    kept.write_bytes(b"half of a")
    assert load_library(4, 1) is not None
    assert kept.read_bytes().startswith(b"\x7fELF") or kept.stat().st_size > 1000


@pytest.mark.parametrize("command", ["no-such-compiler", "false", "cc -no-such-option"])
def test_without_a_compiler_python_searches(
    anew: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, command: str
) -> None:
    monkeypatch.setenv("CC", command)
    budgets = make_budgets(RULE, EncoderConfig(budgets=(64,)))
    items = [Grid(1, 16, 16), Grid(1, 4, 4), Grid(1, 8, 16)]
    for _ in range(2):
        planner = Planner(RULE, budgets, compiled=True)
        assert planner.plan(items) == Planner(RULE, budgets).plan(items)
        assert planner.searched_in_python == 1
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "Install a C compiler" in warning.getMessage()
    kinds = len(budgets[-1].capacity)
    assert all(compiled_search._begun(kinds + kinds % 2, sets).exception() for sets in (0, 1))
    assert not list(anew.iterdir()), "nothing is left behind"


def test_what_timings_will_need_is_built_before_them(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that was measured may tell long packs from others, a guess never does; each has code of its own."""
    budgets = make_budgets(RULE, EncoderConfig(budgets=(1024, 4096)))
    planner = Planner(RULE, budgets, compiled=True)
    kinds = len(budgets[-1].capacity)
    assert compiled_search._begun.cache_info().currsize == 2
    begun = [compiled_search._begun(kinds + kinds % 2, sets) for sets in (0, 1)]
    assert compiled_search._begun.cache_info().currsize == 2
    assert all(future.result() for future in begun) and len(list(anew.iterdir())) == 2
    monkeypatch.setattr(compiled_search, "_build", lambda *_: pytest.fail("built when it was needed"))
    rows = tuple(budget.capacity["patch"] for budget in budgets)
    planner.cost = CostModel((4000.0, 14000.0), (1e-3,) * 2, rows, long_slope=(1e-5,) * 2)
    assert len(planner.plan([Grid(1, 32, 64)] * 3)) and planner.searched_in_python == 0


def test_no_compiler_at_all(anew: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    assert load_library(4, 1) is None
    assert "no cc, gcc, clang in PATH" in caplog.text


def test_a_cache_that_cannot_be_written_is_no_obstacle(
    anew: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (anew / "file").write_text("")
    monkeypatch.setenv("VITGRAPH_CACHE", str(anew / "file" / "folder"))
    assert load_library(4, 1) is not None
    assert "compiled again next time" in caplog.text


def test_a_pack_is_made_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    budgets = make_budgets(RULE, EncoderConfig(budgets=(64,)))
    planner = Planner(RULE, budgets, compiled=True)
    made: list[Pack] = []
    make = Pack.of_some
    monkeypatch.setattr(Pack, "of_some", lambda *given: (made.append(make(*given)), made[-1])[1])
    packs = planner.packs([Grid(1, 16, 16)] * 3)
    assert not made
    for number in (1, 2, 3):
        assert next(packs) is made[-1]
        assert len(made) == number
    assert next(packs, None) is None


@given(models(), st.lists(grids, min_size=1, max_size=20), st.data())
def test_where_the_metadata_of_items_lies_is_told_in_their_order(model, items, data) -> None:
    budgets, cost = model
    planner = Planner(RULE, budgets, cost)
    known = [own for own in map(planner.known, items) if own.fits]
    for number, own in enumerate(known):
        own.put(struct.pack("=i", number * 1000))
    prices = prices_of(budgets, cost)
    if known:
        assert same(prices, known)
        compiled = compiled_search.compiled_search(prices)
        assert len(compiled(known, False).places) == 4 * len(known)
        data.draw(st.sampled_from(known)).put(NOWHERE)
        assert same(prices, known)
        assert compiled(known, False).places == NOWHERE == planner.find(known, False).places


def test_more_rows_than_requests_can_say_are_refused() -> None:
    budgets = make_budgets(RULE, EncoderConfig(budgets=(1 << 15,)))
    grid = Grid(1, 256, 512)
    items = [grid] * ((1 << 31) // grid.patches)
    for planner in (Planner(RULE, budgets), Planner(RULE, budgets, compiled=True)):
        with pytest.raises(PatchError, match=f"{len(items)} items have {1 << 31} patches"):
            planner.plan(items)
        assert len(planner.plan(items[:100])) == 100


def test_a_plan_with_little_to_spare_is_not_left_out() -> None:
    """It costs less than what is found before, and no part of it much more than the bound says."""
    rows = (168, 176)
    prices = Prices(CostModel((1780.0, 1860.0), (0.0, 0.0), rows), [list(rows)], 0, [])
    known = [KnownGrid(Grid(1, 1, n), {}, (n,)) for n in (156, 152, 76, 36, 60, 24, 132, 52)]
    assert same(prices, known)
    found = describe(compiled_search.compiled_search(prices)(known, False))
    assert [group for group, *_ in found] == [[0], [1], [2, 4], [3, 5, 7], [6]]


def test_where_packs_may_run_eager_others_are_settled() -> None:
    budgets = make_budgets(RULE, EncoderConfig(budgets=(64, 512)))
    rows = tuple(budget.capacity["patch"] for budget in budgets)
    curve = (1, 256, 257, 2048), (1000.0, 1000.0, 3000.0, 3200.0)
    cost = CostModel((2000.0, 2500.0), (1e-6,) * 2, rows, *curve)
    prices = prices_of(budgets, cost)
    planner, compiled = Planner(RULE, budgets, cost), compiled_search.compiled_search(prices)
    assert prices.settled[True] == [float("inf"), 257]
    size = tuple(257 if kind == "patch" else 1 for kind in budgets[0].capacity)
    least = KnownGrid(Grid(1, 1, 257), {}, size, 257.0**2)
    for item, with_eager in ((planner.known(Grid(1, 8, 8)), False), (least, True)):
        assert same(prices, [item])
        for find in (compiled, planner.find):
            settled = [[bool(group[5]) for group in find([item], eager).groups] for eager in (False, True)]
            assert settled == [[True], [with_eager]]


def test_sums_that_would_reach_other_kinds_are_not_made() -> None:
    """So many rows of the second kind together that they would look like few."""
    prices = Prices(CostModel((5.0,), (0.0,), (4096,)), [[4096], [1 << 20]], 0, [])
    known = [KnownGrid(Grid(1, 1, 1), {}, (1, 1 << 20)) for _ in range(2100)]
    found = compiled_search.compiled_search(prices)(known, False)
    assert [group[:2] for group in found.groups] == [(at, at + 1) for at in range(2100)]
