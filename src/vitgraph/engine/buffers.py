"""Static buffers: where metadata and pixels lie, on the host and on the device.

All metadata of a pack travels as one block of bytes. Each declared buffer owns an aligned stretch of it; the same
layout describes the host copy and the device copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vitgraph.attention.base import Segments
from vitgraph.core import Counts
from vitgraph.models.contract import BufferSpec, TowerBuffers, TowerSpec
from vitgraph.planning.metadata import Metadata

ALIGNMENT = 256
_TORCH_DTYPES = {"int32": torch.int32, "float32": torch.float32}


@dataclass(frozen=True)
class Slot:
    """One buffer's stretch: `offset` in bytes, full `shape` with the leading constant rows."""

    spec: BufferSpec
    offset: int
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.spec.dtype).itemsize


class MetadataLayout:
    """Placement of a tower's metadata buffers for one capacity.

    Args:
        buffers: declarations.
        capacity: rows of each kind.
    """

    def __init__(self, buffers: Sequence[BufferSpec], capacity: Counts) -> None:
        slots: list[Slot] = []
        end = 0
        for spec in buffers:
            slots.append(Slot(spec, end, (spec.lead + capacity[spec.rows], *spec.trailing)))
            end += -(-slots[-1].nbytes // ALIGNMENT) * ALIGNMENT
        self.slots = tuple(slots)
        self.nbytes = end

    def tensors(self, block: Tensor) -> dict[str, Tensor]:
        """Views into a uint8 block of at least `nbytes`, by buffer name."""
        return {
            slot.spec.name: block[slot.offset : slot.offset + slot.nbytes]
            .view(_TORCH_DTYPES[slot.spec.dtype])
            .view(slot.shape)
            for slot in self.slots
        }

    def arrays(self, block: np.ndarray) -> dict[str, np.ndarray]:
        """As `tensors`, for a numpy uint8 block."""
        return {
            slot.spec.name: block[slot.offset : slot.offset + slot.nbytes].view(slot.spec.dtype).reshape(slot.shape)
            for slot in self.slots
        }

    def write(self, block: np.ndarray, items: Sequence[Metadata], counts: Sequence[Counts]) -> None:
        """Writes the metadata of a pack: items one after another, shifted and padded as declared.

        Args:
            block: uint8, at least `nbytes`; every byte of every buffer is written.
            items: metadata per item, in row order.
            counts: rows per item.
        """
        for slot in self.slots:
            array = block[slot.offset : slot.offset + slot.nbytes].view(slot.spec.dtype).reshape(slot.shape)
            _write_buffer(slot.spec, array, items, counts)


def _write_buffer(spec: BufferSpec, out: np.ndarray, items: Sequence[Metadata], counts: Sequence[Counts]) -> None:
    out[: spec.lead] = 0
    row = spec.lead
    shift = 0
    for metadata, count in zip(items, counts, strict=True):
        values = metadata[spec.name]
        end = row + count[spec.rows]
        assert len(values) == end - row, f"{spec.name}: {len(values)} rows, declared {end - row}"
        if spec.offset is None:
            out[row:end] = values
        else:
            np.add(values, shift, out=out[row:end], casting="unsafe")
            shift += count[spec.offset]
        row = end
    _pad(spec, out, row)


def _pad(spec: BufferSpec, out: np.ndarray, row: int) -> None:
    if spec.pad == "zero":
        out[row:] = 0
    elif spec.pad == "one":
        out[row:] = 1
    elif spec.pad == "repeat_last":
        out[row:] = out[row - 1] if row else 0
    else:
        out[row:] = np.arange(row - spec.lead, len(out) - spec.lead, dtype=out.dtype)


def max_seqlens(spec: TowerSpec, capacity: Counts) -> dict[str, int]:
    """Longest segment that a capacity can hold, in rows, by segment set."""
    rows = capacity["patch"]
    return {s.name: rows if s.max_length is None else s.max_length for s in spec.segments}


@dataclass
class StagingSlot:
    """One host copy of the metadata block and of the pixel rows, and the event after its last transfer."""

    block: Tensor
    pixels: Tensor
    event: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Until the device has read what was written here last."""
        if self.event is not None:
            self.event.synchronize()


class Arena:
    """The one set of static buffers that all budgets share, sized for the largest; budgets are views of it.

    Args:
        spec: the tower's declarations.
        capacity: of the largest budget.
        device, dtype: the tower's.
        nbytes: bytes of the largest metadata block.
    """

    def __init__(
        self, spec: TowerSpec, capacity: Counts, nbytes: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.device = device
        self._shape = (capacity["patch"], spec.patch_width)
        self._dtype = dtype
        self._nbytes = max(nbytes, 1)
        self.block = torch.zeros(self._nbytes, dtype=torch.uint8, device=device)
        self.pixels = torch.zeros(self._shape, dtype=dtype, device=device)
        self._output = torch.zeros(spec.levels * capacity["token"] * spec.width, dtype=dtype, device=device)
        self._slots: list[StagingSlot | None] = [None, None]
        self._next = 0

    @property
    def nbytes(self) -> int:
        """Device bytes held."""
        return self.block.nbytes + self.pixels.nbytes + self._output.nbytes

    def output(self, spec: TowerSpec, tokens: int) -> Tensor:
        """Static output of a budget, `[levels, tokens, C]`."""
        return self._output[: spec.levels * tokens * spec.width].view(spec.levels, tokens, spec.width)

    def next_slot(self) -> StagingSlot:
        """The host copy whose turn it is, once the device is done with it."""
        index, self._next = self._next, 1 - self._next
        slot = self._slots[index]
        if slot is None:
            slot = self._slots[index] = self._new_slot()
        slot.wait()
        return slot

    def _new_slot(self) -> StagingSlot:
        pinned = self.device.type == "cuda"
        block = torch.zeros(self._nbytes, dtype=torch.uint8, pin_memory=pinned)
        pixels = torch.zeros(self._shape, dtype=self._dtype, pin_memory=pinned)
        return StagingSlot(block, pixels, torch.cuda.Event() if pinned else None)


@dataclass(frozen=True)
class StaticBuffers:
    """One budget's view of the arena.

    Attributes:
        layout: of its metadata block.
        inputs: what the tower's forward reads; addresses never change.
        output: `[levels, M, C]`, where a captured forward leaves its result.
    """

    layout: MetadataLayout
    inputs: TowerBuffers
    output: Tensor
    arena: Arena = field(repr=False)

    @classmethod
    def create(cls, spec: TowerSpec, capacity: Counts, layout: MetadataLayout, arena: Arena) -> StaticBuffers:
        """The view of `arena` for a budget of this capacity."""
        metadata = layout.tensors(arena.block)
        longest = max_seqlens(spec, capacity)
        segments = {name: Segments(metadata[name], longest[name]) for name in longest}
        inputs = TowerBuffers(arena.pixels[: capacity["patch"]], metadata, segments)
        return cls(layout, inputs, arena.output(spec, capacity["token"]), arena)


def with_lengths(inputs: TowerBuffers, lengths: Mapping[str, tuple[int, ...]]) -> TowerBuffers:
    """The same buffers with segment lengths known on the host, for a forward that is not captured."""
    segments = {
        name: Segments(s.cu_seqlens, max(lengths[name], default=0), lengths[name])
        for name, s in inputs.segments.items()
    }
    return TowerBuffers(inputs.pixel_values, inputs.metadata, segments)
