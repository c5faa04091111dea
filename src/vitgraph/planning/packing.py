"""Packing: which items run together, and in which budget."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from vitgraph.core import Counts, Grid, Pack, Piece, exceeded, fits
from vitgraph.planning.budgets import Budget


class CountRule(Protocol):
    """The part of a `TowerSpec` that sizes items."""

    @property
    def splits_by_frame(self) -> bool: ...

    def counts(self, grid: Grid) -> Counts: ...


def plan_packs(rule: CountRule, budgets: Sequence[Budget], grids: Sequence[Grid], split: bool = True) -> list[Pack]:
    """Packs items into budgets: best fit decreasing into the largest budget, then the smallest budget that holds
    each pack.

    An item that no budget holds is cut between frames where its frames are independent; where they are not, or where
    one frame alone is too large, it becomes an eager pack of its own with the reason. Every limit of a budget is
    respected: patch rows, tokens, items and segments.

    Args:
        rule: item sizes.
        budgets: ascending; the last one holds whatever any of them holds. May be empty: everything runs eager.
        grids: one per item, in the caller's order.
        split: whether items may be cut between frames at all.

    Returns:
        Packs in the order in which their first item came; pieces of a pack in the caller's order.
    """
    if not grids:
        return []
    sizes = {grid: rule.counts(grid) for grid in set(grids)}
    if not budgets:
        return [Pack((Piece(i, grid),), sizes[grid], None, "no budgets") for i, grid in enumerate(grids)]
    largest = budgets[-1].capacity
    pieces = [Piece(i, grid) for i, grid in enumerate(grids)]
    total = _sum(sizes[grid] for grid in grids)
    if fits(total, largest):
        return [_replayed(pieces, total, budgets)]
    if split and rule.splits_by_frame:
        pieces = [part for piece in pieces for part in _cut(rule, piece, sizes[piece.grid], largest)]
        sizes |= {piece.grid: rule.counts(piece.grid) for piece in pieces}
    bins: list[_Bin] = []
    eager: list[Pack] = []
    for piece in sorted(pieces, key=lambda p: -p.grid.patches):
        counts = sizes[piece.grid]
        if fits(counts, largest):
            _place(bins, piece, counts, largest)
        else:
            reason = f"larger than the largest budget in {exceeded(counts, largest)}"
            eager.append(Pack((piece,), counts, None, reason))
    packs = [_replayed(sorted(b.pieces), b.filled, budgets) for b in bins]
    return sorted(packs + eager, key=lambda pack: pack.pieces[0])


@dataclass
class _Bin:
    """A pack that is being filled."""

    pieces: list[Piece]
    filled: dict[str, int]


def _cut(rule: CountRule, piece: Piece, counts: Counts, largest: Counts) -> list[Piece]:
    """The item whole if it fits or not even one frame does, else in runs of as many frames as the largest budget
    holds."""
    item, grid = piece.item, piece.grid
    if fits(counts, largest) or not fits(rule.counts(Grid(1, grid.h, grid.w)), largest):
        return [piece]
    frames = grid.t
    while not fits(rule.counts(Grid(frames, grid.h, grid.w)), largest):
        frames -= 1
    return [Piece(item, Grid(min(frames, grid.t - first), grid.h, grid.w), first) for first in range(0, grid.t, frames)]


def _place(bins: list[_Bin], piece: Piece, counts: Counts, largest: Counts) -> None:
    """Adds the piece to the fullest pack that still holds it, or opens a new one."""
    open_bins = [b for b in bins if all(b.filled[kind] + n <= largest[kind] for kind, n in counts.items())]
    if not open_bins:
        bins.append(_Bin([piece], dict(counts)))
        return
    best = max(open_bins, key=lambda b: b.filled["patch"])
    best.pieces.append(piece)
    for kind, n in counts.items():
        best.filled[kind] += n


def _sum(sizes: Iterable[Counts]) -> dict[str, int]:
    total: dict[str, int] = {}
    for counts in sizes:
        for kind, n in counts.items():
            total[kind] = total.get(kind, 0) + n
    return total


def _replayed(pieces: list[Piece], counts: Counts, budgets: Sequence[Budget]) -> Pack:
    """The pack in the smallest budget that holds it; budgets grow in every kind."""
    index = bisect_left(budgets, counts["token"], key=lambda budget: budget.tokens)
    while not fits(counts, budgets[index].capacity):
        index += 1
    return Pack(tuple(pieces), counts, index)
