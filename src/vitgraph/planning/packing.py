"""Packing: which items run together, and in which budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from vitgraph.core import Counts, Grid, Pack, Piece, add_counts, exceeded, fits
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
    if not budgets:
        return [_eager(rule, Piece(i, g), "no budgets") for i, g in enumerate(grids)]
    bins: list[tuple[list[Piece], Counts]] = []
    eager: list[Pack] = []
    largest = budgets[-1].capacity
    pieces = [Piece(i, grid) for i, grid in enumerate(grids)]
    if split and rule.splits_by_frame:
        pieces = [part for piece in pieces for part in _cut(rule, piece, largest)]
    for piece in sorted(pieces, key=lambda p: -p.grid.patches):
        counts = rule.counts(piece.grid)
        if not fits(counts, largest):
            eager.append(_eager(rule, piece, f"larger than the largest budget in {exceeded(counts, largest)}"))
            continue
        _place(bins, piece, counts, largest)
    packs = [_replayed(members, counts, budgets) for members, counts in bins]
    return sorted(packs + eager, key=lambda pack: pack.pieces[0])


def _cut(rule: CountRule, piece: Piece, largest: Counts) -> list[Piece]:
    """The item whole if it fits or not even one frame does, else in runs of as many frames as the largest budget
    holds."""
    item, grid = piece.item, piece.grid
    frame = rule.counts(Grid(1, grid.h, grid.w))
    if fits(rule.counts(grid), largest) or not fits(frame, largest):
        return [piece]
    frames = grid.t
    while not fits(rule.counts(Grid(frames, grid.h, grid.w)), largest):
        frames -= 1
    return [Piece(item, Grid(min(frames, grid.t - first), grid.h, grid.w), first) for first in range(0, grid.t, frames)]


def _place(bins: list[tuple[list[Piece], Counts]], piece: Piece, counts: Counts, largest: Counts) -> None:
    """Adds the piece to the fullest pack that still holds it, or opens a new one."""
    best: tuple[int, int, Counts] | None = None
    for index, (_, filled) in enumerate(bins):
        total = add_counts(filled, counts)
        if fits(total, largest) and (best is None or total["patch"] > best[1]):
            best = (index, total["patch"], total)
    if best is None:
        bins.append(([piece], counts))
    else:
        bins[best[0]] = ([*bins[best[0]][0], piece], best[2])


def _replayed(members: list[Piece], counts: Counts, budgets: Sequence[Budget]) -> Pack:
    index = next(i for i, budget in enumerate(budgets) if fits(counts, budget.capacity))
    return Pack(tuple(sorted(members)), counts, index)


def _eager(rule: CountRule, piece: Piece, reason: str) -> Pack:
    return Pack((piece,), rule.counts(piece.grid), None, reason)
