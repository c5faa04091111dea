"""Packing: which items run together, and in which budget."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Protocol

from vitgraph.core import (
    MOST_PATCHES,
    STRETCH_BYTES,
    Counts,
    Grid,
    Grids,
    KnownGrid,
    Pack,
    Piece,
    Stretches,
    exceeded,
    fits,
    places_of,
)
from vitgraph.errors import PatchError
from vitgraph.planning.budgets import Budget
from vitgraph.planning.compiled_search import begin_building, compiled_search
from vitgraph.planning.cost import EAGER_MARGIN, CostModel, are_long, load_of
from vitgraph.planning.search import SIZE, FoundGroup, Prices, Searched, Size, search

EAGER_IS_FASTER = "eager is predicted to be faster"
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
        """As `plan`, each made when it is asked for: the one before may run meanwhile.

        Args:
            grids, split, eager: see `plan`.
            rows: patch rows that came with the grids, if somebody shall compare.

        Raises:
            PatchError: before the first pack, where the grids hold another number, or more than any batch has.
        """
        grids = self.batch(grids)
        known, pieces = grids.known, None
        found = self.find(known, eager)
        if found is None and split and self._rule.splits_by_frame:
            pieces = [part for piece in map(Piece, range(len(grids)), grids) for part in self._cut(piece)]
            known = [self.known(piece.grid) for piece in pieces]
        found = found or self._some_alone(known, eager)
        check_rows(rows, found.rows)
        yield from self.packs_of(found, known, pieces, eager)

    def packs_of(
        self, found: Searched, known: list[KnownGrid], pieces: Sequence[Piece] | None, eager: bool
    ) -> Iterator[Pack]:
        """The packs that were found, each made when it is asked for.

        Args:
            found: by `find`.
            known: per item, or per piece.
            pieces: that the items were cut into; None where none was.
            eager: see `plan`.
        """
        for group in found.groups:
            begin, end, first, last, smallest, settled, long, load = group[:SIZE]
            chosen, table = found.order[begin:end], found.table[first * STRETCH_BYTES : last * STRETCH_BYTES]
            counts = self.counts_of(group) if self._budgets else known[chosen[0]].counts  # then each item is alone
            where = (smallest, "") if settled else self.placed(counts, load, long, smallest, eager)
            yield Pack.of_some(chosen, pieces, Stretches(table), Grids(known, self, chosen), counts, *where)

    def counts_of(self, group: FoundGroup) -> Counts:
        """Rows of each kind that a group fills."""
        return dict(zip(self._kinds, group[SIZE:], strict=True))

    def batch(self, grids: Sequence[Grid]) -> Grids:
        """The grids with what this planner knows of them; they themselves where they have it already."""
        if isinstance(grids, Grids) and grids.owner is self:
            return grids
        return self.batch_of([self.known(grid) for grid in grids])

    def batch_of(self, known: list[KnownGrid]) -> Grids:
        """As `batch`, of grids that were looked up."""
        return Grids(known, self)

    def known(self, grid: Grid) -> KnownGrid:
        """What is known of an item of this grid.

        Raises:
            PatchError: for more patches than any item has.
        """
        known = self._known.get(grid)
        if known is None:
            if grid.patches > MOST_PATCHES:
                raise PatchError(
                    f"grid {grid.t}x{grid.h}x{grid.w} has {grid.patches} patches: no image or clip may have more than "
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

    def find(self, known: Sequence[KnownGrid], eager: bool) -> Searched | None:
        """What runs together: all items where several packs cannot cost less, else the cheapest groups.

        Args:
            known: per item.
            eager: whether packs may run eager.

        Returns:
            None without items, and where one exceeds the largest budget, or all together what any batch has.
        """
        if not known or not self._budgets:
            return None
        if self._compiled_search is not None:
            return self._compiled_search(known, eager)
        if not all(own.fits for own in known) or sum(own.patches for own in known) > MOST_PATCHES:
            return None
        if not self._prices.splits[self._smallest(_sum(known))]:
            return self._found([range(len(known))], known, eager)
        self.searched_in_python += 1
        return self._found(search(self._prices, known), known, eager)

    def _some_alone(self, known: Sequence[KnownGrid], eager: bool) -> Searched:
        """As `find`, where what no budget holds is alone."""
        fitting = [at for at, own in enumerate(known) if own.fits]
        groups = [[at] for at, own in enumerate(known) if not own.fits]
        if fitting and (found := self.find([known[at] for at in fitting], eager)):
            groups += [[fitting[at] for at in found.order[begin:end]] for begin, end, *_ in found.groups]
        return self._found(groups, known, eager)

    def _found(self, chosen: Iterable[Iterable[int]], known: Sequence[KnownGrid], eager: bool) -> Searched:
        """Groups with all that is said of them.

        Args:
            chosen: their items by index, in any order.
            known, eager: see `find`.

        Raises:
            PatchError: for more patches than any batch has.
        """
        starts = [0, *accumulate(own.patches for own in known)]
        if starts[-1] > MOST_PATCHES:
            raise PatchError(
                f"{len(known)} items have {starts[-1]} patches: no batch may have more than {MOST_PATCHES}. Plan fewer "
                "items at a time."
            )
        order: list[int] = []
        table, groups = b"", []
        for group in sorted(map(sorted, chosen)):
            begin, first = len(order), len(table) // STRETCH_BYTES
            order += group
            table += Stretches.of_items(group, starts).table
            own = [known[at] for at in group]
            size, load = _sum(own), sum(one.load for one in own)
            smallest = self._smallest(size)
            settled = smallest < len(self._budgets) and size[self._rows] >= self._prices.settled[eager][smallest]
            long = bool(are_long(*((size[rows], size[segments]) for rows, segments in self._sets)))
            ends = begin, len(order), first, len(table) // STRETCH_BYTES
            groups.append((*ends, smallest, settled, long, load, *size))
        return Searched(starts[-1], order, places_of([known[at] for at in order]), table, groups)

    def _smallest(self, size: Size) -> int:
        """Index of the smallest budget that holds this many rows; budgets grow in every kind."""
        found, budgets = 0, len(self._budgets)
        for column, n in zip(self._columns, size, strict=True):
            if column[found] < n:
                found = bisect_left(column, n, found)
                if found == budgets:
                    break
        return found

    def placed(self, counts: Counts, load: float, long: bool, smallest: int, eager: bool) -> tuple[int | None, str]:
        """The budget of a pack, and the reason why it runs in none.

        Args:
            counts: of the pack.
            load: of the pack.
            long: whether it is of one or of long segments.
            smallest: the smallest budget that holds it, one more than there are where none does.
            eager: whether it may run in none.
        """
        if not self._budgets:
            return None, "no budgets"
        if smallest == len(self._budgets):
            return None, f"larger than the largest budget in {exceeded(counts, self._budgets[-1].capacity)}"
        index, replay = self._cost.cheapest(smallest, load, long)
        if eager and self._cost.eager(counts["patch"], load, long) < EAGER_MARGIN * replay:
            return None, EAGER_IS_FASTER
        return index, ""

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


def _sum(known: Iterable[KnownGrid]) -> Size:
    """Size of items together."""
    return tuple(map(sum, zip(*(own.size for own in known), strict=True)))


def check_rows(came: int | None, held: int) -> None:
    """Compares the patch rows that came for a batch, if that is known, with those that its grids hold.

    Raises:
        PatchError: other rows came than the grids hold.
    """
    if came is not None and came != held:
        raise PatchError(f"pixel_values has {came} rows, but the grids hold {held} patches.")
