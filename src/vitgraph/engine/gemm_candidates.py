"""Which of cuBLASLt's algorithms are worth a trial: not all, for the driver takes some milliseconds to load a kernel.

For 84 problems of 196 to 8192 rows, the best candidates took 6 % less time than torch's algorithms on an H100; all that
the heuristics named and some thousand others for each problem 7 %.
"""

from __future__ import annotations

from vitgraph.engine.cublaslt import CublasLt, Problem, Setting

WORTH_A_TRIAL = {
    *(Setting(20, 3, 1), Setting(20, 5, 3), Setting(165, 5, 2)),
    *(Setting(196, 8, 2), Setting(323, 7, 3), Setting(317, 4, 1)),
}
"""Of what the heuristics name on Hopper: tiles of 128 x 128, 112 x 128, 168 x 64, 64 x 136 and 64 x 72."""

BEST_TILES, MOST_TILED_ROWS = 2, 8192
"""So many tiles are tried beside these, up to so many rows."""

ONE_BLOCK, SCHEDULES = 2, (1, 5)

LOADS = 64
"""Products in whose time a row or a column of a tile's operands is loaded."""

STEP = 16
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
            if rows % STEP == 0:
                found[columns, rows] = number
    return found


TILES = _tiles()


def candidates(library: CublasLt, problem: Problem) -> list[bytes]:
    """Algorithms to try, none of which needs a workspace."""
    named = library.named(problem)
    if not library.is_hopper:
        return named
    chosen = [algorithm for algorithm in named if library.setting(algorithm) in WORTH_A_TRIAL]
    if problem.rows > MOST_TILED_ROWS:
        return chosen
    tiles = best_tiles(problem.rows, problem.columns, library.multiprocessors)
    settings = [Setting(TILES[tile], ONE_BLOCK, schedule) for tile in tiles for schedule in SCHEDULES]
    made = [library.hopper(problem, setting) for setting in settings]
    return chosen + [algorithm for algorithm in made if algorithm is not None and algorithm not in chosen]


def best_tiles(rows: int, columns: int, multiprocessors: int) -> list[tuple[int, int]]:
    """The BEST_TILES tiles that are predicted to take least time: every multiprocessor makes one after another, each in
    a time that grows with its products and with what it loads for them.

    Args:
        rows, columns: of the output.
        multiprocessors: of the GPU.

    Returns:
        Columns and rows of each.
    """

    def time(tile: tuple[int, int]) -> int:
        wide, high = tile
        blocks = -(-columns // wide) * -(-rows // high)
        return -(-blocks // multiprocessors) * (wide * high + LOADS * (wide + high))

    return sorted(TILES, key=time)[:BEST_TILES]
