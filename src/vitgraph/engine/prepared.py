"""Batches that are ready to go: what a batch needs that ran before, found by its grids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vitgraph.core import Grid, Pack
from vitgraph.engine.buffers import StaticBuffers
from vitgraph.engine.graph import CapturedGraph
from vitgraph.planning.cost import CostModel

MOST_PREPARED = 1024
MOST_ITEMS = 256
"""Of a batch that is kept: it takes some hundred bytes per item."""


@dataclass(eq=False)
class PreparedReplay:
    """A pack in one budget, with everything looked up that a launch needs.

    Attributes:
        pack: what runs.
        buffers: of the budget.
        graph: what is replayed; None without a graph.
        long: whether that is the budget's second graph.
    """

    pack: Pack
    buffers: StaticBuffers
    graph: CapturedGraph | None
    long: bool

    @cached_property
    def outputs(self) -> tuple[Tensor, ...]:
        """Static, each `[levels, rows, width]`, narrowed to the pack's rows. Made while the first replay runs."""
        return self.buffers.outputs_of(self.pack.counts)

    @property
    def tokens(self) -> int:
        """Of the budget."""
        return self.buffers.layout.capacity["token"]


@dataclass(eq=False)
class PreparedBatch:
    """A batch all of whose packs are replayed.

    Attributes:
        grids: of its items.
        shape: of the pixel rows of all items, `[P, patch_width]`.
        replays: of its packs, in the order in which they run.
        cost: the model that chose the packs.
    """

    grids: Sequence[Grid]
    shape: torch.Size
    replays: Sequence[PreparedReplay]
    cost: CostModel


class PreparedBatches:
    """Prepared batches by what stands for their grids; the oldest make room, and are prepared again when they come
    again.

    Args:
        size: most that are kept.
    """

    def __init__(self, size: int = MOST_PREPARED) -> None:
        self._size = size
        self._entries: dict[Hashable, PreparedBatch] = {}
        self._shapes: Counter[torch.Size] = Counter()

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, key: Hashable, shape: torch.Size) -> PreparedBatch | None:
        """What was kept under the key for rows of this shape; None where there is nothing, or where the key cannot be
        looked up.

        Most batches that come for the first time are known by their number of rows: their key, which takes a while for
        many items, is not hashed.
        """
        if shape not in self._shapes:
            return None
        try:
            found = self._entries.get(key)
        except TypeError:
            return None
        return found if found is not None and found.shape == shape else None

    def keep(self, key: Hashable, prepared: PreparedBatch) -> None:
        """Keeps it in the place of an earlier one, unless it has too many items."""
        if not self._size or len(prepared.grids) > MOST_ITEMS:
            return
        self.drop(key)
        if len(self._entries) >= self._size:
            self.drop(next(iter(self._entries)))
        self._entries[key] = prepared
        self._shapes[prepared.shape] += 1

    def drop(self, key: Hashable) -> None:
        """Forgets what was kept under the key, if anything."""
        dropped = self._entries.pop(key, None)
        if dropped is None:
            return
        self._shapes[dropped.shape] -= 1
        if not self._shapes[dropped.shape]:
            del self._shapes[dropped.shape]

    def clear(self) -> None:
        """Forgets everything."""
        self._entries.clear()
        self._shapes.clear()
