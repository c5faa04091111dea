"""Packing: which items run together, and in which budget."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from vitgraph.core import Counts, Grid, Pack, Piece, exceeded, fits
from vitgraph.planning.budgets import Budget
from vitgraph.planning.cost import CostModel, load_of
from vitgraph.planning.search import Prices, Size, cheapest_groups

EAGER_IS_FASTER = "eager is predicted to be faster"
EAGER_MARGIN = 0.97
"""Eager must take less than this share of the replay: it keeps the host busy and needs memory of its own."""

MOST_SIZES, MOST_PLANS, MOST_PLANNED_ITEMS = 65536, 1024, 128


class CountRule(Protocol):
    """The part of a `TowerSpec` that sizes items."""

    @property
    def splits_by_frame(self) -> bool: ...

    @property
    def load_sets(self) -> Sequence[tuple[str, str]]: ...

    @property
    def segment_sets(self) -> Sequence[tuple[str, str]]: ...

    def counts(self, grid: Grid) -> Counts: ...

    def is_long(self, counts: Counts) -> bool: ...


class _Sized(NamedTuple):
    """A grid's rows by kind, as a dict and in the planner's order, and its attention load."""

    counts: Counts
    size: Size
    load: float


class Planner:
    """Packs items into budgets so that their predicted time is least.

    Args:
        rule: item sizes.
        budgets: ascending; the last one holds whatever any of them holds. May be empty: everything runs eager.
        cost: predicted times; default: a guess from the budgets' sizes.
    """

    def __init__(self, rule: CountRule, budgets: Sequence[Budget], cost: CostModel | None = None) -> None:
        self._rule, self._budgets = rule, budgets
        self._kinds = tuple(budgets[-1].capacity) if budgets else ()
        self._columns = [[budget.capacity[kind] for budget in budgets] for kind in self._kinds]
        self._rows = self._kinds.index("patch") if budgets else 0
        at = self._kinds.index
        self._sets = [(at(rows), at(segments)) for rows, segments in rule.segment_sets] if budgets else []
        self._sizes: dict[Grid, _Sized] = {}
        self._last: tuple[tuple[Grid, ...], tuple[Size, float]] | None = None
        self._plans: OrderedDict[tuple[tuple[Grid, ...], bool, bool], tuple[Pack, ...]] = OrderedDict()
        self.cost = cost or CostModel.guess(budgets)

    @property
    def cost(self) -> CostModel:
        """What plans are chosen by; setting it forgets earlier plans."""
        return self._cost

    @cost.setter
    def cost(self, cost: CostModel) -> None:
        self._cost = cost
        self._prices = Prices(cost, self._columns, self._rows, self._sets)
        self._plans.clear()

    def plan(self, grids: Sequence[Grid], split: bool = True, eager: bool = True) -> list[Pack]:
        """The packs of these items.

        An item that no budget holds is cut between frames where its frames are independent; where they are not, or
        where one frame alone is too large, it becomes an eager pack of its own with the reason. Every limit of a
        budget is respected: patch rows, tokens, items and segments. Among several packings the one with the least
        predicted time is taken, and a pack runs eager where that is predicted to be faster.

        Args:
            grids: one per item, in the caller's order.
            split: whether items may be cut between frames at all.
            eager: whether a pack that fits a budget may run eager.

        Returns:
            Packs in the order in which their first item came; pieces of a pack in the caller's order.
        """
        grids = tuple(grids)
        if not grids:
            return []
        together = self._one_pack(grids, eager) if self._budgets else None
        if together is not None:
            return [together]
        key = (grids, split, eager)
        packs = self._plans.get(key)
        if packs is None:
            packs = tuple(self._several(grids, split, eager))
            if len(grids) <= MOST_PLANNED_ITEMS:
                self._plans[key] = packs
                if len(self._plans) > MOST_PLANS:
                    self._plans.popitem(last=False)
        else:
            self._plans.move_to_end(key)
        return list(packs)

    def patches(self, grids: tuple[Grid, ...]) -> int:
        """Patch rows of all items; what is looked up for it serves the plan of the same tuple, too."""
        return self._total(grids)[0][self._rows] if grids and self._budgets else sum(grid.patches for grid in grids)

    def counts(self, grid: Grid) -> Counts:
        """Rows of each kind that one item fills."""
        return self._sized(grid).counts

    def predicted(self, packs: Iterable[Pack]) -> float:
        """Predicted time of these packs, in the model's unit; infinite when one runs eager and eager was not timed."""
        return sum(self._predicted(pack) for pack in packs)

    def _predicted(self, pack: Pack) -> float:
        load = sum(self._sized(piece.grid).load for piece in pack.pieces)
        long = self._rule.is_long(pack.counts)
        if pack.budget is None:
            return self._cost.eager(pack.counts["patch"], load, long)
        return self._cost.replay(pack.budget, load, long)

    def _one_pack(self, grids: tuple[Grid, ...], eager: bool) -> Pack | None:
        """All items in one pack; None where the largest budget does not hold them, or several packs may cost less."""
        size, load = self._total(grids)
        smallest = self._smallest(size)
        if smallest == len(self._budgets) or self._cost.splitting_helps(smallest):
            return None
        return Pack.of_whole_items(grids, *self._placed(size, smallest, load, eager))

    def _total(self, grids: tuple[Grid, ...]) -> tuple[Size, float]:
        """Size and attention load of all items; asked again with the same tuple, it returns the same."""
        if self._last is not None and self._last[0] is grids:
            return self._last[1]
        sized = [self._sizes.get(grid) or self._sized(grid) for grid in grids]
        total = _sum(sized)
        self._last = grids, total
        return total

    def _several(self, grids: tuple[Grid, ...], split: bool, eager: bool) -> list[Pack]:
        """Packs of items that need not, or cannot, run in one."""
        pieces = list(map(Piece, range(len(grids)), grids))
        if not self._budgets:
            return [Pack((piece,), self._sized(piece.grid).counts, None, "no budgets") for piece in pieces]
        largest = self._budgets[-1].capacity
        if split and self._rule.splits_by_frame:
            pieces = [part for piece in pieces for part in self._cut(piece, largest)]
        fitting = [p for p in pieces if fits(self._sized(p.grid).counts, largest)]
        alone = [p for p in pieces if not fits(self._sized(p.grid).counts, largest)]
        packs = [self._too_large(piece, largest) for piece in alone]
        fitting.sort(key=lambda p: -p.grid.patches)
        sizes = [self._sized(p.grid) for p in fitting]
        groups = cheapest_groups(self._prices, [s.size for s in sizes], [s.load for s in sizes])
        packs += [self._pack(sorted(fitting[i] for i in group), eager) for group in groups]
        return sorted(packs, key=lambda pack: pack.pieces[0])

    def _sized(self, grid: Grid) -> _Sized:
        sized = self._sizes.get(grid)
        if sized is None:
            counts = self._rule.counts(grid)
            size = tuple(counts.get(kind, 0) for kind in self._kinds)
            sized = _Sized(counts, size, load_of(counts, self._rule.load_sets))
            if len(self._sizes) >= MOST_SIZES:
                self._sizes.clear()
            self._sizes[grid] = sized
        return sized

    def _smallest(self, size: Size) -> int:
        """Index of the smallest budget that holds this many rows; budgets grow in every kind."""
        return max(bisect_left(column, n) for column, n in zip(self._columns, size, strict=True))

    def _pack(self, pieces: Sequence[Piece], eager: bool) -> Pack:
        sized = [self._sized(piece.grid) for piece in pieces]
        size, load = _sum(sized)
        return Pack(tuple(pieces), *self._placed(size, self._smallest(size), load, eager))

    def _placed(self, size: Size, smallest: int, load: float, eager: bool) -> tuple[Counts, int | None, str]:
        """Where a pack runs: its counts, its budget, and the reason why it runs in none.

        Args:
            size: rows of each kind.
            smallest: the smallest budget that holds them.
            load: of the attention.
            eager: whether it may run in none.
        """
        counts = dict(zip(self._kinds, size, strict=True))
        long = self._rule.is_long(counts)
        index = self._cost.cheapest(smallest, load, long)
        replay = self._cost.replay(index, load, long)
        if eager and self._cost.eager(counts["patch"], load, long) < EAGER_MARGIN * replay:
            return counts, None, EAGER_IS_FASTER
        return counts, index, ""

    def _too_large(self, piece: Piece, largest: Counts) -> Pack:
        counts = self._sized(piece.grid).counts
        reason = f"larger than the largest budget in {exceeded(counts, largest)}"
        return Pack((piece,), counts, None, reason)

    def _cut(self, piece: Piece, largest: Counts) -> list[Piece]:
        """The item whole if it fits or not even one frame does, else in runs of as many frames as the largest budget
        holds."""
        item, grid = piece.item, piece.grid
        rule = self._rule
        if fits(self._sized(grid).counts, largest) or not fits(rule.counts(Grid(1, grid.h, grid.w)), largest):
            return [piece]
        frames = grid.t
        while not fits(rule.counts(Grid(frames, grid.h, grid.w)), largest):
            frames -= 1
        starts = range(0, grid.t, frames)
        return [Piece(item, Grid(min(frames, grid.t - first), grid.h, grid.w), first) for first in starts]


def _sum(sized: Sequence[_Sized]) -> tuple[Size, float]:
    _, sizes, loads = zip(*sized, strict=True)
    return tuple(map(sum, zip(*sizes, strict=True))), sum(loads)
