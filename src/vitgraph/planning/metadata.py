"""Metadata that depends on a grid alone is computed once per grid and kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np

from vitgraph.core import Counts, Grid

Metadata = Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class GridPlan:
    """What depends on a grid alone.

    Attributes:
        counts: rows of each kind that an item of this grid fills.
        metadata: host arrays by buffer name, relative to the item; shared and read-only.
        derived: what others made from it, kept as long as it is.
    """

    counts: Counts
    metadata: Metadata
    derived: dict[Hashable, Any] = field(default_factory=dict, repr=False)


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

    @property
    def lookups(self) -> int:
        """Hits and misses."""
        return self.hits + self.misses

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

    def get_all(self, grids: Sequence[Grid]) -> list[GridPlan]:
        """As `get`, for every item of a pack."""
        with self._lock:
            found = [self._entries.get(grid) for grid in grids]
            known = [entry for entry in found if entry is not None]
            if len(known) == len(found):
                for grid in grids:
                    self._entries.move_to_end(grid)
                self.hits += len(found)
                return known
        return [self.get(grid) for grid in grids]

    def peek(self, grid: Grid) -> GridPlan:
        """As `get`, but counts neither as hit nor as miss."""
        return self._entries.get(grid) or self._add(grid)

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
