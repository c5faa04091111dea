"""Filling static buffers: metadata from the caches, pixel rows from the caller."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from vitgraph.core import Grid, Pack
from vitgraph.engine.blocks import BlockCache, KeptBlock
from vitgraph.engine.buffers import Arena, StaticBuffers, with_lengths
from vitgraph.engine.pixels import PieceRows, copy_rows
from vitgraph.engine.slots import StagingSlot
from vitgraph.errors import PatchError
from vitgraph.models.contract import Tower, TowerBuffers
from vitgraph.planning.metadata import MetadataCache

COMMON_SIDE = 32


class Staging:
    """Writes packs into static buffers.

    Args:
        tower: whose metadata it writes.
        device: of the buffers.
        most_grids: grids whose metadata stays on the host.
    """

    def __init__(self, tower: Tower, device: torch.device, most_grids: int) -> None:
        self.grids = MetadataCache(tower.spec.counts, tower.metadata, most_grids)
        self.blocks = BlockCache()
        self.metadata_is_only_read = True
        """False once a forward was seen to write to its metadata: what lies there is then written for every run."""
        self._spec, self._device = tower.spec, device
        self._sent: StagingSlot | None = None

    def warm(self, grids: Iterable[Grid] | None) -> None:
        """Computes the metadata of grids ahead of their first use; default: square images of usual sizes."""
        self.grids.warm(self._common_grids() if grids is None else grids)

    def _common_grids(self) -> Iterable[Grid]:
        for side in range(1, COMMON_SIDE + 1):
            grid = Grid(1, side * self._spec.merge, side * self._spec.merge)
            try:
                self._spec.check_grid(grid)
            except PatchError:
                continue
            yield grid

    def fill_pack(
        self, buffers: StaticBuffers, pack: Pack, pixels: Sequence[PieceRows], stream: torch.cuda.Stream | None
    ) -> None:
        """Fills the buffers of the pack's budget, its metadata from the device if it is kept there.

        Args:
            buffers: of the pack's budget.
            pack: to run.
            pixels: of its pieces, in row order.
            stream: the current stream on CUDA.
        """
        key = pack.budget, pack.grids
        kept = self.blocks.find(key)
        if kept is None:
            self.fill(buffers, pack.grids, pixels, stream)
            buffers.arena.holds = self.blocks.offer(key, buffers.block)
            return
        self.grids.count_hits(len(pack.grids))
        self.load(buffers, kept, stream)
        self.copy_pixels(buffers.inputs.pixel_values, pixels, buffers.arena, stream)

    def load(self, buffers: StaticBuffers, kept: KeptBlock, stream: torch.cuda.Stream | None) -> None:
        """Copies a kept block of this budget into the static one, unless its bytes lie there already.

        Args:
            buffers: of the budget.
            kept: not dropped.
            stream: the current stream on CUDA.
        """
        arena, content = buffers.arena, kept.content
        if arena.holds is kept and self.metadata_is_only_read:
            return
        assert content is not None, "a dropped block cannot be loaded"
        arena.holds = None
        buffers.block.copy_(content, non_blocking=True)
        arena.holds = kept
        if stream is not None:
            # The cache may drop it before this stream has read it, and another stream may have made it.
            content.record_stream(stream)

    def copy_pixels(
        self, target: Tensor, pixels: Sequence[PieceRows], arena: Arena, stream: torch.cuda.Stream | None
    ) -> None:
        """Copies rows into static ones, through a staging slot where some come from the host.

        Args:
            target: `[P, patch_width]`, of the arena.
            pixels: in row order.
            arena: whose slots to use.
            stream: the current stream on CUDA.
        """
        from_host = any(rows.device != self._device for rows in pixels)
        slot = arena.next_slot() if from_host else None
        self._copy_rows(target, pixels, slot)
        if slot is not None:
            slot.record(stream)

    def _copy_rows(self, target: Tensor, pixels: Sequence[PieceRows], slot: StagingSlot | None) -> None:
        self._sent = slot
        copy_rows(target, pixels, slot)

    def return_rows(self) -> None:
        """Until the device has read what was sent from the caller's own memory; called before a run returns."""
        if self._sent is not None:
            self._sent.return_rows()
            self._sent = None

    def fill(
        self,
        buffers: StaticBuffers,
        grids: Sequence[Grid],
        pixels: Sequence[PieceRows],
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        """One staged copy of all metadata, then the pixel rows, all in stream order.

        Args:
            buffers: to fill.
            grids, pixels: of the pieces, in row order.
            stream: the current stream, or None to look it up.
        """
        slot = buffers.arena.next_slot()
        staged, arrays = slot.part(buffers.layout)
        buffers.layout.write(arrays, self.grids.get_all(grids))
        buffers.arena.holds = None
        buffers.block.copy_(staged, non_blocking=True)
        self._copy_rows(buffers.inputs.pixel_values, pixels, slot)
        slot.record(stream)

    def uncaptured(self, inputs: TowerBuffers, grids: Sequence[Grid]) -> TowerBuffers:
        """Inputs of a forward that is not captured: on the CPU the reference attention may use the host's segment
        lengths; nothing else changes."""
        if self._device.type == "cuda":
            return inputs
        lengths = {}
        plans = [self.grids.peek(grid) for grid in grids]
        for segments in self._spec.segments:
            ends = [np.diff(plan.metadata[segments.name], prepend=0) for plan in plans]
            lengths[segments.name] = tuple(int(n) for n in np.concatenate(ends))
        return with_lengths(inputs, lengths)


def pixels_of(pack: Pack, rows: Tensor | Sequence[Tensor]) -> list[PieceRows]:
    """Rows of the pack's pieces.

    Args:
        pack: whose pieces are meant.
        rows: one tensor with the rows of all pieces, or per item its rows.
    """
    if isinstance(rows, Tensor):
        return [rows]
    found = []
    for item, grid, first_frame in pack.pieces:
        own = rows[item]
        if own.shape[0] != grid.patches:
            # Frames are contiguous in every row order.
            start = first_frame * grid.h * grid.w
            own = own[start : start + grid.patches]
        found.append(own)
    return found
