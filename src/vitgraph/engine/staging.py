"""Filling static buffers: metadata from the caches, pixel rows from the caller."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from vitgraph.core import Grid, Grids, KnownGrid, Pack, Stretches, places_of
from vitgraph.engine.buffers import StaticBuffers, with_lengths
from vitgraph.engine.compose import Composer
from vitgraph.engine.intake import Intake
from vitgraph.engine.mailbox import Mailbox, Request
from vitgraph.engine.pixels import BatchRows, PieceRows, copy_rows, land_rows, pixels_of
from vitgraph.engine.slots import StagingSlot
from vitgraph.errors import PatchError
from vitgraph.models.contract import Tower, TowerBuffers
from vitgraph.planning.metadata import MetadataCache

logger = logging.getLogger("vitgraph")

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
        self.metadata_is_only_read = True
        """False once a forward was seen to write to its metadata: what lies there is then written for every run."""
        self._spec, self._device = tower.spec, device
        self.written_on_host = 0
        """Packs whose metadata the host wrote."""
        self.spared = 0
        """Lookups of metadata that lay on the device already; the cache counts its own hits."""
        self._sent: StagingSlot | None = None
        self._told = False

    def warm(self, known: Sequence[KnownGrid], composer: Composer | None = None) -> None:
        """Computes the metadata of grids ahead of their first use.

        Args:
            known: the grids.
            composer: whose device gets it, too.
        """
        self.grids.warm(own.grid for own in known)
        if composer is not None:
            composer.learn(known, lambda new: [self.grids.peek(grid) for grid in new])

    def common_grids(self) -> Iterable[Grid]:
        """Square images of usual sizes."""
        for side in range(1, COMMON_SIDE + 1):
            grid = Grid(1, side * self._spec.merge, side * self._spec.merge)
            try:
                self._spec.check_grid(grid)
            except PatchError:
                continue
            yield grid

    def holds(self, buffers: StaticBuffers, pack: Pack) -> bool:
        """Whether the pack's metadata lies in the buffers already."""
        return buffers.arena.holds is pack and self.metadata_is_only_read

    def request(
        self,
        intake: Intake,
        buffers: StaticBuffers,
        pack: Pack,
        rows: BatchRows,
        stream: torch.cuda.Stream | None,
    ) -> Request:
        """What the graph of the pack's budget shall do; what it cannot do itself is queued before it.

        Args:
            intake: of the buffers' arena.
            buffers: of the pack's budget.
            pack: to run.
            rows: of its batch.
            stream: the current stream.
        """
        places = b""
        if self.holds(buffers, pack):
            self.spared += len(pack.grids)
        else:
            places = self._places(intake.composer, buffers, pack, stream)
        stretches, as_one = pack.stretches, rows
        if not isinstance(rows, Tensor) and len(pack.grids) == 1:
            (as_one,) = pixels_of(pack, rows)
            stretches = Stretches.of_first(as_one.shape[0])
        source = intake.source(as_one) if isinstance(as_one, Tensor) else None
        request = None if source is None else source.request(places, stretches.table)
        if request is not None:
            return request
        pixels = pixels_of(pack, rows)
        if self._all_elsewhere(rows, pixels):
            return self._land(intake, buffers, places, pixels, stream)
        self._bring_rows(buffers, pixels, stream)
        return Request(places)

    def _all_elsewhere(self, rows: BatchRows, pixels: Sequence[PieceRows]) -> bool:
        """Whether none of a pack's rows lie on the device."""
        if isinstance(rows, Tensor):
            return rows.device != self._device
        return all(piece.device != self._device for piece in pixels)

    def _land(
        self,
        intake: Intake,
        buffers: StaticBuffers,
        places: bytes,
        pixels: Sequence[PieceRows],
        stream: torch.cuda.Stream | None,
    ) -> Request:
        """Sends rows, none of which lie on the device, to where they land there; the request for them."""
        self._sent = slot = buffers.arena.next_slot()
        landing, filled = land_rows(pixels, slot, stream)
        source = intake.source(landing)
        request = source and source.request(places, Stretches.of_first(filled).table)
        assert request is not None, "landing rows lie on the device, one after another, in the tower's dtype"
        return request

    def launched(self, mailbox: Mailbox) -> None:
        """Notes that the graph which reads what was sent has been launched.

        Args:
            mailbox: of its request.
        """
        if self._sent is not None:
            self._sent.reader = partial(mailbox.wait_until_copied, mailbox.posted)

    def _places(
        self, composer: Composer, buffers: StaticBuffers, pack: Pack, stream: torch.cuda.Stream | None
    ) -> bytes:
        """Where the parts of the pack's items lie; where they cannot, the host writes the metadata."""
        assert isinstance(pack.grids, Grids), "packs for graphs come from the planner"
        known = pack.grids.known
        places = places_of(known)
        if places:
            self.spared += len(known)
            return places
        before = self.grids.lookups
        if composer.learn(known, self.grids.get_all):
            self.spared += len(known) - (self.grids.lookups - before)
            return places_of(known)
        if not self._told:
            self._told = True
            logger.warning(
                "metadata is written on the host: the parts of %d items need too much memory", len(pack.grids)
            )
        self.fill(buffers, pack.grids, [], stream)
        return b""

    def fill_pack(self, buffers: StaticBuffers, pack: Pack, rows: BatchRows, stream: torch.cuda.Stream | None) -> None:
        """Fills the buffers of the pack's budget; its metadata only if that does not lie there already.

        Args:
            buffers: of the pack's budget.
            pack: to run.
            rows: of its batch.
            stream: the current stream on CUDA.
        """
        pixels = pixels_of(pack, rows)
        if self.holds(buffers, pack):
            self.spared += len(pack.grids)
            self._bring_rows(buffers, pixels, stream)
        else:
            self.fill(buffers, pack.grids, pixels, stream)
            buffers.arena.holds = pack

    def _bring_rows(
        self, buffers: StaticBuffers, pixels: Sequence[PieceRows], stream: torch.cuda.Stream | None
    ) -> None:
        from_host = any(rows.device != self._device for rows in pixels)
        slot = buffers.arena.next_slot() if from_host else None
        self._copy_rows(buffers.inputs.pixel_values, pixels, slot, stream)
        if slot is not None:
            slot.record(stream)

    def _copy_rows(
        self,
        target: Tensor,
        pixels: Sequence[PieceRows],
        slot: StagingSlot | None,
        stream: torch.cuda.Stream | None,
    ) -> None:
        self._sent = slot
        copy_rows(target, pixels, slot, stream)

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
        counted: bool = True,
    ) -> None:
        """The pixel rows, then one small transfer for all metadata, in stream order.

        Args:
            buffers: to fill.
            grids, pixels: of the pieces, in row order.
            stream: the current stream, or None to look it up.
            counted: whether they are a pack of a caller's, whose metadata counts as written on the host.
        """
        self.written_on_host += counted
        slot = buffers.arena.next_slot()
        buffers.arena.holds = None
        self._copy_rows(buffers.inputs.pixel_values, pixels, slot, stream)
        staged, arrays = slot.part(buffers.layout)
        buffers.layout.write(arrays, self.grids.get_all(grids))
        buffers.block.copy_(staged, non_blocking=True)
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
