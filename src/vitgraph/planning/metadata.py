"""Metadata that depends on a grid alone is computed once per grid and kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from threading import Lock

import numpy as np

from vitgraph.core import Grid

Metadata = Mapping[str, np.ndarray]


class MetadataCache:
    """Least-recently-used cache of `Tower.metadata`, safe to share between threads.

    Args:
        compute: the tower's `metadata`.
        size: most grids kept.
    """

    def __init__(self, compute: Callable[[Grid], Metadata], size: int) -> None:
        self._compute = compute
        self._size = size
        self._entries: OrderedDict[Grid, Metadata] = OrderedDict()
        self._lock = Lock()
        self.hits = 0
        self.misses = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, grid: Grid) -> Metadata:
        """Host arrays of one item of this grid; the arrays are shared and read-only."""
        with self._lock:
            entry = self._entries.get(grid)
            if entry is not None:
                self._entries.move_to_end(grid)
                self.hits += 1
                return entry
            self.misses += 1
        return self._add(grid)

    def warm(self, grids: Iterable[Grid]) -> None:
        """Computes the entries of these grids ahead of their first use; counts neither as hit nor as miss."""
        for grid in grids:
            if grid not in self._entries:
                self._add(grid)

    def _add(self, grid: Grid) -> Metadata:
        entry = self._compute(grid)
        for array in entry.values():
            array.setflags(write=False)
        with self._lock:
            self._entries[grid] = entry
            while len(self._entries) > self._size:
                self._entries.popitem(last=False)
        return entry
