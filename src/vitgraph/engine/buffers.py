"""Static buffers: where metadata and pixels lie, on the host and on the device.

All metadata of a pack travels as one block of bytes. Each declared buffer owns an aligned stretch of it; the same
layout describes the host copy and the device copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from vitgraph.attention.base import LONG, Segments, VarlenAttention, tile_bound, tiles_of, write_schedule
from vitgraph.core import Counts, Pack
from vitgraph.engine.slots import StagingSlot
from vitgraph.models.contract import BufferSpec, TowerBuffers, TowerSpec
from vitgraph.planning.metadata import GridPlan

if TYPE_CHECKING:
    from vitgraph.engine.intake import Intake

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


@dataclass(frozen=True)
class Schedule:
    """Tile schedule of one attention segment set: derived from the items' segment ends when a pack is written.

    Attributes:
        segments: name of the segment set.
        name: of the buffer.
        block: query rows of a tile.
        kind: what the segment offsets count.
        rows: of that kind that the buffer holds.
    """

    segments: str
    name: str
    block: int
    kind: str
    rows: int


def tiles_of_item(plan: GridPlan, schedule: Schedule) -> np.ndarray:
    """An item's tiles, `[tiles, 4]` int32 from its first row, made once per block size."""
    key = schedule.segments, schedule.block
    if key not in plan.derived:
        plan.derived[key] = tiles_of(plan.metadata[schedule.segments], schedule.block)
    return cast("np.ndarray", plan.derived[key])


def longest_segment(plan: GridPlan, schedules: Sequence[Schedule]) -> int:
    """Rows of an item's longest segment, over the segment sets that have schedules."""
    ends = [plan.metadata[schedule.segments] for schedule in schedules]
    return max((int(np.diff(e, prepend=0).max(initial=0)) for e in ends), default=0)


def launch_order(longest: Sequence[int] | np.ndarray) -> np.ndarray:
    """The order in which items' tiles are launched: those with the longest segments first, or they would finish last.

    Args:
        longest: rows of each item's longest segment.
    """
    return np.argsort(-np.asarray(longest, dtype=np.int64), kind="stable")


class MetadataLayout:
    """Placement of a tower's metadata buffers, and of the attention's tile schedules, for one capacity.

    Args:
        spec: the tower's declarations.
        capacity: rows of each kind.
        attention: the tower's backend; None plans no schedules.
    """

    def __init__(self, spec: TowerSpec, capacity: Counts, attention: VarlenAttention | None = None) -> None:
        self.capacity = capacity
        self._items = list(spec.buffers)
        self._kinds = {kind for buffer in spec.buffers for kind in (buffer.rows, buffer.offset) if kind}
        self._rows = {s.name: capacity[offset_kind(spec, s.name)] for s in spec.segments}
        self.longest = {s.name: s.max_length or self._rows[s.name] for s in spec.segments}
        schedules = [self._schedule(spec, s.name, attention) for s in spec.segments]
        self.schedules = tuple(pair[0] for pair in schedules if pair)
        self.slots: tuple[Slot, ...] = ()
        self.nbytes = 0
        for buffer in self._items:
            self._place(buffer, capacity[buffer.rows])
        for pair in schedules:
            if pair:
                self._place(BufferSpec(pair[0].name, "int32", "tile", (4,)), pair[1])

    def _schedule(self, spec: TowerSpec, name: str, attention: VarlenAttention | None) -> tuple[Schedule, int] | None:
        block = attention.block(self._rows[name], self.longest[name]) if attention else 0
        if not block:
            return None
        buffer = next(b for b in spec.buffers if b.name == name)
        rows = self._rows[name]
        tiles = tile_bound(rows, self.capacity[buffer.rows], block)
        return Schedule(name, f"{name}.tiles", block, offset_kind(spec, name), rows), tiles

    def _place(self, buffer: BufferSpec, rows: int) -> None:
        slot = Slot(buffer, self.nbytes, (buffer.lead + rows, *buffer.trailing))
        self.slots = (*self.slots, slot)
        self.nbytes += -(-slot.nbytes // ALIGNMENT) * ALIGNMENT

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

    def write(self, arrays: Mapping[str, np.ndarray], plans: Sequence[GridPlan]) -> None:
        """Writes the metadata of a pack: items one after another, shifted and padded as declared.

        Args:
            arrays: from `arrays()`; every entry is written.
            plans: per item, in row order.
        """
        filled = {kind: [plan.counts[kind] for plan in plans] for kind in self._kinds}
        for buffer in self._items:
            parts = [plan.metadata[buffer.name] for plan in plans]
            _write_buffer(buffer, arrays[buffer.name], parts, filled)
        order = launch_order([longest_segment(plan, self.schedules) for plan in plans])
        for schedule in self.schedules:
            before = [0, *accumulate(filled[schedule.kind])]
            parts = [tiles_of_item(plans[item], schedule) for item in order]
            shifts = [before[item] for item in order]
            write_schedule(parts, shifts, before[-1], schedule.rows, schedule.block, arrays[schedule.name])


def _write_buffer(
    spec: BufferSpec, out: np.ndarray, parts: Sequence[np.ndarray], filled: Mapping[str, Sequence[int]]
) -> None:
    """Writes one buffer.

    Args:
        spec: of the buffer.
        out: `[lead + rows, *trailing]`.
        parts: per item its rows.
        filled: per kind the rows of each item.
    """
    out[: spec.lead] = 0
    end = spec.lead
    if parts:
        rows = filled[spec.rows]
        end += sum(rows)
        written = out[spec.lead : end]
        np.concatenate(parts, out=written, casting="unsafe")
        if spec.offset is not None and len(parts) > 1:
            before = np.array([0, *accumulate(filled[spec.offset][:-1])], dtype=out.dtype)
            written += np.repeat(before, rows).reshape(-1, *(1,) * len(spec.trailing))
    _pad(spec, out, end)


def _pad(spec: BufferSpec, out: np.ndarray, row: int) -> None:
    if spec.pad == "zero":
        out[row:] = 0
    elif spec.pad == "one":
        out[row:] = 1
    elif spec.pad == "repeat_last":
        out[row:] = out[row - 1] if row else 0
    else:
        out[row:] = np.arange(row - spec.lead, len(out) - spec.lead, dtype=out.dtype)


def offset_kind(spec: TowerSpec, name: str) -> str:
    """The kind of rows that a segment set's offsets count."""
    buffer = next(b for b in spec.buffers if b.name == name)
    assert buffer.offset is not None, f"{name} holds attention offsets, so it must declare what they count"
    return buffer.offset


class Arena:
    """The one set of static buffers that all budgets share, sized for the largest; budgets are views of it.

    Args:
        spec: the tower's declarations.
        capacity: of the largest budget.
        device, dtype: the tower's.
        nbytes: bytes of the largest metadata block.

    Attributes:
        intake: brings packs to graphs; None where the host writes the block and copies the pixel rows.
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
        sizes = [out.levels * capacity[out.rows] * out.width for out in spec.outputs]
        self._outputs = [torch.zeros(size, dtype=dtype, device=device) for size in sizes]
        self._slots: list[StagingSlot | None] = [None, None]
        self._next = 0
        self.intake: Intake | None = None
        self.holds: Pack | None = None
        """The pack whose metadata the block holds; None when nobody knows. Who writes the block says so here."""

    def clear_block(self) -> None:
        """Zeros, which are valid metadata in every layout; what another budget left there need not be."""
        self.holds = None
        self.block.zero_()

    @property
    def nbytes(self) -> int:
        """Device bytes held."""
        landing = sum(slot.device_bytes for slot in self._slots if slot is not None)
        outputs = sum(output.nbytes for output in self._outputs)
        intake = self.intake.nbytes if self.intake else 0
        return self.block.nbytes + self.pixels.nbytes + outputs + landing + intake

    def outputs(self, spec: TowerSpec, capacity: Counts) -> tuple[Tensor, ...]:
        """Static outputs of a budget, each `[levels, rows, width]`."""
        return tuple(
            flat[: out.levels * capacity[out.rows] * out.width].view(out.levels, capacity[out.rows], out.width)
            for flat, out in zip(self._outputs, spec.outputs, strict=True)
        )

    def next_slot(self) -> StagingSlot:
        """The host copy whose turn it is, once the device is done with it."""
        index, self._next = self._next, 1 - self._next
        slot = self._slots[index]
        if slot is None:
            slot = self._slots[index] = self._new_slot()
        slot.wait()
        return slot

    def make_slots(self) -> None:
        """Allocates both host copies now: pinning takes milliseconds."""
        self._slots = [slot or self._new_slot() for slot in self._slots]

    def _new_slot(self) -> StagingSlot:
        return StagingSlot(self._nbytes, self._shape, self._dtype, self.device)


@dataclass(frozen=True)
class StaticBuffers:
    """One budget's view of the arena.

    Attributes:
        layout: of its metadata block.
        block: the bytes of its metadata.
        inputs: what the tower's forward reads; addresses never change.
        long: the same for packs of one or of long segments.
        outputs: each `[levels, rows, width]`, where a captured forward leaves its results.
        row_kinds: what the rows of each output count.
    """

    layout: MetadataLayout
    block: Tensor
    inputs: TowerBuffers
    long: TowerBuffers
    outputs: tuple[Tensor, ...]
    row_kinds: tuple[str, ...]
    arena: Arena = field(repr=False)

    @classmethod
    def create(cls, spec: TowerSpec, capacity: Counts, layout: MetadataLayout, arena: Arena) -> StaticBuffers:
        """The view of `arena` for a budget of this capacity."""
        metadata = layout.tensors(arena.block)
        segments = {name: Segments(metadata[name], longest) for name, longest in layout.longest.items()}
        for schedule in layout.schedules:
            plain = segments[schedule.segments]
            segments[schedule.segments] = replace(plain, tiles=metadata[schedule.name], block=schedule.block)
        outputs = arena.outputs(spec, capacity)
        inputs = TowerBuffers(arena.pixels[: capacity["patch"]], metadata, segments, outputs)
        long = replace(inputs, segments={name: replace(own, form=LONG) for name, own in segments.items()})
        kinds = tuple(output.rows for output in spec.outputs)
        return cls(layout, arena.block[: layout.nbytes], inputs, long, outputs, kinds, arena)

    def outputs_of(self, counts: Counts) -> tuple[Tensor, ...]:
        """The rows of the outputs that a pack of these counts fills."""
        return tuple([output[:, : counts[kind]] for output, kind in zip(self.outputs, self.row_kinds, strict=True)])

    def inputs_of(self, long: bool) -> TowerBuffers:
        """What a forward reads.

        Args:
            long: whether the pack is one segment, or of long ones.
        """
        return self.long if long else self.inputs


def with_lengths(inputs: TowerBuffers, lengths: Mapping[str, tuple[int, ...]]) -> TowerBuffers:
    """The same buffers with segment lengths known on the host, for a forward that is not captured."""
    segments = {
        name: replace(s, lengths=lengths[name], max_seqlen=max(lengths[name], default=0))
        for name, s in inputs.segments.items()
    }
    return replace(inputs, segments=segments)
