"""Grids with what is known of them: a sequence of grids that knows its sums."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitgraph.core import Grid, Grids, KnownGrid, Pack, Piece

rows = st.integers(0, 1 << 40)
grids_of_some_size = st.lists(st.tuples(rows, rows, rows), min_size=1, max_size=200)


def known(*size: int) -> KnownGrid:
    return KnownGrid(Grid(1, 2, 2), {}, size, sum(size) ** 2)


@given(grids_of_some_size)
def test_size_and_load_are_sums(sizes: list[tuple[int, int, int]]) -> None:
    grids = Grids([known(*size) for size in sizes], None)
    assert grids.size == tuple(map(sum, zip(*sizes, strict=True)))
    assert grids.load == sum(sum(size) ** 2 for size in sizes)


def test_grids_are_equal_to_a_tuple_of_them() -> None:
    plain = (Grid(1, 2, 4), Grid(2, 6, 2), Grid(1, 2, 4))
    grids = Grids([KnownGrid(grid, {}, (grid.patches,)) for grid in plain], None)
    again = Grids(list(grids.known), "another owner")
    assert grids == plain and plain == grids and grids == again
    assert hash(grids) == hash(plain) == hash(again)
    assert (list(grids), len(grids), grids[1], grids[-2:]) == (list(plain), 3, plain[1], plain[1:])
    assert grids != plain[:2] and grids != 3
    assert {plain: "found"}[grids] == "found"  # type: ignore[index]


def test_no_grids_have_no_size() -> None:
    assert Grids([], None).size == ()
    assert not Grids([], None)
    with pytest.raises(IndexError):
        Grids([], None)[0]


def test_the_tokens_of_pieces_follow_each_other() -> None:
    plain = [Grid(1, 2, 4), Grid(2, 6, 2), Grid(1, 2, 4)]
    grids = Grids([KnownGrid(grid, {"token": grid.patches // 4}) for grid in plain], None)
    pack = Pack.of_whole_items(grids, {"token": 10, "patch": 40}, 0)
    assert pack.spans == ((plain[0], 0, 2), (plain[1], 2, 6), (plain[2], 8, 2))
    alone = Pack((Piece(3, plain[1]),), {"token": 6}, None, "no budgets")
    assert alone.spans == ((plain[1], 0, 6),)


def test_a_pack_that_nobody_located_says_so() -> None:
    pack = Pack((Piece(0, Grid(1, 2, 4)), Piece(2, Grid(1, 2, 4))), {"patch": 16}, 0)
    with pytest.raises(LookupError, match="located"):
        _ = pack.stretches
    pack.locate([0, 8, 20])
    assert pack.stretches == ((0, 8), (20, 8))
