"""Timing of budgets after capture: the numbers behind the cost model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vitgraph.core import Grid
from vitgraph.engine.agenda import MOST_SECONDS, SECONDS, Timer, in_time, worth_timing
from vitgraph.engine.fillings import fillings, load, usual_items
from vitgraph.models.contract import TowerSpec
from vitgraph.planning.budgets import Budget
from vitgraph.planning.cost import CostModel

EAGER_POINTS = 5
SMOOTHED = 3
"""A slope is the mean of so many."""


def measure_costs(
    spec: TowerSpec,
    budgets: Sequence[Budget],
    captured: Sequence[int],
    timer: Timer,
    seconds: float = SECONDS,
    most_seconds: float = MOST_SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> CostModel:
    """Times the eager forward at a few sizes, captured budgets, and the attention's part of some of them.

    As many budgets are timed as take `seconds`, evenly spread as ratios; the others are interpolated, and so are the
    slopes of most. A budget's timings follow each other: a slope is a small difference of two of them.

    Args:
        spec: of the tower.
        budgets: ascending.
        captured: indexes of budgets that have a graph, ascending; at least one.
        timer: runs and times.
        seconds: for the replays.
        most_seconds: for everything, by `clock`.
        clock: in seconds.
    """
    end = clock() + most_seconds
    eager_times = _eager_times(spec, budgets, timer)
    rows = np.array([budget.capacity["patch"] for budget in budgets])
    found = _time_budgets(spec, budgets, captured, timer, seconds, lambda: end - clock())
    slope = _spread(rows, _smooth(found.slope) or {captured[-1]: 0.0})
    fixed = _spread(rows, {at: max(found.usual[at] - slope[at] * found.load[at], 0.0) for at in found.usual})
    eager = _eager_curve(spec, eager_times, slope)
    eager_rows, eager_time = zip(*eager, strict=True) if eager else ((), ())
    for index in set(range(len(budgets))) - set(captured):
        # Without a graph a budget runs the same forward launch by launch.
        fixed[index] = float(np.interp(rows[index], eager_rows, eager_time)) if eager else float("inf")
    long_slope: Sequence[float] = ()
    long_fixed: Sequence[float] = ()
    if found.long:
        # Where a budget has one graph, a pack of one segment runs in it as any other.
        has_long = [timer.long(index) for index in range(len(budgets))]
        steep, beside = _long_lines(rows, found)
        long_slope, long_fixed = np.where(has_long, steep, slope).tolist(), np.where(has_long, beside, 0.0).tolist()
    return CostModel(
        fixed=tuple(fixed.tolist()),
        slope=tuple(slope.tolist()),
        long_slope=tuple(long_slope),
        long_fixed=tuple(long_fixed),
        rows=tuple(map(int, rows)),
        eager_rows=tuple(eager_rows),
        eager_time=tuple(eager_time),
        measured=tuple(index in found.usual for index in range(len(budgets))),
    )


class _Timings(NamedTuple):
    """By index of budget.

    Attributes:
        usual, load: microseconds and load of usual images.
        slope: microseconds per rows^2, from large images.
        long: of the graph for packs of one or of long segments, for one segment and, where they fit, for several long
            ones: the load, and microseconds beyond what the budget takes without attention.
    """

    usual: dict[int, float]
    load: dict[int, float]
    slope: dict[int, float]
    long: dict[int, list[tuple[float, float]]]


def _time_budgets(
    spec: TowerSpec,
    budgets: Sequence[Budget],
    captured: Sequence[int],
    timer: Timer,
    seconds: float,
    left: Callable[[], float],
) -> _Timings:
    """Times what is worth it; for the arguments see `measure_costs`.

    Args:
        spec, budgets, captured, timer, seconds: see there.
        left: seconds that are left for everything.
    """
    found = _Timings({}, {}, {}, {})
    filled = {index: fillings(spec, budgets[index], timer.long(index)) for index in captured}

    def time_usual(index: int) -> float:
        if index not in found.usual:
            grids = filled[index].usual
            found.usual[index], found.load[index] = timer.replay(index, grids), load(spec, grids)
        return found.usual[index]

    longest, shortest = time_usual(captured[-1]), time_usual(captured[0])
    telling = {index: (int(bool(own.large)), len(own.long)) for index, own in filled.items()}
    runs = worth_timing(_expected(budgets, captured, shortest, longest), seconds, telling)
    for index in in_time(runs, left, timer):
        usual = time_usual(index)
        if runs[index].large:
            more = timer.replay(index, filled[index].large) - usual
            found.slope[index] = max(more, 0.0) / (load(spec, filled[index].large) - found.load[index])
        if runs[index].long:
            fixed = usual - found.slope[index] * found.load[index]
            found.long[index] = [
                (load(spec, grids), timer.replay(index, grids, long=True) - fixed) for grids in filled[index].long
            ]
    return found


def _expected(budgets: Sequence[Budget], captured: Sequence[int], shortest: float, longest: float) -> dict[int, float]:
    """Seconds of one replay of every captured budget, on a line through the microseconds of the smallest and of the
    largest."""
    rows = [budgets[index].capacity["patch"] for index in captured]
    line = np.interp(rows, [rows[0], rows[-1]], [min(shortest, longest), longest])
    return {index: float(each) / 1e6 for index, each in zip(captured, line, strict=True)}


def _long_lines(rows: np.ndarray, found: _Timings) -> tuple[np.ndarray, np.ndarray]:
    """What packs of one or of long segments take at every budget: the slope, and what comes beside the fixed time.

    The slope is that of one line through everything that was timed: a kernel for long segments takes some time beside
    what grows with the load. Where that would be less than nothing, a budget has a line of its own, through zero and
    between its points.
    """
    points = [(load, beyond, found.usual[at]) for at, several in found.long.items() for load, beyond in several]
    common = 0.0
    if len(points) > 1:
        loads, times, usual = np.array(points).T
        common = float(np.polyfit(loads, times, 1, w=1 / usual)[0])
    slopes: dict[int, float] = {}
    beside: dict[int, float] = {}
    for index, several in found.long.items():
        squares, beyond = map(sum, zip(*several, strict=True))
        rest = (beyond - common * squares) / len(several)
        is_cost = common > 0 and rest >= 0
        slopes[index], beside[index] = (common, rest) if is_cost else (max(beyond / squares, 0.0), 0.0)
    return _spread(rows, slopes), _spread(rows, beside)


def _smooth(known: Mapping[int, float]) -> dict[int, float]:
    """The mean of each and its neighbours: large images that fill a budget to the last tile load it less than what most
    packs are made of, others more."""
    indexes = sorted(known)
    width = min(SMOOTHED, len(indexes))
    first = [min(max(at - width // 2, 0), len(indexes) - width) for at in range(len(indexes))]
    return {
        index: sum(known[near] for near in indexes[begin : begin + width]) / width
        for index, begin in zip(indexes, first, strict=True)
    }


def _eager_times(spec: TowerSpec, budgets: Sequence[Budget], timer: Timer) -> list[tuple[int, Sequence[Grid], float]]:
    """Some budgets, usual items in each, and the microseconds that they take. The largest comes first, and once before
    for what a first run does: what is timed after the smallest finds a GPU that waited for the host."""
    spaced = reversed(_spaced(range(len(budgets)), EAGER_POINTS))
    filled = [(index, grids) for index in spaced if (grids := usual_items(spec, budgets[index]))]
    for _, grids in filled[:1]:
        timer.eager(grids)
    return [(index, grids, timer.eager(grids)) for index, grids in filled]


def _eager_curve(
    spec: TowerSpec, times: Sequence[tuple[int, Sequence[Grid], float]], slope: np.ndarray
) -> list[tuple[int, float]]:
    """(rows, microseconds at no load), rows ascending."""
    curve = {}
    for index, grids, time_us in times:
        rows = sum(spec.counts(grid)["patch"] for grid in grids)
        curve[rows] = max(time_us - slope[index] * load(spec, grids), 0.0)
    return sorted(curve.items())


def _spaced(indexes: Sequence[int], points: int) -> list[int]:
    """Some of the indexes, the first and the last among them."""
    chosen = np.linspace(0, len(indexes) - 1, min(points, len(indexes))).round().astype(int)
    return [indexes[i] for i in dict.fromkeys(chosen)]


def _spread(rows: np.ndarray, known: dict[int, float]) -> np.ndarray:
    """Values at every budget, on lines through the known ones."""
    indexes = sorted(known)
    return np.interp(rows, rows[indexes], [known[i] for i in indexes])
