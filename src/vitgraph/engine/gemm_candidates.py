"""Which of cuBLASLt's algorithms are worth a trial: not all, for the driver takes some milliseconds to load a kernel.

The prediction is fitted to the times that some 800 settings of each of 101 problems of 256 to 16384 rows took on an
H100. Of some 33 settings of each of 36 problems, weights from memory, the fastest took 0.04 % less time, mean, than the
fastest of the few that are tried here.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from vitgraph.engine.cublaslt import CublasLt, Problem, Setting

WORTH_A_TRIAL = {
    *(Setting(20, 3, 1), Setting(20, 5, 3), Setting(165, 5, 2)),
    *(Setting(196, 8, 2), Setting(323, 7, 3), Setting(317, 4, 1)),
}
"""Of what the heuristics name on Hopper: tiles of 128 x 128, 112 x 128, 168 x 64, 64 x 136 and 64 x 72."""

BEST = 5
"""So many of the other kernels are tried beside these."""

FORMS, UNEVEN = 2, 192
"""Of so many of their tiles the cooperative form is tried, too, where one round of tiles makes the output: there is no
next tile then to compute while one is stored. Not of tiles of UNEVEN columns, which its two groups of warps share
badly."""

ALONE = 2
CLUSTERS = {ALONE: (1, 1), 3: (2, 1), 4: (4, 1), 9: (2, 4)}
"""The library's number -> tiles beside each other along the columns and the rows of the output. With more of them there
would be more kernels to load, and none faster among the best."""

PINGPONG, COOPERATIVE, MOST_PINGPONG = 1, 5, 128 * 176
"""Schedules of tiles of at most so many outputs, in which one tile is stored while the next is computed, and of larger
ones, which take all registers."""

LARGE_CLUSTER, UNUSED = 4, 11
"""From so many tiles on a cluster finds no place on one of so many multiprocessors."""

LOADS, STEP, STORE = 16, 2000, 200
"""Fitted to the times of the problems above. Products in whose time a row or a column of a tile's operands is loaded;
those in whose time a tile's step along the inner width begins; and steps in whose time a cooperative tile is stored."""

ROWS_STEP = 16
"""Rows of tiles are a multiple of it."""


def _tiles() -> dict[tuple[int, int], int]:
    """Columns and rows of a tile -> the library's number for it.

    What came with Hopper is counted through in steps of 8 rows, where it had no number before.
    """
    before = {
        64: {64: 15, 96: 26, 128: 17, 192: 116, 256: 19},
        128: {64: 18, 96: 33, 128: 20, 160: 29, 192: 32, 256: 23},
        192: {64: 208, 128: 31, 192: 209, 256: 210},
    }
    found: dict[tuple[int, int], int] = {}
    for columns, following in ((64, 317), (128, 399), (192, 455)):
        for rows in range(64, 257, 8):
            number = before[columns].get(rows, following)
            following += number == following
            if rows % ROWS_STEP == 0:
                found[columns, rows] = number
    return found


TILES = _tiles()
EVEN = {number for (columns, _), number in TILES.items() if columns != UNEVEN}


class _Kernels(NamedTuple):
    """Every tile in every cluster; arrays are `[N]`.

    Attributes:
        settings: of each.
        columns, rows: of its tiles.
        across, down: tiles of its cluster along the columns and the rows.
        step, store: time of a tile, in products: of a step along the inner width, and beside all of these.
    """

    settings: list[Setting]
    columns: np.ndarray
    rows: np.ndarray
    across: np.ndarray
    down: np.ndarray
    step: np.ndarray
    store: np.ndarray


def candidates(library: CublasLt, problem: Problem) -> list[bytes]:
    """Algorithms to try, none of which needs a workspace."""
    named = library.named(problem)
    if not library.is_hopper:
        return named
    chosen = [algorithm for algorithm in named if library.setting(algorithm) in WORTH_A_TRIAL]
    ranked, rounds = by_predicted_time(problem, library.multiprocessors)
    made: dict[bytes, Setting] = {}
    for setting in ranked:
        algorithm = library.hopper(problem, setting)
        if algorithm is not None and algorithm not in chosen:
            made[algorithm] = setting
        if len(made) == BEST:
            break
    one_round = [own for own in made.values() if own.schedule == PINGPONG and rounds[own] == 1 and own.tile in EVEN]
    tiles = list(dict.fromkeys(own.tile for own in one_round))[:FORMS]
    forms = [library.hopper(problem, Setting(tile, ALONE, COOPERATIVE)) for tile in tiles]
    return [*chosen, *made, *(form for form in forms if form is not None)]


def by_predicted_time(problem: Problem, multiprocessors: int) -> tuple[list[Setting], dict[Setting, int]]:
    """All kernels, what is predicted to take least time first, and how many tiles a multiprocessor makes with each.

    Every multiprocessor makes one tile after another. A tile's step along the inner width takes the time of its
    products, of its loads, which a cluster shares, and some of its own.

    Args:
        problem: to run.
        multiprocessors: of the GPU.
    """
    settings, columns, rows, across, down, step, store = _kernels()
    tiles = -(-problem.columns // columns // across) * across * -(-problem.rows // rows // down) * down
    large = across * down >= LARGE_CLUSTER
    rounds = -(-tiles // np.where(large, multiprocessors - multiprocessors // UNUSED, multiprocessors))
    ranked = [settings[at] for at in np.argsort(rounds * (problem.inner * step + store), kind="stable")]
    return ranked, dict(zip(settings, rounds.tolist(), strict=True))


@cache
def _kernels() -> _Kernels:
    every = [(tile, cluster) for tile in TILES for cluster in CLUSTERS]
    columns, rows, across, down = np.array([(*tile, *CLUSTERS[cluster]) for tile, cluster in every]).T
    outputs = columns * rows
    cooperative = outputs > MOST_PINGPONG
    schedules = np.where(cooperative, COOPERATIVE, PINGPONG).tolist()
    return _Kernels(
        [Setting(TILES[tile], cluster, schedule) for (tile, cluster), schedule in zip(every, schedules, strict=True)],
        columns, rows, across, down,
        step=outputs + LOADS * (columns / down + rows / across) + STEP,
        store=STORE * outputs * cooperative,
    )  # fmt: skip
