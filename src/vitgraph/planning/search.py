"""The search for the cheapest way to run items in several packs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vitgraph.planning.cost import CostModel, are_long

Size = tuple[int, ...]
"""Rows of each kind, in one fixed order of kinds."""

Group = list[int]
"""Items that run together, by index."""

MOST_EXHAUSTIVE = 256
NEAR_ENOUGH = 1.01


class Prices:
    """Least predicted time of running given rows in one budget.

    Args:
        cost: the model.
        columns: per kind the capacity of every budget, ascending.
        rows: index of the kind that counts patch rows.
        sets: per segment set the indexes of the kinds that count its rows and its segments.
    """

    def __init__(
        self, cost: CostModel, columns: Sequence[Sequence[int]], rows: int, sets: Sequence[tuple[int, int]]
    ) -> None:
        self._columns = [np.asarray(column) for column in columns]
        self._rows, self._sets = rows, sets
        self.largest = tuple(column[-1] for column in columns)
        # One entry more than there are budgets: what fits none costs infinity.
        self._fixed = np.append(np.asarray(cost.fixed, dtype=float), np.inf)
        self._slope = np.append(np.asarray(cost.slope, dtype=float), 0.0)
        self._long_slope = np.append(np.asarray(cost.long_slope or cost.slope, dtype=float), 0.0)
        self._long_fixed = np.append(np.asarray(cost.long_fixed or [0.0] * len(cost.fixed), dtype=float), 0.0)
        cheapest = [cost.cheapest(index, 0.0)[0] for index in range(len(cost.fixed))]
        self._cheapest = np.append(np.asarray(cheapest, dtype=int), len(cost.fixed))
        per_row = self._fixed[:-1] / np.maximum(np.asarray(cost.rows), 1) if cost.rows else np.zeros(0)
        self._least_per_row = float(per_row.min(initial=np.inf))
        self._least_slope = float(np.minimum(self._slope, self._long_slope)[:-1].min(initial=np.inf))

    def of(self, sizes: np.ndarray, loads: np.ndarray) -> np.ndarray:
        """Times of packs of these sizes `[..., kinds]` and loads `[...]`."""
        found = [np.searchsorted(column, sizes[..., k]) for k, column in enumerate(self._columns)]
        index = self._cheapest[np.max(found, axis=0)]
        long = are_long(*((sizes[..., rows], sizes[..., segments]) for rows, segments in self._sets))
        attention = np.where(
            long, self._long_slope[index] * loads + self._long_fixed[index], self._slope[index] * loads
        )
        return self._fixed[index] + attention

    def bound(self, sizes: np.ndarray, loads: np.ndarray) -> float:
        """No packing of these items can cost less."""
        return float(sizes[:, self._rows].sum() * self._least_per_row + loads.sum() * self._least_slope)


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

    def price(groups: list[Group]) -> float:
        rows = np.stack([table[group].sum(0) for group in groups])
        return float(prices.of(rows, np.array([load[group].sum() for group in groups])).sum())

    candidates = [best_fit(sizes, prices.largest), greedy(sizes, prices.largest)]
    costs = [price(groups) for groups in candidates]
    if len(sizes) <= MOST_EXHAUSTIVE and min(costs) > NEAR_ENOUGH * prices.bound(table, load):
        candidates.append(best_runs(prices, table, load))
        costs.append(price(candidates[-1]))
    return candidates[int(np.argmin(costs))]


def best_fit(sizes: Sequence[Size], largest: Size) -> list[Group]:
    """Best fit decreasing: each item joins the fullest pack that still holds it, or opens one."""
    groups: list[Group] = []
    room: list[list[int]] = []
    for item, size in enumerate(sizes):
        holding = [g for g, free in enumerate(room) if all(n <= f for n, f in zip(size, free, strict=True))]
        if not holding:
            groups.append([])
            room.append(list(largest))
            holding = [len(room) - 1]
        best = min(holding, key=lambda g: room[g])
        groups[best].append(item)
        room[best] = [f - n for n, f in zip(size, room[best], strict=True)]
    return groups


def greedy(sizes: Sequence[Size], largest: Size) -> list[Group]:
    """Ascending greedy: the smallest items first, a new pack whenever the next one does not fit."""
    groups: list[Group] = []
    room: list[int] = []
    for item in range(len(sizes) - 1, -1, -1):
        if not groups or any(n > f for n, f in zip(sizes[item], room, strict=True)):
            groups.append([])
            room = list(largest)
        groups[-1].append(item)
        room = [f - n for n, f in zip(sizes[item], room, strict=True)]
    return groups


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
    # price[i, j]: items i to j - 1 in one pack. Runs with j <= i hold nothing and are never asked for.
    price = prices.of(np.maximum(ends[None] - ends[:, None], 0), np.maximum(load_ends[None] - load_ends[:, None], 0.0))
    least, first = np.zeros(count + 1), np.zeros(count + 1, dtype=int)
    for j in range(1, count + 1):
        options = least[:j] + price[:j, j]
        first[j] = int(options.argmin())
        least[j] = options[first[j]]
    runs: list[Group] = []
    end = count
    while end:
        runs.append(list(range(first[end], end)))
        end = int(first[end])
    return runs
