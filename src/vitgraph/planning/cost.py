"""What packs cost: microseconds, measured after capture or guessed from sizes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import and_
from typing import Any

import numpy as np

from vitgraph.core import Counts
from vitgraph.planning.budgets import Budget

FLOOR_TOKENS = 192
"""A guess: launching a graph of any size costs as much as computing this many tokens."""

EAGER_MARGIN = 0.97
"""Eager must take less than this share of the replay: it keeps the host busy and needs memory of its own."""

SPLIT_MARGIN = 0.97
SPLIT_US = 500.0
"""What fits one pack is split only for a gain beyond the noise of timings, and beyond what the search takes in Python:
where it runs compiled, in a tenth of that, plans are the same."""

LONG_ROWS = 3072
"""Mean length from which a pack's segments are long: there the kernels of packs of one segment suit several as well."""


@dataclass(frozen=True)
class CostModel:
    """Predicted time of a pack in microseconds.

    A replay costs what its budget costs without attention, and its attention: `fixed[budget] + slope[budget] * load`.
    The load of a pack is the sum of its squared segment lengths, in rows^2, over the segment sets that no window
    bounds: full attention is quadratic in the segment, everything else linear in the rows. A pack of one segment, or of
    long ones, may have a faster kernel, and then a slope of its own and a time beside `fixed`: such a kernel gains with
    the length of the segments.

    Attributes:
        fixed: per budget, ascending as the budgets.
        slope: microseconds per rows^2 of load, per budget.
        rows: patch rows per budget.
        long_slope: as `slope`, for packs of one or of long segments; empty when there is no difference.
        long_fixed: what such packs take beside `fixed`, per budget; empty: nothing.
        eager_rows, eager_time: curve of the eager forward at no load, piecewise linear; empty: eager is never chosen.
        measured: per budget whether it was timed; the others lie on lines between their neighbours.
        unit: "us", or "token" for a guess that only ranks plans.
    """

    fixed: tuple[float, ...]
    slope: tuple[float, ...]
    rows: tuple[int, ...]
    eager_rows: tuple[int, ...] = ()
    eager_time: tuple[float, ...] = ()
    measured: tuple[bool, ...] = ()
    long_slope: tuple[float, ...] = ()
    long_fixed: tuple[float, ...] = ()
    unit: str = "us"

    @classmethod
    def guess(cls, budgets: Sequence[Budget]) -> CostModel:
        """Before anything was measured: as many tokens as the budget has, and a floor for every replay."""
        fixed = tuple(float(budget.tokens + FLOOR_TOKENS) for budget in budgets)
        rows = tuple(budget.capacity["patch"] for budget in budgets)
        return cls(fixed, (0.0,) * len(fixed), rows, measured=(False,) * len(fixed), unit="token")

    def replay(self, budget: int, load: float, long: bool = False) -> float:
        """Time of a replay of the budget with this load; `long`: of one segment, or of long ones."""
        return self.fixed[budget] + self._attention(budget, load, long)

    def _attention(self, budget: int, load: float, long: bool) -> float:
        slope, begin = self._line(budget, long)
        return slope * load + begin

    def _line(self, budget: int, long: bool) -> tuple[float, float]:
        """Of attention's time by its load: the slope, and where it begins."""
        if not (long and self.long_slope):
            return self.slope[budget], 0.0
        return self.long_slope[budget], self.long_fixed[budget] if self.long_fixed else 0.0

    def eager(self, rows: int, load: float, long: bool = False) -> float:
        """Time of the eager forward on buffers of exactly `rows` patch rows; infinite where no curve is known."""
        if not self.eager_rows:
            return float("inf")
        nearest = min(bisect_left(self.rows, rows), len(self.rows) - 1)
        return self._eager_fixed(rows) + self._attention(nearest, load, long)

    def _eager_fixed(self, rows: int) -> float:
        known, times = self.eager_rows, self.eager_time
        after = bisect_left(known, rows)
        if after == 0 or len(known) == 1:
            return times[0]
        if after == len(known):
            per_row = max(times[-1] - times[-2], 0.0) / (known[-1] - known[-2])
            return times[-1] + per_row * (rows - known[-1])
        share = (rows - known[after - 1]) / (known[after] - known[after - 1])
        return times[after - 1] + share * (times[after] - times[after - 1])

    def cheapest(self, first: int, load: float, long: bool = False) -> tuple[int, float]:
        """The budget with the least time among `first` and the larger ones, and that time: a few rows more may fill the
        GPU better."""
        time = self.replay(first, load, long)
        best = self._cheapest_from[first]
        if best == first:
            return first, time
        other = self.replay(best, load, long)
        return (best, other) if other < time else (first, time)

    def settled_from(self, budget: int, eager_margin: float | None) -> float:
        """Patch rows from which every pack whose smallest budget this is runs best in it: no larger one is ever
        cheaper, and eager never takes less than `eager_margin` of its time. Infinite where there is no telling.

        Args:
            budget: its index.
            eager_margin: see above; None: nothing runs eager.
        """
        if self._cheapest_from[budget] != budget:
            return float("inf")
        # A pack of fewer rows than the budget below holds has too much of something else.
        fewest = (0, self.rows[budget - 1] + 1) if budget else (0,)
        slower = (rows for rows in fewest if eager_margin is None or self._eager_is_slower(rows, budget, eager_margin))
        return next(slower, float("inf"))

    def _eager_is_slower(self, fewest: int, budget: int, margin: float) -> bool:
        """Whether eager takes no less than `margin` of a replay, whatever the load, for any number of rows from
        `fewest` to what the budget holds."""
        if not self.eager_rows:
            return True
        most = self.rows[budget]
        between = [time for rows, time in zip(self.eager_rows, self.eager_time, strict=True) if fewest <= rows <= most]
        least = min(self._eager_fixed(fewest), self._eager_fixed(most), *between)
        for long in (False, True):
            own, beside = self._line(budget, long)
            for other in range(bisect_left(self.rows, fewest), budget + 1):
                slope, other_beside = self._line(other, long)
                if slope < margin * own or least + other_beside < margin * (self.fixed[budget] + beside):
                    return False
        return True

    @cached_property
    def _cheapest_from(self) -> tuple[int, ...]:
        best = len(self.fixed) - 1
        found = [best]
        for index in range(len(self.fixed) - 2, -1, -1):
            best = index if self.fixed[index] <= self.fixed[best] else best
            found.append(best)
        return tuple(reversed(found))

    def splitting_helps(self, budget: int) -> bool:
        """Whether several smaller budgets that hold as many rows may cost less than this one, by SPLIT_MARGIN and, if
        the model was measured, by SPLIT_US."""
        return self._splits[budget]

    @cached_property
    def _splits(self) -> tuple[bool, ...]:
        rows, fixed = np.asarray(self.rows), np.asarray(self.fixed)
        # cover[k]: no choice of budgets that together hold one row more than budget k - 1 costs less.
        cover = np.minimum.accumulate(fixed[::-1])[::-1].copy()
        helps, worth = [False], SPLIT_US if self.unit == "us" else 0.0
        for index in range(1, len(rows)):
            # A pack in this budget has more rows than the budget below it holds, or it would run there.
            rest = np.searchsorted(rows, rows[index - 1] + 1 - rows[:index])
            several = (fixed[:index] + cover[rest]).min()
            helps.append(bool(several < min(SPLIT_MARGIN * fixed[index], fixed[index] - worth)))
            cover[index] = min(cover[index], several)
        return tuple(helps)

    @property
    def crossover(self) -> int | None:
        """Patch rows of the smallest budget at which an exactly filled eager run is predicted to be as fast as its
        replay, at no load; None when a graph is faster everywhere or eager was not timed."""
        if not self.eager_rows:
            return None
        pairs = zip(self.rows, self.fixed, strict=True)
        return next((rows for rows, time in pairs if self._eager_fixed(rows) <= time), None)


def segments_are_long(rows: int, segments: int) -> bool:
    """As `are_long`, for the numbers of one set."""
    return segments == 1 or rows >= LONG_ROWS * segments > 0


def are_long(*sets: tuple[Any, Any]) -> Any:
    """Whether a pack is one segment, or its segments have LONG_ROWS rows on average, in every segment set.

    Args:
        sets: rows and segments of each set, as numbers or as arrays of the same shape, of several packs.
    """
    return reduce(and_, [(n == 1) | ((n > 0) & (rows >= LONG_ROWS * n)) for rows, n in sets], True)


def load_of(counts: Counts, sets: Sequence[tuple[str, str]]) -> int:
    """Sum of squared segment lengths of one item, in rows^2, whose segments are of equal length.

    Args:
        counts: of the item.
        sets: per segment set the kinds that count its rows and its segments.
    """
    return sum(counts[rows] ** 2 // max(counts[segments], 1) for rows, segments in sets)
