"""Timing of budgets after capture: the numbers behind the cost model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from heapq import heappop, heappush
from itertools import cycle
from math import isqrt, log
from typing import NamedTuple, Protocol

import numpy as np

from vitgraph.core import Grid, fits, sum_counts
from vitgraph.errors import PatchError
from vitgraph.models.contract import TowerSpec
from vitgraph.planning.budgets import Budget
from vitgraph.planning.cost import CostModel, load_of

SECONDS, MOST_SECONDS = 0.82, 1.8
"""Time for replays, and for all that is done here. Rests, staging and eager runs take as much as replays, or more where
the host is slow: then fewer budgets are timed."""
REST_SHARE = 0.5
"""Before a replay the GPU rests for this share of the time of the replay before."""

USUAL_TOKENS, LARGE_TOKENS = 100, (441, 1024)
SLOPE_POINTS, LONG_POINTS = 26, 8
"""Budgets whose slope is measured, and those among them where that of a second graph is, too, which takes longer."""
EAGER_POINTS = 5
EAGER_RUNS = 2


class Timer(Protocol):
    """What is timed, in microseconds of one run of a budget filled with items of these grids.

    Attributes:
        seconds: that all replays took the GPU, rests included.
    """

    seconds: float

    def replay(self, budget: int, grids: Sequence[Grid], long: bool = False) -> float: ...

    def long(self, budget: int) -> bool: ...

    def eager(self, grids: Sequence[Grid]) -> float: ...


class Runs(NamedTuple):
    """Replays that are planned.

    Attributes:
        replays: how many.
        seconds: of the GPU, all together; a guess.
    """

    replays: int
    seconds: float

    def takes(self, host: float) -> float:
        """Seconds of all of them with their rests, on a host that takes so many beside each."""
        return (1 + REST_SHARE) * self.seconds + host * self.replays


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
    longest = timer.replay(captured[-1], usual_items(spec, budgets[captured[-1]]))
    chosen = _worth_timing(captured, CostModel.guess(budgets).fixed, longest / 1e6, seconds, timer)
    probed, probed_long = [*chosen][:SLOPE_POINTS], [*chosen][:LONG_POINTS]
    times: dict[int, float] = {}
    loads: dict[int, float] = {}
    slopes: dict[int, float] = {}
    long: dict[int, float] = {}
    beside: dict[int, float] = {}
    for index in _in_time(chosen, end, clock, timer):
        grids = usual_items(spec, budgets[index])
        times[index], loads[index] = timer.replay(index, grids), _load(spec, grids)
        found = _slope(spec, budgets[index], index, times[index], loads[index], timer) if index in probed else None
        if found is None:
            continue
        slopes[index] = found
        if index in probed_long:
            rest = times[index] - found * loads[index]
            long[index], beside[index] = _long_slope(spec, budgets[index], index, found, rest, timer)
    slopes = slopes or {captured[-1]: 0.0}
    rows = np.array([budget.capacity["patch"] for budget in budgets])
    slope = _spread(rows, slopes)
    fixed = _spread(rows, {i: max(times[i] - slope[i] * loads[i], 0.0) for i in times})
    eager = _eager_curve(spec, eager_times, slope)
    eager_rows, eager_time = zip(*eager, strict=True) if eager else ((), ())
    for index in set(range(len(budgets))) - set(captured):
        # Without a graph a budget runs the same forward launch by launch.
        fixed[index] = float(np.interp(rows[index], eager_rows, eager_time)) if eager else float("inf")
    return CostModel(
        fixed=tuple(map(float, fixed)),
        slope=tuple(map(float, slope)),
        long_slope=tuple(map(float, _spread(rows, long))) if any(map(timer.long, long)) else (),
        long_fixed=tuple(map(float, _spread(rows, beside))) if any(map(timer.long, long)) else (),
        rows=tuple(map(int, rows)),
        eager_rows=tuple(eager_rows),
        eager_time=tuple(eager_time),
        measured=tuple(index in times for index in range(len(budgets))),
    )


def _worth_timing(
    captured: Sequence[int], guessed: Sequence[float], longest: float, seconds: float, timer: Timer
) -> dict[int, Runs]:
    """Budgets to time: as many of those that `refining` names, in its order, as there is time for; at least two.

    Args:
        captured: indexes of budgets.
        guessed: time of every budget, in any unit.
        longest, seconds: time of the last one, and of all.
        timer: knows which of them have two graphs.
    """
    chosen: dict[int, Runs] = {}
    for index in refining(captured, guessed):
        replays = 1 + (len(chosen) < SLOPE_POINTS) + 2 * (len(chosen) < LONG_POINTS and timer.long(index))
        runs = Runs(replays, replays * longest * guessed[index] / guessed[captured[-1]])
        seconds -= runs.seconds
        if seconds < 0 and len(chosen) >= 2:
            break
        chosen[index] = runs
    return chosen


def _in_time(chosen: dict[int, Runs], end: float, clock: Callable[[], float], timer: Timer) -> Iterator[int]:
    """The largest budget, then the smallest and the largest of the others in turn, each when the one before is timed.
    Those that `refining` named last are left out where the time would not suffice at the pace so far, but never the
    smallest.

    With its replays of one segment the largest exceeds its guess most. Timed last, nothing could make up for that. And
    several large ones in a row would lower the GPU's clock further than a pack does that comes alone.

    Args:
        chosen: from `_worth_timing`.
        end: until when all should be timed, by `clock`.
        clock: in seconds.
        timer: times them.
    """
    begin, before = clock(), timer.seconds
    largest, *todo = chosen
    ends = cycle((min, max))
    done = chosen[largest].replays
    yield largest
    while todo:
        index = next(ends)(todo)
        todo.remove(index)
        yield index
        now, done = clock(), done + chosen[index].replays
        host = max(now - begin - (timer.seconds - before), 0.0) / done
        while todo and now + sum(chosen[at].takes(host) for at in todo) > end:
            todo.pop()


def refining(indexes: Sequence[int], guessed: Sequence[float]) -> Iterator[int]:
    """All indexes: the last and the first, then again and again the middle of the widest gap, as a ratio of guessed
    times.

    Args:
        indexes: of budgets, ascending.
        guessed: time of every budget, ascending, in any unit.
    """
    places = [log(guessed[index]) for index in indexes]
    yield indexes[-1]
    if len(indexes) > 1:
        yield indexes[0]
    gaps: list[tuple[float, int, int]] = []

    def open_gap(low: int, high: int) -> None:
        if high - low > 1:
            heappush(gaps, (places[low] - places[high], low, high))

    open_gap(0, len(indexes) - 1)
    while gaps:
        _, low, high = heappop(gaps)
        middle = min(range(low + 1, high), key=lambda i: abs(2 * places[i] - places[low] - places[high]))
        yield indexes[middle]
        open_gap(low, middle)
        open_gap(middle, high)


def usual_items(spec: TowerSpec, budget: Budget, tokens: int = USUAL_TOKENS) -> list[Grid]:
    """Images of about this many tokens each that fill the budget as far as they can."""
    per_item = max(tokens, -(-budget.tokens // budget.capacity["item"]))
    grids: list[Grid] = []
    filled = {"token": 0}
    while filled["token"] < budget.tokens:
        grid = _image(spec, min(per_item, budget.tokens - filled["token"]))
        if grid is None:
            break
        more = sum_counts([filled, spec.counts(grid)])
        if not fits(more, budget.capacity):
            break
        grids.append(grid)
        filled = more
    return grids


def large_items(spec: TowerSpec, budget: Budget) -> list[Grid]:
    """As large images as LARGE_TOKENS lists and the budget holds, or one that fills it. Several tell more than one,
    whose tiles may just not fill the GPU."""
    fitting = [tokens for tokens in LARGE_TOKENS if tokens <= budget.tokens]
    return usual_items(spec, budget, max(fitting)) if fitting else one_item(spec, budget)


def long_items(spec: TowerSpec, budget: Budget) -> list[Grid]:
    """Equal images of at least as many tokens as the largest of LARGE_TOKENS, as many as the budget holds."""
    count = max(budget.tokens // LARGE_TOKENS[-1], 1)
    return usual_items(spec, budget, budget.tokens // count)[:count]


def one_item(spec: TowerSpec, budget: Budget) -> list[Grid]:
    """The largest near-square image that the budget holds."""
    grid = _image(spec, budget.tokens)
    return [grid] if grid is not None and fits(spec.counts(grid), budget.capacity) else []


def _image(spec: TowerSpec, tokens: int) -> Grid | None:
    """A near-square image of at most this many tokens; for towers of fixed tiles, as many tiles."""
    if spec.unit > 1:
        side = spec.merge * isqrt(spec.unit)
        grid = Grid(tokens // spec.unit, side, side)
    else:
        height = isqrt(tokens)
        grid = Grid(1, height * spec.merge, tokens // max(height, 1) * spec.merge)
    try:
        spec.check_grid(grid)
    except PatchError:
        return None
    return grid


def _load(spec: TowerSpec, grids: Sequence[Grid]) -> float:
    return sum(load_of(spec.counts(grid), spec.load_sets) for grid in grids)


def _slope(spec: TowerSpec, budget: Budget, index: int, usual: float, usual_load: float, timer: Timer) -> float | None:
    """Microseconds per rows^2: large images against usual ones in the same budget. None where it holds one usual image:
    nothing to learn.

    Args:
        spec: of the tower.
        budget, index: the budget.
        usual, usual_load: time and load of usual images in it.
        timer: runs and times.
    """
    grids = large_items(spec, budget)
    more = _load(spec, grids) - usual_load
    return max(timer.replay(index, grids) - usual, 0.0) / more if more > usual_load else None


def _long_slope(
    spec: TowerSpec, budget: Budget, index: int, slope: float, fixed: float, timer: Timer
) -> tuple[float, float]:
    """As `_slope`, for the budget's graph for packs of one or of long segments, if it has one, and what such packs take
    beside the fixed time.

    Args:
        spec: of the tower.
        budget, index: the budget.
        slope, fixed: of its other graph.
        timer: runs and times.
    """
    grids, one = long_items(spec, budget), one_item(spec, budget)
    if not (timer.long(index) and one):
        return slope, 0.0
    load, one_load = _load(spec, grids), _load(spec, one)
    alone = max(timer.replay(index, one, long=True) - fixed, 0.0)
    if len(grids) < 2 or one_load <= load or not spec.is_long(sum_counts(map(spec.counts, grids))):
        return alone / one_load, 0.0
    several = max(timer.replay(index, grids, long=True) - fixed, 0.0)
    long = (alone - several) / (one_load - load)
    beside = several - long * load
    # A line through both, or where that would be none of a cost, one through zero and between them.
    return (long, beside) if long > 0 and beside > 0 else ((alone + several) / (one_load + load), 0.0)


def _eager_times(spec: TowerSpec, budgets: Sequence[Budget], timer: Timer) -> list[tuple[int, Sequence[Grid], float]]:
    """Some budgets, usual items in each, and the microseconds that they take. The largest comes first: what is timed
    after the smallest finds a GPU that waited for the host."""
    filled = [(index, usual_items(spec, budgets[index])) for index in _spaced(range(len(budgets)), EAGER_POINTS)]
    return [
        (index, grids, min(timer.eager(grids) for _ in range(EAGER_RUNS))) for index, grids in reversed(filled) if grids
    ]


def _eager_curve(
    spec: TowerSpec, times: Sequence[tuple[int, Sequence[Grid], float]], slope: np.ndarray
) -> list[tuple[int, float]]:
    """(rows, microseconds at no load), rows ascending."""
    curve = {}
    for index, grids, time_us in times:
        rows = sum(spec.counts(grid)["patch"] for grid in grids)
        curve[rows] = max(time_us - slope[index] * _load(spec, grids), 0.0)
    return sorted(curve.items())


def _spaced(indexes: Sequence[int], points: int) -> list[int]:
    """Some of the indexes, the first and the last among them."""
    chosen = np.linspace(0, len(indexes) - 1, min(points, len(indexes))).round().astype(int)
    return [indexes[i] for i in dict.fromkeys(chosen)]


def _spread(rows: np.ndarray, known: dict[int, float]) -> np.ndarray:
    """Values at every budget, on lines through the known ones."""
    indexes = sorted(known)
    return np.interp(rows, rows[indexes], [known[i] for i in indexes])
