"""The picture of packing: it must survive every kind of pack; how it looks is judged by eye."""

from __future__ import annotations

import pytest
from PIL import Image

from vitgraph.core import Grid, Pack, Piece
from vitgraph.pictures import Exhibit, describe_pack, draw_packing


def _exhibit(number, frames=1, size=(64, 48)):
    return Exhibit(f"#{number} picture", [Image.new("RGB", size, (40 * f % 255, 90, 160)) for f in range(frames)])


def _facts(pieces, budget, budgets=(64, 512), merge=2):
    counts = [{"token": piece.grid.patches // merge**2} for piece in pieces]
    return describe_pack(Pack(tuple(pieces), {}, budget), budgets, counts)


def test_facts():
    facts = _facts([Piece(0, Grid(1, 8, 8)), Piece(1, Grid(1, 8, 12))], budget=0)
    assert (facts.tokens, facts.capacity, facts.padding) == ((16, 24), 64, 0.375)
    eager = _facts([Piece(0, Grid(1, 8, 8))], budget=None)
    assert (eager.title, eager.capacity, eager.padding) == ("eager", 16, 0.0)


@pytest.mark.parametrize(
    ("packs", "frames"),
    [
        ([_facts([Piece(i, Grid(1, 2, 4)) for i in range(64)], budget=1)], 1),
        ([_facts([Piece(0, Grid(1, 2, 2))], budget=0)], 1),
        ([_facts([Piece(0, Grid(1, 200, 180))], budget=None), _facts([Piece(1, Grid(1, 2, 64))], budget=0)], 1),
        ([_facts([Piece(0, Grid(3, 8, 8))], budget=0), _facts([Piece(0, Grid(2, 8, 8), 3)], budget=0)], 5),
    ],
    ids=["many small items", "one token", "larger than every budget", "a clip in two pieces"],
)
def test_every_kind_of_pack_can_be_drawn(tmp_path, packs, frames):
    items = 1 + max(piece.item for facts in packs for piece in facts.pack.pieces)
    exhibits = [_exhibit(i, frames) for i in range(items)]
    draw_packing(packs, exhibits, "title", tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.size[1] > 100
