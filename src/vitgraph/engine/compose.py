"""Metadata composed on the device: what depends on a grid alone lies there once, and packs are put together from it.

The host then writes an integer per item, instead of all rows of all buffers.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from vitgraph.core import NOWHERE, Grid, KnownGrid
from vitgraph.engine.buffers import MetadataLayout, longest_segment, tiles_of_item
from vitgraph.engine.mailbox import WORD
from vitgraph.models.contract import BufferSpec, TowerSpec
from vitgraph.planning.metadata import GridPlan

logger = logging.getLogger("vitgraph")

MOST_BYTES = 32 << 20
"""Device memory for the parts of grids."""

TILE_WORDS = 4


class Composer:
    """Puts the metadata of packs together on the device.

    Args:
        spec: of the tower.
        layouts: of all budgets, ascending.
        kinds: of rows.
        block: uint8 on the device, where the metadata of any budget is read.
        most_bytes: for the parts of grids. When they are full, all are dropped and come anew.
    """

    def __init__(
        self,
        spec: TowerSpec,
        layouts: Sequence[MetadataLayout],
        kinds: Sequence[str],
        block: Tensor,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        from vitgraph.engine import compose_triton

        self._kernel = compose_triton
        self._buffers, self._kinds = spec.buffers, tuple(kinds)
        own = [schedule for layout in layouts for schedule in layout.schedules]
        self._schedules = list({(schedule.segments, schedule.block): schedule for schedule in own}.values())
        self._which = {(schedule.segments, schedule.block): i for i, schedule in enumerate(self._schedules)}
        self._sets = len(spec.segments)
        self._number = {layout: number for number, layout in enumerate(layouts)}
        self._most_words = [max(slot.nbytes for slot in layout.slots) // WORD for layout in layouts]
        self.most_items = max(layout.capacity["item"] for layout in layouts)
        """Of a pack in any budget."""

        device = block.device
        self._on_device = block.is_cuda
        self._out = block.view(torch.int32)
        self._parts = torch.empty(most_bytes // WORD, dtype=torch.int32, device=device)
        self._layouts = torch.from_numpy(np.stack([self._describe(layout) for layout in layouts])).to(device)
        columns = len(self._kinds) + len(self._buffers) + 3 * self._sets
        self._matrix = torch.zeros(self.most_items + 1, columns, dtype=torch.int32, device=device)
        self._placed: list[KnownGrid] = []
        self._used = 0

    @property
    def nbytes(self) -> int:
        """Device memory that it holds."""
        return self._parts.nbytes + self._layouts.nbytes + self._matrix.nbytes

    @property
    def used_bytes(self) -> int:
        """Of the memory for parts, what is in use."""
        return self._used * WORD

    def learn(self, known: Sequence[KnownGrid], plans: Callable[[Sequence[Grid]], list[GridPlan]]) -> bool:
        """Sends the parts of grids to the device.

        Args:
            known: some may lie there already; each learns its place.
            plans: of grids.

        Returns:
            False where there is no room for all of them.
        """
        # What does not fit leaves with all others: the second time there is all the room.
        return self._add(known, plans) or self._add(known, plans)

    def launch(self, request: Tensor, counts: tuple[Tensor, Tensor], layout: MetadataLayout) -> None:
        """Queues the writing of a pack's metadata, padding included, into the block.

        Args:
            request: of a `Mailbox`, on the device; without items the block stays as it is.
            counts: `next` and `copied` of the mailbox: what was queued before this is done when it starts.
            layout: of the pack's budget, which holds all items.
        """
        number = self._number[layout]
        self._kernel.launch(
            request, self._parts, self._layouts, self._matrix, self._out, counts, number,
            len(self._kinds), len(self._buffers), len(self._schedules), self._most_words[number],
        )  # fmt: skip

    def _add(self, known: Sequence[KnownGrid], plans: Callable[[Sequence[Grid]], list[GridPlan]]) -> bool:
        """Adds what is missing; drops everything where that does not fit."""
        for own in known:
            if own.place != NOWHERE:
                continue
            words = self._part(*plans([own.grid]))
            if self._used + len(words) > len(self._parts):
                self._drop_all()
                return False
            staged = torch.from_numpy(words)
            if self._on_device:
                staged = staged.pin_memory()
            self._parts[self._used : self._used + len(words)].copy_(staged, non_blocking=True)
            own.put(self._used.to_bytes(WORD, sys.byteorder))
            self._placed.append(own)
            self._used += len(words)
        return True

    def _drop_all(self) -> None:
        logger.debug("metadata of %d grids dropped from the device: no room for more", len(self._placed))
        for own in self._placed:
            own.put(NOWHERE)
        self._placed.clear()
        self._used = 0

    def _part(self, plan: GridPlan) -> np.ndarray:
        """What the kernels read of a grid, int32; see `compose_triton`."""
        tiles = [tiles_of_item(plan, schedule) for schedule in self._schedules]
        data = [_words(plan.metadata[buffer.name], buffer) for buffer in self._buffers]
        data += [own.reshape(-1) for own in tiles]
        sizes = [plan.counts[kind] for kind in self._kinds]
        longest = longest_segment(plan, self._schedules)
        head = len(sizes) + len(data) + len(tiles) + 1
        begins = list(accumulate(map(len, data), initial=head))[:-1]
        first = np.array([*sizes, *begins, *map(len, tiles), longest], np.int32)
        return np.concatenate([first, *data])

    def _describe(self, layout: MetadataLayout) -> np.ndarray:
        """Per buffer and segment set: offset in the block, rows with the leading ones, width, leading rows, padding,
        its value (for a schedule the kind that shifts), columns of the matrix for start, source and shift, then for a
        schedule its block, the rows that it covers, and its number. Words all; what does not exist has no rows."""
        kinds, buffers = self._kinds, len(self._buffers)
        words = np.zeros((buffers + self._sets, self._kernel.FIELDS), np.int32)
        at = {slot.spec.name: slot for slot in layout.slots}
        for number, buffer in enumerate(self._buffers):
            slot, (pad, fill) = at[buffer.name], self._padding(buffer)
            shift = -1 if buffer.offset is None else kinds.index(buffer.offset)
            words[number, :9] = [
                slot.offset // WORD, slot.shape[0], _width(buffer), buffer.lead, pad, fill,
                kinds.index(buffer.rows), len(kinds) + number, shift,
            ]  # fmt: skip
        column = len(kinds) + buffers
        for number, schedule in enumerate(layout.schedules, start=buffers):
            slot, which = at[schedule.name], self._which[schedule.segments, schedule.block]
            words[number] = [
                slot.offset // WORD, slot.shape[0], TILE_WORDS, 0, self._kernel.PAD_TILES, kinds.index(schedule.kind),
                column, column + 1, column + 2, schedule.block, schedule.rows, which,
            ]  # fmt: skip
            column += 3
        return words

    def _padding(self, buffer: BufferSpec) -> tuple[int, int]:
        """The kernel's number for a rule, and the word that it fills with."""
        kernel = self._kernel
        if buffer.pad in ("zero", "one"):
            value = np.array(int(buffer.pad == "one"), buffer.dtype)
            return kernel.PAD_FILL, int(value.view(np.int32))
        return (kernel.PAD_LAST if buffer.pad == "repeat_last" else kernel.PAD_ROW), 0


def _width(buffer: BufferSpec) -> int:
    return int(np.prod(buffer.trailing, dtype=int))


def _words(array: np.ndarray, buffer: BufferSpec) -> np.ndarray:
    """An item's data for a buffer, as int32 words."""
    return np.ascontiguousarray(array, dtype=buffer.dtype).reshape(-1).view(np.int32)
