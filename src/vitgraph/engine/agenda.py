"""Which budgets to time in the time that there is, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from heapq import heappop, heappush
from itertools import cycle, islice
from math import log
from typing import NamedTuple, Protocol

from vitgraph.core import Grid

SECONDS, MOST_SECONDS = 1.1, 1.85
"""Time for replays, and for all that is done here. Rests, staging and eager runs take two thirds as long, or longer
where the host is slow: then fewer budgets are timed."""
REST_SHARE = 0.5
"""Before a replay the GPU rests for this share of the time of the replay before."""

SLOPE_POINTS, LONG_POINTS = 22, 4
"""Budgets whose slope is measured, and those among them where that of a second graph is, too, which takes longer."""
SLOPE_SHARE = 1 / 60
"""No slope is measured where a replay takes more than this share of the time for replays. Large images take up to three
times as long, and the slope hardly changes any more: the time is better spent on more budgets."""
USUAL_SHARE = 0.65
"""Of the time for replays: for usual images, in as many budgets as there is time for."""
LARGE_TAKES = 1.5
"""Large images take so many times as long as usual ones; a guess."""


class Timer(Protocol):
    """What is timed, in microseconds of one run of a budget filled with items of these grids.

    Attributes:
        replays: how many there were.
        seconds: that they took the GPU, rests included.
    """

    replays: int
    seconds: float

    def replay(self, budget: int, grids: Sequence[Grid], long: bool = False) -> float: ...

    def long(self, budget: int) -> bool: ...

    def eager(self, grids: Sequence[Grid]) -> float: ...


class Runs(NamedTuple):
    """Replays of one budget.

    Attributes:
        each: seconds of the GPU that one with usual images takes; a guess.
        large, long: how many there are of large images, for the slope, and in the second graph, for that one's.
    """

    each: float
    large: int = 0
    long: int = 0

    @property
    def seconds(self) -> float:
        """Of the GPU, all together."""
        return self.each * (1 + LARGE_TAKES * (self.large + self.long))

    def takes(self, host: float) -> float:
        """Seconds of all of them with their rests, on a host that takes so many beside each."""
        return (1 + REST_SHARE) * self.seconds + host * (1 + self.large + self.long)


def worth_timing(
    expected: Mapping[int, float], seconds: float, telling: Mapping[int, tuple[int, int]]
) -> dict[int, Runs]:
    """As many budgets as USUAL_SHARE of the time allows, at least two, in the order of `refining`. Slopes are measured
    in some of these, as long as there is time.

    Args:
        expected: seconds of one replay with usual images, by index of budget, ascending.
        seconds: of all replays.
        telling: how many replays of large images, and in the second graph, tell something of each.
    """
    runs: dict[int, Runs] = {}
    left = USUAL_SHARE * seconds
    for index in refining(expected):
        left -= expected[index]
        if left < 0 and len(runs) >= 2:
            break
        runs[index] = Runs(expected[index])
    left += (1 - USUAL_SHARE) * seconds
    known = sorted(runs)
    # At least the smaller half and one, for a ladder of a few large budgets.
    most = max(SLOPE_SHARE * seconds, expected[known[len(known) // 2]])
    slopes = _spread_over(expected, [at for at in known if expected[at] <= most and telling[at][0]], SLOPE_POINTS)
    longs = _spread_over(expected, [at for at in sorted(slopes) if telling[at][1]], LONG_POINTS)
    for index in slopes:
        large, long = telling[index]
        probed = Runs(expected[index], large, long if index in longs else 0)
        more = probed.seconds - expected[index]
        if more <= left or index == slopes[0]:
            runs[index] = probed
            left -= more
    return runs


def _spread_over(expected: Mapping[int, float], indexes: Sequence[int], points: int) -> list[int]:
    """So many of the indexes, evenly spread, the ends first."""
    return list(islice(refining({index: expected[index] for index in indexes}), points))


def in_time(runs: Mapping[int, Runs], left: Callable[[], float], timer: Timer) -> Iterator[int]:
    """The largest budget, then the smallest and the largest of the others in turn, each when the one before is timed.
    Those that `refining` named last are left out where the time would not suffice at the pace so far, but never the
    smallest.

    Several large ones in a row would lower the GPU's clock further than a pack does that comes alone.

    Args:
        runs: from `worth_timing`; usual images in the largest and in the smallest were timed.
        left: seconds that are left for all of them.
        timer: times them.
    """
    begin, before, first = left(), timer.seconds, timer.replays
    largest, *todo = runs
    ends = cycle((min, max))
    yield largest
    while todo:
        index = next(ends)(todo)
        todo.remove(index)
        yield index
        now = left()
        host = max(begin - now - (timer.seconds - before), 0.0) / max(timer.replays - first, 1)
        while todo and sum(runs[at].takes(host) for at in todo) > now:
            todo.pop()


def refining(expected: Mapping[int, float]) -> Iterator[int]:
    """All indexes: the last and the first, then again and again the middle of the widest gap, as a ratio of times.

    Args:
        expected: time by index of budget, ascending, in any unit.
    """
    indexes, places = [*expected], [log(time) for time in expected.values()]
    if indexes:
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
