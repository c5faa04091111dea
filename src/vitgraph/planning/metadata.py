"""Metadata that depends on a grid alone is computed once per grid and kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping
from threading import Lock
from typing import NamedTuple

import numpy as np

from vitgraph.core import Counts, Grid

Metadata = Mapping[str, np.ndarray]


class GridPlan(NamedTuple):
    """What depends on a grid alone.

    Attributes:
        counts: rows of each kind that an item of this grid fills.
        metadata: host arrays by buffer name, relative to the item; shared and read-only.
    """

    counts: Counts
    metadata: Metadata


class MetadataCache:
    """Least-recently-used cache of grid plans, safe to share between threads.

    Args:
        counts: the spec's `counts`.
        metadata: the tower's `metadata`.
        size: most grids kept.
    """

    def __init__(self, counts: Callable[[Grid], Counts], metadata: Callable[[Grid], Metadata], size: int) -> None:
        self._counts = counts
        self._metadata = metadata
        self._size = size
        self._entries: OrderedDict[Grid, GridPlan] = OrderedDict()
        self._lock = Lock()
        self.hits = 0
        self.misses = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, grid: Grid) -> GridPlan:
        """The plan of an item of this grid."""
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

    def _add(self, grid: Grid) -> GridPlan:
        entry = GridPlan(self._counts(grid), self._metadata(grid))
        for array in entry.metadata.values():
            array.setflags(write=False)
        with self._lock:
            self._entries[grid] = entry
            while len(self._entries) > self._size:
                self._entries.popitem(last=False)
        return entry


class BlockCache:
    """Finished metadata blocks of packs with few items, which come again where images have usual sizes.

    Args:
        most_items: packs of more items are not kept: they hardly repeat.
        most_bytes: host memory of all kept blocks.
    """

    def __init__(self, most_items: int = 4, most_bytes: int = 64 << 20) -> None:
        self._most_items, self._most_bytes = most_items, most_bytes
        self._blocks: OrderedDict[Hashable, np.ndarray] = OrderedDict()
        self._bytes = 0

    def restore(self, key: Hashable, block: np.ndarray) -> bool:
        """Copies the kept bytes to the front of `block`; False when there are none."""
        kept = self._blocks.get(key)
        if kept is None:
            return False
        self._blocks.move_to_end(key)
        block[: len(kept)] = kept
        return True

    def keep(self, key: Hashable, block: np.ndarray, items: int) -> None:
        """Keeps a copy of `block` under `key`; the least recently used ones make room. None is not kept."""
        if key is None or items > self._most_items or block.nbytes > self._most_bytes:
            return
        self._blocks[key] = block.copy()
        self._bytes += block.nbytes
        while self._bytes > self._most_bytes:
            self._bytes -= self._blocks.popitem(last=False)[1].nbytes
