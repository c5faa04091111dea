"""The search for the cheapest way to run items in several packs.

search.c finds the same, for where a millisecond counts: it also leaves out what cannot lead below what is found.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import accumulate, chain
from struct import Struct
from typing import Any, NamedTuple

import numpy as np

from vitgraph.core import KnownGrid
from vitgraph.planning.cost import EAGER_MARGIN, CostModel, are_long

Size = tuple[int, ...]
"""Rows of each kind, in one fixed order of kinds."""

Group = list[int]
"""Items that run together, by index."""

FoundGroup = tuple[Any, ...]
"""Of a group: where its items begin and end in `order`, and its stretches in `table`; the smallest budget that holds
it, one more than there are where none does; whether it is settled that it runs there, see `Prices`; whether it is one
segment or long ones; its load, and from number SIZE on its rows of each kind."""

SIZE = 8


class Searched(NamedTuple):
    """Groups of items that run together, in the order in which their first items came.

    Attributes:
        rows: patch rows of all items.
        order: the items of the first group, ascending, then those of the second, and so on.
        places: in this order where the items' metadata lies on the device, as requests hold it; NOWHERE unless that of
            all lies there.
        table: of the `Stretches` of the first group, then of the second, and so on.
        groups: what is known of each.
    """

    rows: int
    order: list[int]
    places: bytes
    table: bytes
    groups: list[FoundGroup]


COVERED, COVERS = 2, 512
MOST_EXHAUSTIVE = 256
NEAR_ENOUGH = 1.01


class Prices:
    """Least predicted time of running given rows in one budget.

    Args:
        cost: the model.
        columns: per kind the capacity of every budget, ascending.
        rows: index of the kind that counts patch rows.
        sets: per segment set the indexes of the kinds that count its rows and its segments.

    Attributes:
        columns, rows, sets: see above.
        largest: what the largest budget holds of each kind.
        smallest: per kind, for every number of rows the smallest budget that holds it; the last entry is for more than
            any.
        cheapest: for every smallest budget the one that its packs run in.
        fixed, slope, long_slope, long_fixed: as `CostModel`, one entry more than there are budgets: what fits none
            costs infinity.
        tells_long: whether packs of one or of long segments cost anything else than others.
        splits: by the smallest budget that holds all items, whether several packs may cost less.
        settled: by whether packs may run eager, per budget the patch rows from which a pack runs in it for certain that
            no smaller one holds.
        least_per_row, least_slope: no pack takes less per patch row, and less per unit of load.
        cover: no packs that together hold more than k << cover_bits patch rows take less than its number k, but for
            their load.
    """

    def __init__(
        self, cost: CostModel, columns: Sequence[Sequence[int]], rows: int, sets: Sequence[tuple[int, int]]
    ) -> None:
        numbers = [np.arange(column[-1] + 2) for column in columns]
        self.smallest = [np.searchsorted(column, rows) for column, rows in zip(columns, numbers, strict=True)]
        self.columns, self.rows, self.sets = columns, rows, sets
        self.largest = tuple(column[-1] for column in columns)
        self.fixed = np.append(np.asarray(cost.fixed, dtype=float), np.inf)
        self.slope = np.append(np.asarray(cost.slope, dtype=float), 0.0)
        self.long_slope = np.append(np.asarray(cost.long_slope or cost.slope, dtype=float), 0.0)
        self.long_fixed = np.append(np.asarray(cost.long_fixed or [0.0] * len(cost.fixed), dtype=float), 0.0)
        cheapest = [cost.cheapest(index, 0.0)[0] for index in range(len(cost.fixed))]
        self.cheapest = np.append(np.asarray(cheapest, dtype=int), len(cost.fixed))
        self.tells_long = bool((self.long_slope != self.slope).any() or self.long_fixed.any())
        least = self.fixed + np.minimum(self.long_fixed, 0.0)
        per_row = least[:-1] / np.maximum(np.asarray(cost.rows), 1) if cost.rows else np.zeros(0)
        # A pack of few rows in a budget of negative cost would cost less than any rate says.
        self.least_per_row = float(per_row.min(initial=np.inf)) if (least >= 0).all() else -np.inf
        self.least_slope = float(np.minimum(self.slope, self.long_slope)[:-1].min(initial=np.inf))
        budgets = range(len(cost.rows))
        self.cover_bits, self.cover = _cover(least[:-1], cost.rows)
        self.splits = [*map(cost.splitting_helps, budgets), True]  # what fits none needs several packs
        margins = {True: EAGER_MARGIN, False: None}
        self.settled = {eager: [cost.settled_from(at, margin) for at in budgets] for eager, margin in margins.items()}

    def of(self, sizes: np.ndarray, loads: np.ndarray) -> np.ndarray:
        """Times of packs of these sizes `[..., kinds]` and loads `[...]`."""
        found = [smallest.take(sizes[..., k], mode="clip") for k, smallest in enumerate(self.smallest)]
        index = self.cheapest[reduce(np.maximum, found)]
        long = are_long(*((sizes[..., rows], sizes[..., segments]) for rows, segments in self.sets))
        attention = np.where(long, self.long_slope[index] * loads + self.long_fixed[index], self.slope[index] * loads)
        return self.fixed[index] + attention

    def bound(self, sizes: np.ndarray, loads: np.ndarray) -> float:
        """No packing of these items can cost less."""
        rows = int(sizes[:, self.rows].sum())
        held = self.cover[min((rows - 1) >> self.cover_bits, len(self.cover) - 1)]
        return float(max(held, rows * self.least_per_row) + loads.sum() * self.least_slope)


def _cover(least: np.ndarray, rows: Sequence[int]) -> tuple[int, np.ndarray]:
    """`cover_bits` and `cover` of `Prices`, for up to COVERED times what the largest budget holds.

    Args:
        least: per budget, what no pack in it costs less than.
        rows: per budget.
    """
    if not len(rows) or (least < 0).any():
        return 0, np.full(1, -np.inf)
    most = COVERED * rows[-1]
    bits = (most // COVERS).bit_length()
    cover = np.zeros((most >> bits) + 1)
    for steps in range(len(cover)):
        rest = (steps << bits) - np.asarray(rows)  # less one row
        cover[steps] = (least + np.where(rest < 0, 0.0, cover[rest >> bits])).min()
    return bits, cover


def search(prices: Prices, known: Sequence[KnownGrid]) -> list[Group]:
    """Groups of items with the least predicted time among those of `cheapest_groups`.

    Args:
        prices: of packs.
        known: items that the largest budget holds.
    """
    order = sorted(range(len(known)), key=lambda at: -known[at].size[prices.rows])
    found = cheapest_groups(prices, [known[at].size for at in order], [known[at].load for at in order])
    return [[order[i] for i in group] for group in found]


def cheapest_groups(prices: Prices, sizes: Sequence[Size], loads: Sequence[float]) -> list[Group]:
    """Groups of items with the least predicted time among: best fit decreasing, ascending greedy, and, for up to
    MOST_EXHAUSTIVE items, every way of cutting the sorted items into runs.

    Args:
        prices: of packs.
        sizes: per item, largest first; each fits the largest budget.
        loads: per item.
    """
    if not sizes:
        return []
    table, load = np.asarray(sizes, dtype=np.int64), np.asarray(loads, dtype=float)

    def priced(groups: list[Group]) -> tuple[float, list[Group]]:
        items, starts = list(chain(*groups)), list(accumulate(map(len, groups[:-1]), initial=0))
        times = prices.of(np.add.reduceat(table[items], starts), np.add.reduceat(load[items], starts))
        return float(times.cumsum()[-1]), groups  # one after another: `sum` may add them in pairs

    found = [priced(best_fit(sizes, prices.largest)), priced(greedy(sizes, prices.largest))]
    if len(sizes) <= MOST_EXHAUSTIVE and min(cost for cost, _ in found) > NEAR_ENOUGH * prices.bound(table, load):
        found.append(priced(best_runs(prices, table, load)))
    return min(found, key=lambda one: one[0])[1]


def best_fit(sizes: Sequence[Size], largest: Size) -> list[Group]:
    """Best fit decreasing: each item joins the fullest pack that still holds it, or opens one."""
    full, *numbers = _as_numbers([largest, *sizes])
    guards = _guards(len(largest))
    groups: list[Group] = []
    room: list[int] = []
    for item, size in enumerate(numbers):
        best, least = len(groups), (full | guards) + 1  # more room than any pack has
        for group, free in enumerate(room):
            left = free - size
            if left < least and left & guards == guards:
                best, least = group, left
        if best == len(groups):
            groups.append([item])
            room.append((full | guards) - size)
        else:
            groups[best].append(item)
            room[best] = least
    return groups


def greedy(sizes: Sequence[Size], largest: Size) -> list[Group]:
    """Ascending greedy: the smallest items first, a new pack whenever the next one does not fit."""
    full, *numbers = _as_numbers([largest, *sizes])
    guards = _guards(len(largest))
    groups: list[Group] = []
    left = 0
    for item in range(len(sizes) - 1, -1, -1):
        left -= numbers[item]
        if not groups or left & guards != guards:
            groups.append([])
            left = (full | guards) - numbers[item]
        groups[-1].append(item)
    return groups


def _as_numbers(sizes: Sequence[Size]) -> list[int]:
    """Each size as one number, whose digits to the base of 2^64 are the rows of each kind, the first kind leading."""
    layout = Struct(f">{len(sizes[0])}Q")
    return [int.from_bytes(layout.pack(*size), "big") for size in sizes]


def _guards(kinds: int) -> int:
    """The highest bit of every digit: set in a size, all of them outlast the subtraction of what fits it, of nothing
    else."""
    return sum(1 << 64 * kind + 63 for kind in range(kinds))


def best_runs(prices: Prices, sizes: np.ndarray, loads: np.ndarray) -> list[Group]:
    """The cheapest cut of the items, in their order, into runs: dynamic programming over all of them.

    Args:
        prices: of packs.
        sizes: `[items, kinds]`.
        loads: `[items]`.
    """
    count = len(sizes)
    ends = np.concatenate([np.zeros((1, sizes.shape[1]), sizes.dtype), sizes.cumsum(0)])
    load_ends = np.concatenate([np.zeros(1), loads.cumsum()])
    # Every run of items, those that end first leading: one of item 0, two that end with item 1, ...
    last, first = np.tril_indices(count)
    price = prices.of(ends[last + 1] - ends[first], load_ends[last + 1] - load_ends[first])
    least, begin = np.zeros(count + 1), [0] * (count + 1)
    seen = 0
    for end in range(1, count + 1):
        options = least[:end] + price[seen : seen + end]
        begin[end] = int(options.argmin())
        least[end] = options[begin[end]]
        seen += end
    runs: list[Group] = []
    end = count
    while end:
        runs.append(list(range(begin[end], end)))
        end = begin[end]
    return runs
