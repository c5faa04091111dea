"""What is worth timing, and in which order."""

from __future__ import annotations

from itertools import pairwise
from math import log

import pytest

from vitgraph.engine.agenda import LARGE_TAKES, LONG_POINTS, SLOPE_POINTS, USUAL_SHARE, Runs, refining, worth_timing

TIMES = {n: 0.001 + 0.0004 * n for n in range(64)}
"""Seconds by index of budget: 1 to 26 ms."""
EVERYTHING = sum(TIMES.values())


def slopes(chosen: dict[int, Runs]) -> set[int]:
    return {index for index, runs in chosen.items() if runs.large}


def longs(chosen: dict[int, Runs]) -> set[int]:
    return {index for index, runs in chosen.items() if runs.long}


def test_refining_names_everything_once_and_the_middle_of_the_widest_gap_next() -> None:
    order = list(refining(TIMES))
    assert sorted(order) == list(TIMES)
    assert order[:2] == [63, 0]
    for done in range(2, 64):
        known = sorted(order[:done])
        widest = max(pairwise(known), key=lambda gap: TIMES[gap[1]] / TIMES[gap[0]] if gap[1] > gap[0] + 1 else 0)
        assert widest[0] < order[done] < widest[1]
        off = {at: abs(log(TIMES[at] ** 2 / (TIMES[widest[0]] * TIMES[widest[1]]))) for at in range(*widest)}
        assert off[order[done]] == pytest.approx(min(off.values()))
    assert list(refining({3: 1.0})) == [3]
    assert list(refining({2: 1.0, 5: 4.0})) == [5, 2]
    assert list(refining({})) == []


def test_usual_images_come_before_slopes() -> None:
    """A budget that is not timed may be far off; a slope changes from one to the next by little."""
    seconds = EVERYTHING / USUAL_SHARE
    chosen = worth_timing(TIMES, 1.01 * seconds, dict.fromkeys(TIMES, (1, 2)))
    assert sorted(chosen) == list(TIMES)
    assert 0.8 * seconds < sum(runs.seconds for runs in chosen.values()) <= 1.01 * seconds
    fewer = worth_timing(TIMES, 0.5 * seconds, dict.fromkeys(TIMES, (1, 2)))
    assert [*fewer] == [*refining(TIMES)][: len(fewer)]
    assert 0.4 * EVERYTHING < sum(TIMES[index] for index in fewer) <= 0.5 * EVERYTHING


def test_slopes_take_no_more_than_the_time_that_is_left() -> None:
    seconds = EVERYTHING / USUAL_SHARE
    chosen = worth_timing(TIMES, seconds, dict.fromkeys(TIMES, (9, 0)))
    assert 1 < len(slopes(chosen)) < SLOPE_POINTS
    assert 0.9 * seconds < sum(runs.seconds for runs in chosen.values()) <= seconds


def test_slopes_are_spread_over_budgets_that_tell_one() -> None:
    telling = {index: (int(index > 9), 2 if index > 19 else 0) for index in TIMES}
    chosen = worth_timing(TIMES, 10.0, telling)
    assert len(slopes(chosen)) == SLOPE_POINTS
    assert len(longs(chosen)) == LONG_POINTS
    assert {10, 63} <= slopes(chosen)
    assert {min(index for index in slopes(chosen) if index > 19), 63} <= longs(chosen) <= slopes(chosen)
    for index, runs in chosen.items():
        assert runs.large <= 1
        assert runs.long in (0, 2)
        assert runs.seconds == pytest.approx(TIMES[index] * (1 + LARGE_TAKES * (runs.large + runs.long)))


def test_no_slope_is_measured_where_it_takes_too_long() -> None:
    chosen = worth_timing(TIMES, 0.9, dict.fromkeys(TIMES, (1, 1)))
    assert len(chosen) > 40
    assert 0.012 < max(TIMES[index] for index in slopes(chosen)) < 0.0151


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_few_large_budgets_have_a_slope(count: int) -> None:
    times = {index: 0.1 * 2**index for index in range(count)}
    chosen = worth_timing(times, 1.1, dict.fromkeys(times, (1, 0)))
    assert len(chosen) >= min(count, 2)
    assert slopes(chosen)


def test_nothing_to_learn_is_no_slope() -> None:
    chosen = worth_timing(TIMES, 10.0, dict.fromkeys(TIMES, (0, 2)))
    assert not slopes(chosen)
    assert not longs(chosen)
    assert all(runs.seconds == TIMES[index] for index, runs in chosen.items())
