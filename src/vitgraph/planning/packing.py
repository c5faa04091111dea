"""Packing: which items run together, and in which budget."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Protocol

from vitgraph.core import MOST_PATCHES, Counts, Grid, Grids, KnownGrid, Pack, Piece, Stretches, exceeded, fits, sums_of
from vitgraph.errors import PatchError
from vitgraph.planning.budgets import Budget
from vitgraph.planning.compiled_search import begin_building, compiled_search
from vitgraph.planning.cost import CostModel, load_of
from vitgraph.planning.search import Found, Prices, Searched, Size, search

EAGER_IS_FASTER = "eager is predicted to be faster"
EAGER_MARGIN = 0.97
"""Eager must take less than this share of the replay: it keeps the host busy and needs memory of its own."""

MOST_SIZES = 65536


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


class Planner:
    """Packs items into budgets so that their predicted time is least.

    Args:
        rule: item sizes.
        budgets: ascending; the last one holds whatever any of them holds. May be empty: everything runs eager.
        cost: predicted times; default: a guess from the budgets' sizes.
        compiled: whether the search runs compiled, where a C compiler is found.

    Attributes:
        searched_in_python: how often it did not.
    """

    def __init__(
        self, rule: CountRule, budgets: Sequence[Budget], cost: CostModel | None = None, compiled: bool = False
    ) -> None:
        self._rule, self._budgets, self._compiled = rule, budgets, compiled and bool(budgets)
        self.searched_in_python = 0
        self._kinds = tuple(budgets[-1].capacity) if budgets else ()
        self._columns = [[budget.capacity[kind] for budget in budgets] for kind in self._kinds]
        self._rows = self._kinds.index("patch") if budgets else 0
        self._most_rows = budgets[-1].capacity["patch"] if budgets else 0
        at = self._kinds.index
        self._sets = [(at(rows), at(segments)) for rows, segments in rule.segment_sets] if budgets else []
        self._known: dict[Grid, KnownGrid] = {}
        if self._compiled:
            begin_building(len(self._kinds), len(self._sets))
        self.cost = cost or CostModel.guess(budgets)

    @property
    def cost(self) -> CostModel:
        """What plans are chosen by."""
        return self._cost

    @cost.setter
    def cost(self, cost: CostModel) -> None:
        self._cost = cost
        self._prices = Prices(cost, self._columns, self._rows, self._sets)
        self._compiled_search = compiled_search(self._prices) if self._compiled else None
        budgets = range(len(cost.rows))
        margins = {True: EAGER_MARGIN, False: None}
        # Whether a pack may run eager -> per budget the patch rows from which it is the one.
        self._settled = {
            eager: [cost.settled_from(budget, margin) for budget in budgets] for eager, margin in margins.items()
        }
        # One entry more than there are budgets: what fits none needs several packs.
        self._splits = [*map(cost.splitting_helps, budgets), True]

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
        return list(self.packs(grids, split, eager))

    def packs(
        self, grids: Sequence[Grid], split: bool = True, eager: bool = True, rows: int | None = None
    ) -> Iterator[Pack]:
        """As `plan`, one after another: of several, each is made when it is asked for, and the one before may run
        meanwhile.

        Args:
            grids, split, eager: see `plan`.
            rows: patch rows that came with the grids, if somebody shall compare.

        Raises:
            PatchError: before the first pack, where the grids hold another number.
        """
        grids = self.batch(grids)
        together = self.one_pack(grids, eager)
        if together is not None:
            check_rows(rows, together.counts["patch"])
            return iter((together,))
        if grids.known:
            return self._several(grids, split, eager, rows)
        check_rows(rows, 0)
        return iter(())

    def one_pack(self, grids: Grids, eager: bool = True) -> Pack | None:
        """As `plan`, where all items run in one pack; None where several may cost less, the largest budget does not
        hold them, or nobody summed them up."""
        if not grids.size:
            return None
        smallest = self._smallest(grids.size)
        return None if self._splits[smallest] else Pack.of_whole_items(grids, *self._placed(grids, smallest, eager))

    def batch(self, grids: Sequence[Grid]) -> Grids:
        """The grids with what this planner knows of them; they themselves where they have it already."""
        if isinstance(grids, Grids) and grids.owner is self:
            return grids
        return Grids([self.known(grid) for grid in grids], self)

    def batch_of(self, known: list[KnownGrid], rows: int) -> Grids:
        """As `batch`, of grids that were looked up. Where the largest budget does not hold so many patch rows, nothing
        is summed up: packs have sums of their own."""
        return Grids(known, self) if rows <= self._most_rows else Grids(known, self, ())

    def known(self, grid: Grid) -> KnownGrid:
        """What is known of an item of this grid.

        Raises:
            PatchError: for more patches than any item has.
        """
        known = self._known.get(grid)
        if known is None:
            if grid.patches > MOST_PATCHES:
                raise PatchError(
                    f"grid {grid.t}x{grid.h}x{grid.w} has {grid.patches} patches: no image or clip has more than "
                    f"{MOST_PATCHES}. Check the order and the unit of (t, h, w): they count patches."
                )
            counts = self._rule.counts(grid)
            size = tuple(counts.get(kind, 0) for kind in self._kinds)
            holds = bool(self._budgets) and fits(counts, self._budgets[-1].capacity)
            known = KnownGrid(grid, counts, size, load_of(counts, self._rule.load_sets), holds)
            if len(self._known) >= MOST_SIZES:
                self._known.clear()
            self._known[grid] = known
        return known

    def counts(self, grid: Grid) -> Counts:
        """Rows of each kind that one item fills."""
        return self.known(grid).counts

    def predicted(self, packs: Iterable[Pack]) -> float:
        """Predicted time of these packs, in the model's unit; infinite when one runs eager and eager was not timed."""
        return sum(self._predicted(pack) for pack in packs)

    def _predicted(self, pack: Pack) -> float:
        load = sum(self.known(piece.grid).load for piece in pack.pieces)
        long = self._rule.is_long(pack.counts)
        if pack.budget is None:
            return self._cost.eager(pack.counts["patch"], load, long)
        return self._cost.replay(pack.budget, load, long)

    def _several(self, grids: Grids, split: bool, eager: bool, came: int | None) -> Iterator[Pack]:
        """Packs of items that need not, or cannot, run in one; `came`: the `rows` of `packs`."""
        known, pieces = grids.known, None
        found = self._search(known) if self._budgets else None
        if found is None and split and self._rule.splits_by_frame:
            pieces = [part for piece in map(Piece, range(len(grids)), grids) for part in self._cut(piece)]
            known = [self.known(piece.grid) for piece in pieces]
        rows, groups = found or self._some_alone(known)
        check_rows(came, rows)
        for group, stretches, size, load, smallest in groups:
            together = Grids([known[at] for at in group], self, size, load)
            is_held = smallest < len(self._budgets)
            where = self._placed(together, smallest, eager) if is_held else self._nowhere(together.known[0])
            yield Pack.of_some(group, pieces, stretches, together, *where)

    def _search(self, known: Sequence[KnownGrid]) -> Searched | None:
        """The cheapest groups, in the order in which their first items came; see `search.search`."""
        if self._compiled_search is not None:
            return self._compiled_search(known)
        groups = search(self._prices, known)
        if groups is None:
            return None
        self.searched_in_python += 1
        return self._found(groups, known)

    def _some_alone(self, known: Sequence[KnownGrid]) -> Searched:
        """As `_search`, where what no budget holds is alone."""
        fitting = [at for at, own in enumerate(known) if own.fits]
        groups = [[at] for at, own in enumerate(known) if not own.fits]
        if fitting and (found := self._search([known[at] for at in fitting])):
            groups += [[fitting[i] for i in group] for group, *_ in found.groups]
        return self._found(groups, known)

    def _found(self, groups: Iterable[Iterable[int]], known: Sequence[KnownGrid]) -> Searched:
        """Groups with all that is said of them, in the order in which their first items came.

        Args:
            groups: of items, by index, in any order.
            known: per item.
        """
        starts = [0, *accumulate(own.patches for own in known)]
        return Searched(starts[-1], self._described(groups, known, starts))

    def _described(
        self, groups: Iterable[Iterable[int]], known: Sequence[KnownGrid], starts: Sequence[int]
    ) -> Iterator[Found]:
        for group in sorted(map(sorted, groups)):
            size, load = sums_of(sum(known[at].digits for at in group), len(self._kinds))
            yield group, Stretches.of_items(group, starts), size, load, self._smallest(size)

    def _smallest(self, size: Size) -> int:
        """Index of the smallest budget that holds this many rows; budgets grow in every kind."""
        found, budgets = 0, len(self._budgets)
        for column, n in zip(self._columns, size, strict=True):
            if column[found] < n:
                found = bisect_left(column, n, found)
                if found == budgets:
                    break
        return found

    def _placed(self, grids: Grids, smallest: int, eager: bool) -> tuple[Counts, int | None, str]:
        """Where a pack runs: its counts, its budget, and the reason why it runs in none.

        Args:
            grids: of the pack.
            smallest: the smallest budget that holds them.
            eager: whether it may run in none.
        """
        counts = dict(zip(self._kinds, grids.size, strict=True))
        if grids.size[self._rows] >= self._settled[eager][smallest]:
            return counts, smallest, ""
        load, long = grids.load, self._rule.is_long(counts)
        index, replay = self._cost.cheapest(smallest, load, long)
        if eager and self._cost.eager(counts["patch"], load, long) < EAGER_MARGIN * replay:
            return counts, None, EAGER_IS_FASTER
        return counts, index, ""

    def _nowhere(self, own: KnownGrid) -> tuple[Counts, None, str]:
        """As `_placed`, for an item that no budget holds."""
        if not self._budgets:
            return own.counts, None, "no budgets"
        return own.counts, None, f"larger than the largest budget in {exceeded(own.counts, self._budgets[-1].capacity)}"

    def _cut(self, piece: Piece) -> list[Piece]:
        """The item whole if it fits or not even one frame does, else in runs of as many frames as the largest budget
        holds."""
        item, grid = piece.item, piece.grid
        if self.known(grid).fits or not self.known(Grid(1, grid.h, grid.w)).fits:
            return [piece]
        frames = grid.t
        while not fits(self._rule.counts(Grid(frames, grid.h, grid.w)), self._budgets[-1].capacity):
            frames -= 1
        starts = range(0, grid.t, frames)
        return [Piece(item, Grid(min(frames, grid.t - first), grid.h, grid.w), first) for first in starts]


def check_rows(came: int | None, held: int) -> None:
    """Compares the patch rows that came for a batch, if that is known, with those that its grids hold.

    Raises:
        PatchError: other rows came than the grids hold.
    """
    if came is not None and came != held:
        raise PatchError(f"pixel_values has {came} rows, but the grids hold {held} patches.")
