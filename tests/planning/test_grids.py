"""Grids with what is known of them: a sequence of grids that knows its sums."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitgraph.core import NOWHERE, TOLD, Grid, Grids, KnownGrid, Pack, Piece, Stretches


@given(st.lists(st.integers(0, 1 << 40), max_size=5), st.integers(0, 1 << 80), st.integers(0, 1 << 30))
def test_a_row_is_what_the_compiled_search_reads(size: list[int], load: int, place: int) -> None:
    """A double, as many rows as fit 31 bits, of an even number of kinds, and where the metadata lies."""
    known = KnownGrid(Grid(1, 2, 2), {}, tuple(size), load)
    told = [min(rows, TOLD) for rows in size] + [0] * (len(size) % 2)
    layout = f"=d{len(told)}Iii"
    assert struct.unpack(layout, known.row) == (float(load), *told, -1, 0)
    for own in (struct.pack("=i", place), NOWHERE):
        known.put(own)
        assert known.place == own
        assert struct.unpack(layout, known.row) == (float(load), *told, place if own else -1, 0)


def test_some_of_a_batch_are_grids_as_well() -> None:
    plain = [Grid(1, 2, 4), Grid(2, 6, 2), Grid(1, 2, 2)]
    known = [KnownGrid(grid, {}) for grid in plain]
    grids = Grids(known, "planner", [2, 0])
    assert grids == (plain[2], plain[0]) and grids.known == [known[2], known[0]]
    assert Grids(known, "planner", []) == () and Grids(known, "planner") == tuple(plain)


def test_grids_are_equal_to_a_tuple_of_them() -> None:
    plain = (Grid(1, 2, 4), Grid(2, 6, 2), Grid(1, 2, 4))
    grids = Grids([KnownGrid(grid, {}, (grid.patches,)) for grid in plain], None)
    again = Grids(list(grids.known), "another owner")
    assert grids == plain and plain == grids and grids == again
    assert hash(grids) == hash(plain) == hash(again)
    assert (list(grids), len(grids), grids[1], grids[-2:]) == (list(plain), 3, plain[1], plain[1:])
    assert grids != plain[:2] and grids != 3
    assert {plain: "found"}[grids] == "found"  # type: ignore[index]


def test_no_grids_are_empty() -> None:
    assert not Grids([], None)
    with pytest.raises(IndexError):
        Grids([], None)[0]


def test_the_tokens_of_pieces_follow_each_other() -> None:
    plain = [Grid(1, 2, 4), Grid(2, 6, 2), Grid(1, 2, 4)]
    grids = Grids([KnownGrid(grid, {"token": grid.patches // 4}) for grid in plain], None)
    pack = Pack.of_some(range(3), None, Stretches.of_first(40), grids, {"token": 10, "patch": 40}, 0, "")
    assert pack.spans == ((plain[0], 0, 2), (plain[1], 2, 6), (plain[2], 8, 2))
    alone = Pack((Piece(3, plain[1]),), {"token": 6}, None, "no budgets")
    assert alone.spans == ((plain[1], 0, 6),)


def test_a_pack_that_no_planner_made_does_not_know_its_batch() -> None:
    pack = Pack((Piece(0, Grid(1, 2, 4)), Piece(2, Grid(1, 2, 4))), {"patch": 16}, 0)
    with pytest.raises(LookupError, match="does not know its batch"):
        _ = pack.stretches


def test_some_of_a_batch_make_their_pieces_when_they_are_asked_for() -> None:
    plain = [Grid(1, 2, 4), Grid(1, 2, 6), Grid(1, 2, 2)]
    stretches = Stretches.of([(0, 8), (20, 4)])
    grids = Grids([KnownGrid(plain[at], {}) for at in (0, 2)], None)
    pack = Pack.of_some([0, 2], None, stretches, grids, {}, 0, "")
    assert pack.stretches is stretches
    assert "pieces" not in vars(pack)
    assert pack.pieces == (Piece(0, plain[0]), Piece(2, plain[2]))
    parts = [Piece(0, Grid(1, 2, 4)), Piece(0, Grid(1, 2, 4), 1), Piece(1, Grid(1, 2, 2))]
    grids = Grids([KnownGrid(parts[at].grid, {}) for at in (1, 2)], None)
    pack = Pack.of_some([1, 2], parts, stretches, grids, {}, 0, "")
    assert pack.pieces == (parts[1], parts[2])


def test_stretches_are_what_their_table_says() -> None:
    plain = ((30, 9), (0, 1), (2, 1))
    stretches = Stretches.of(plain)
    assert stretches.table == struct.pack("=6i", 9, 30, 10, 0, 11, 2)
    assert tuple(stretches) == plain == stretches[:]
    assert (stretches[1], stretches[-1]) == ((0, 1), (2, 1))
    assert len(stretches) == 3
    assert "(30, 9)" in repr(stretches)
    assert tuple(Stretches.of_first(9)) == ((0, 9),)
    with pytest.raises(IndexError):
        stretches[3]


def test_items_that_follow_each_other_are_one_stretch() -> None:
    starts = [0, 8, 20, 24, 32]
    assert tuple(Stretches.of_items([0, 2, 3], starts)) == ((0, 8), (20, 12))
    assert tuple(Stretches.of_items([1, 2], starts)) == ((8, 16),)
    assert tuple(Stretches.of_items([3], starts)) == ((24, 8),)
