"""The per-grid cache."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from vitgraph.core import Grid
from vitgraph.planning.metadata import MetadataCache


def counts(grid: Grid) -> dict[str, int]:
    return {"patch": grid.patches}


def compute(grid: Grid) -> dict[str, np.ndarray]:
    return {"ids": np.arange(grid.patches)}


def test_a_grid_is_computed_once_and_the_oldest_leaves_first() -> None:
    calls = []
    cache = MetadataCache(counts, lambda grid: calls.append(grid) or compute(grid), size=2)
    a, b, c = Grid(1, 2, 2), Grid(1, 4, 4), Grid(1, 6, 6)
    for grid in (a, b, a, c, a, b):
        cache.get(grid)
    assert calls == [a, b, c, b]
    assert (cache.hits, cache.misses) == (2, 4)
    assert len(cache) == 2


def test_warming_is_not_counted() -> None:
    cache = MetadataCache(counts, compute, size=8)
    cache.warm([Grid(1, 2, 2), Grid(1, 4, 4)])
    cache.get(Grid(1, 2, 2))
    assert (cache.hits, cache.misses) == (1, 0)


def test_shared_arrays_cannot_be_written() -> None:
    ids = MetadataCache(counts, compute, size=1).get(Grid(1, 2, 2)).metadata["ids"]
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = 7


def test_threads_may_share_it() -> None:
    cache = MetadataCache(counts, compute, size=4)
    grids = [Grid(1, 2, w) for w in range(2, 18, 2)]

    def work() -> None:
        for _ in range(50):
            for grid in grids:
                assert len(cache.get(grid).metadata["ids"]) == grid.patches

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(cache) == 4


def test_all_grids_of_a_pack_count_as_one_by_one() -> None:
    packs = [[Grid(1, 2, 2)] * 2, [Grid(1, 2, 2), Grid(1, 4, 4)], [Grid(1, 4, 4), Grid(1, 2, 2)], [], [Grid(1, 6, 6)]]
    one_by_one, at_once = (MetadataCache(counts, compute, size=2) for _ in range(2))
    for grids in packs * 2:
        want = [one_by_one.get(grid) for grid in grids]
        got = at_once.get_all(grids)
        assert [plan.counts for plan in got] == [plan.counts for plan in want]
        assert (at_once.hits, at_once.misses) == (one_by_one.hits, one_by_one.misses)
        assert list(at_once._entries) == list(one_by_one._entries)
