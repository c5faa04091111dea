"""Staging slots: pinned host memory through which metadata and pixel rows travel to the device."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vitgraph.engine.cudart import copy_pinned

if TYPE_CHECKING:
    from vitgraph.engine.buffers import MetadataLayout

MOST_CUTS, MOST_ADDRESSES = 1024, 1024
CHUNK_BYTES = 4 << 20
"""Rows are staged and sent in parts of about this size: one travels while the next is staged."""


class StagingSlot:
    """One host copy of what travels to the device, pinned for CUDA, and the event after its last transfer.

    Pixel rows are made when the first ones come from the host.

    Args:
        nbytes: of the metadata block.
        pixel_shape, dtype: of the pixel rows.
        device: that reads it.

    Attributes:
        reader: waits for the graph that reads the rows that were sent; None where none does.
    """

    def __init__(self, nbytes: int, pixel_shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self.block = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=self._pinned)
        self.bytes = self.block.numpy()
        self.event = torch.cuda.Event() if self._pinned else None
        self.reader: Callable[[], None] | None = None
        self._recorded = self._lent = False
        self._pinned_at: set[int] = set()
        self._pixel_shape, self._dtype, self._device = pixel_shape, dtype, device
        self._cuts: dict[tuple[int, int], Tensor] = {}
        self._parts: dict[MetadataLayout, tuple[Tensor, dict[str, np.ndarray]]] = {}

    @cached_property
    def pixels(self) -> Tensor:
        """`[P, patch_width]` on the host."""
        return torch.empty(self._pixel_shape, dtype=self._dtype, pin_memory=self._pinned)

    @cached_property
    def _copies(self) -> torch.cuda.Stream:
        """Where pixel rows travel, beside the replays."""
        return torch.cuda.Stream(self._device)

    @cached_property
    def _arrived(self) -> torch.cuda.Event:
        """After the last rows that were sent."""
        return torch.cuda.Event()

    @cached_property
    def _landing(self) -> Tensor:
        """`[P, patch_width]` on the device: rows arrive here while a replay still reads the static ones."""
        landing = torch.empty(self._pixel_shape, dtype=self._dtype, device=self._device)
        # Its memory may have been freed by something that still runs on the current stream.
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        return landing

    @property
    def device_bytes(self) -> int:
        """Device memory that it holds."""
        landing = self.__dict__.get("_landing")
        return 0 if landing is None else landing.nbytes

    def part(self, layout: MetadataLayout) -> tuple[Tensor, dict[str, np.ndarray]]:
        """The part of the block that one layout takes: its bytes, and the same as buffers."""
        if layout not in self._parts:
            self._parts[layout] = self.block[: layout.nbytes], layout.arrays(self.bytes)
        return self._parts[layout]

    def send(self, runs: list[tuple[int, Tensor]], stream: torch.cuda.Stream | None = None) -> Tensor:
        """Sends rows from the host, and lets the current stream wait for them.

        Rows that are pinned and of the right dtype travel from the caller's memory; `return_rows` waits until they
        have been read. Others are cast into pinned rows first.

        Args:
            runs: first row and `[P_i, patch_width]`; not empty.
            stream: the current stream, or None to look it up.

        Returns:
            `[P, patch_width]` on the device, the rows in their places.
        """
        landing, copies = self._landing, self._copies
        stream = stream or torch.cuda.current_stream(self._device)
        for row, run in runs:
            landed = self._landing_of(row, run.shape[0])
            if self._can_lend(run):
                self._lent = True
                copy_pinned(landed, run, copies)
            else:
                # The stream's own context manager takes less time than `torch.cuda.stream`, or `set_stream` twice.
                with copies:
                    self._stage(landed, run, row)
        self._arrived.record(copies)
        stream.wait_event(self._arrived)
        return landing

    def _landing_of(self, row: int, rows: int) -> Tensor:
        """A part of the landing rows. What was cut before is kept: a cut takes half as long as a copy."""
        part = self._cuts.get((row, rows))
        if part is None:
            if len(self._cuts) >= MOST_CUTS:
                self._cuts.clear()
            part = self._cuts[row, rows] = self._landing.narrow(0, row, rows)
        return part

    def _can_lend(self, run: Tensor) -> bool:
        """Whether rows can travel from the caller's memory as they are."""
        return run.dtype == self._dtype and run.is_contiguous() and self._is_pinned(run)

    def _stage(self, landed: Tensor, run: Tensor, row: int) -> None:
        """Casts rows into pinned ones, and sends those."""
        staged = self.pixels[row : row + run.shape[0]]
        rows = max(1, CHUNK_BYTES // (staged.stride(0) * staged.element_size()))
        for part, source, target in zip(staged.split(rows), run.split(rows), landed.split(rows), strict=True):
            part.copy_(source)
            target.copy_(part, non_blocking=True)

    def _is_pinned(self, run: Tensor) -> bool:
        """Asks the driver once per address, which takes a while: allocators keep pinned memory. Where that was given up
        nevertheless, the driver stages the rows itself."""
        address = run.data_ptr()
        if address in self._pinned_at:
            return True
        if not run.is_pinned():
            return False
        if len(self._pinned_at) >= MOST_ADDRESSES:
            self._pinned_at.clear()
        self._pinned_at.add(address)
        return True

    def return_rows(self) -> None:
        """Until the device has read the rows that were sent from the caller's own memory."""
        if self._lent:
            self._lent = False
            self._arrived.synchronize()

    def record(self, stream: torch.cuda.Stream | None) -> None:
        """Notes that everything read from here has been queued on the stream."""
        if self.event is not None:
            self.event.record(stream)
            self._recorded = True

    def wait(self) -> None:
        """Until the device has read what was written here last."""
        if self.reader is not None:
            self.reader()
            self.reader = None
        if self.event is not None and self._recorded:
            self.event.synchronize()
            self._recorded = False
