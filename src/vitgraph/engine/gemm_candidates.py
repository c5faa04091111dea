"""Which of cuBLASLt's algorithms are worth a trial: not all, for the driver takes some milliseconds to load a kernel.

On an H100, of some 800 settings tried for each of 101 problems of 256 to 16384 rows, the fastest took 2 % less time
than the fastest of the few that are tried here.
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

BEST = 6
"""So many of the other kernels are tried beside these."""

CLUSTERS = {2: (1, 1), 3: (2, 1), 4: (4, 1), 9: (2, 4)}
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


class _Kernels(NamedTuple):
    """Every tile in every cluster; arrays are `[N]`."""

    settings: list[Setting]
    columns: np.ndarray
    rows: np.ndarray
    cluster_columns: np.ndarray
    cluster_rows: np.ndarray


def candidates(library: CublasLt, problem: Problem) -> list[bytes]:
    """Algorithms to try, none of which needs a workspace."""
    named = library.named(problem)
    if not library.is_hopper:
        return named
    chosen = [algorithm for algorithm in named if library.setting(algorithm) in WORTH_A_TRIAL]
    made: list[bytes] = []
    for setting in by_predicted_time(problem, library.multiprocessors):
        algorithm = library.hopper(problem, setting)
        if algorithm is not None and algorithm not in chosen:
            made.append(algorithm)
        if len(made) == BEST:
            break
    return chosen + made


def by_predicted_time(problem: Problem, multiprocessors: int) -> list[Setting]:
    """All kernels, what is predicted to take least time first.

    Every multiprocessor makes one tile after another. A tile's step along the inner width takes the time of its
    products, of its loads, which a cluster shares, and some of its own.

    Args:
        problem: to run.
        multiprocessors: of the GPU.
    """
    kernels = _kernels()
    rounds = -(-problem.columns // kernels.columns // kernels.cluster_columns) * kernels.cluster_columns
    rounds *= -(-problem.rows // kernels.rows // kernels.cluster_rows) * kernels.cluster_rows
    large = kernels.cluster_columns * kernels.cluster_rows >= LARGE_CLUSTER
    rounds = -(-rounds // np.where(large, multiprocessors - multiprocessors // UNUSED, multiprocessors))
    outputs = kernels.columns * kernels.rows
    loads = kernels.columns / kernels.cluster_rows + kernels.rows / kernels.cluster_columns
    time = problem.inner * (outputs + LOADS * loads + STEP) + STORE * outputs * (outputs > MOST_PINGPONG)
    return [kernels.settings[at] for at in np.argsort(rounds * time, kind="stable")]


@cache
def _kernels() -> _Kernels:
    every = [(tile, cluster) for tile in TILES for cluster in CLUSTERS]
    return _Kernels(
        [Setting(TILES[tile], cluster, _schedule(*tile)) for tile, cluster in every],
        *np.array([(*tile, *CLUSTERS[cluster]) for tile, cluster in every]).T,
    )


def _schedule(columns: int, rows: int) -> int:
    return PINGPONG if columns * rows <= MOST_PINGPONG else COOPERATIVE
