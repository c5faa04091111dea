"""The contract between a tower and the engine: frozen data, one host function, one capturable forward.

The engine allocates, stages, pads and splits from the declarations below and knows no family.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from torch import Tensor, nn

from vitgraph.attention.base import Segments
from vitgraph.core import Counts, Grid
from vitgraph.errors import PatchError
from vitgraph.planning.cost import segments_are_long

Pad = Literal["zero", "one", "repeat_last", "identity_tail"]


@dataclass(frozen=True)
class BufferSpec:
    """One static metadata buffer, `[lead + rows, *trailing]`.

    Attributes:
        name: key in `Tower.metadata` and in `TowerBuffers`.
        dtype: numpy dtype name, "int32" or "float32".
        rows: what its rows count: "patch", "token", "segment", "window", "item", ...
        trailing: shape after the row axis.
        pad: what fills the rows past the last item: zeros, ones, the last value again, or the row's own index.
        offset: values of an item are shifted by the rows of this kind that lie before the item.
        lead: constant zero rows before the first item (1 for `cu_seqlens`).
    """

    name: str
    dtype: str
    rows: str
    trailing: tuple[int, ...] = ()
    pad: Pad = "zero"
    offset: str | None = None
    lead: int = 0


def cu_seqlens_buffer(name: str = "cu_seqlens", rows: str = "segment") -> BufferSpec:
    """Declaration of attention offsets: per item the segment ends, `[S]`; in the buffer `[S + 1]` from 0."""
    return BufferSpec(name, "int32", rows, pad="repeat_last", offset="patch", lead=1)


@dataclass(frozen=True)
class SegmentSpec:
    """A set of attention segments, described by the buffer of that name.

    Attributes:
        name: name of its `cu_seqlens` buffer.
        max_length: most patch rows in one segment, or None when only the budget bounds it.
    """

    name: str = "cu_seqlens"
    max_length: int | None = None


@dataclass(frozen=True)
class OutputSpec:
    """One output of a tower, `[levels, rows, width]`.

    Attributes:
        name: for messages.
        rows: what its rows count: "token", "patch", ...
        width: values in one row.
        levels: maps of the same size, stacked.
    """

    name: str
    rows: str
    width: int
    levels: int = 1


@dataclass(frozen=True)
class TowerSpec:
    """What the engine needs to know about a tower.

    Families whose item formulas differ override `counts` and `capacity` in a subclass.

    Attributes:
        family: registry name.
        modalities: "image" and/or "video".
        patch_width: values in one pixel row.
        merge: spatial merge side m; one token per m x m patches.
        temporal_patch: frames that one temporal patch covers.
        width: output width C.
        deepstack: number of extra output levels.
        buffers: metadata buffers.
        segments: attention segment sets, each named after a buffer.
        unit: budgets are multiples of this many tokens (256 for a tower of fixed tiles that yield 256 each).
        splits_by_frame: whether frames of a clip are independent, so that a long clip may run in pieces.
        extra_outputs: what `Tower.forward` returns after the tokens; none for a plain encoder.
    """

    family: str
    modalities: tuple[str, ...]
    patch_width: int
    merge: int
    temporal_patch: int
    width: int
    buffers: tuple[BufferSpec, ...]
    deepstack: int = 0
    segments: tuple[SegmentSpec, ...] = (SegmentSpec(),)
    splits_by_frame: bool = False
    unit: int = 1
    extra_outputs: tuple[OutputSpec, ...] = ()

    @property
    def levels(self) -> int:
        """Levels of the first output: the tokens and every deepstack map."""
        return 1 + self.deepstack

    @property
    def outputs(self) -> tuple[OutputSpec, ...]:
        """Everything that `Tower.forward` returns, in order."""
        return (OutputSpec("tokens", "token", self.width, self.levels), *self.extra_outputs)

    def is_long(self, counts: Counts) -> bool:
        """Whether the segments of items with these counts are long; see `are_long`."""
        for rows, segments in self.segment_sets:  # noqa: SIM110 (every call asks, and a generator takes longer)
            if not segments_are_long(counts[rows], counts[segments]):
                return False
        return True

    @cached_property
    def segment_sets(self) -> tuple[tuple[str, str], ...]:
        """Per segment set the kinds that count its rows and its segments."""
        buffers = {buffer.name: buffer for buffer in self.buffers}
        own = [buffers[segments.name] for segments in self.segments]
        return tuple((buffer.offset or "patch", buffer.rows) for buffer in own)

    @cached_property
    def load_sets(self) -> tuple[tuple[str, str], ...]:
        """As `segment_sets`, for those that only the budget bounds."""
        pairs = zip(self.segments, self.segment_sets, strict=True)
        return tuple(kinds for segments, kinds in pairs if segments.max_length is None)

    def counts(self, grid: Grid) -> Counts:
        """Rows of each kind that one item fills. Here: one segment per temporal patch."""
        return {"patch": grid.patches, "token": grid.patches // self.merge**2, "item": 1, "segment": grid.t}

    def capacity(self, tokens: int, max_items: int, max_frames: int) -> Counts:
        """Rows of each kind that a budget of `tokens` output tokens holds."""
        segments = min(max(max_items, max_frames), tokens)
        return {"patch": tokens * self.merge**2, "token": tokens, "item": max_items, "segment": segments}

    def check_grid(self, grid: Grid) -> None:
        """Raises `PatchError` for a grid that this tower cannot encode."""
        t, h, w = grid
        if min(grid) <= 0 or h % self.merge or w % self.merge:
            raise PatchError(
                f"grid {t}x{h}x{w} does not fit {self.family}: t, h, w must be positive and h, w multiples of "
                f"{self.merge}. Resize the image to a multiple of the patch size times {self.merge}."
            )
        if t > 1 and "video" not in self.modalities:
            raise PatchError(f"grid {t}x{h}x{w} has {t} temporal patches, but {self.family} encodes images only.")


@dataclass(frozen=True)
class TowerBuffers:
    """The tensors of one forward: static buffers of a budget, or buffers of exactly the pack's size.

    Attributes:
        pixel_values: `[P, patch_width]` in the tower's dtype.
        metadata: declared buffers by name, each `[lead + rows, *trailing]`.
        segments: attention segment sets by name.
        outputs: per entry of the spec's `outputs` where `[levels, rows, width]` will be read; empty where nothing is
            prepared. A forward that writes its results there and returns them saves a copy.
    """

    pixel_values: Tensor
    metadata: Mapping[str, Tensor]
    segments: Mapping[str, Segments] = field(default_factory=dict)
    outputs: tuple[Tensor, ...] = ()


class Tower(nn.Module, ABC):
    """A vision tower: pixels of a pack in, tokens of a pack out."""

    spec: TowerSpec

    def levels(self, buffers: TowerBuffers) -> Tensor:
        """Where the tokens go: `[levels, M, C]`, prepared or new."""
        if buffers.outputs:
            return buffers.outputs[0]
        pixels, tokens = buffers.pixel_values, self.spec.outputs[0]
        return pixels.new_empty(tokens.levels, pixels.shape[0] // self.spec.merge**2, tokens.width)

    @abstractmethod
    def metadata(self, grid: Grid) -> dict[str, np.ndarray]:
        """Host arrays of one item, one entry per declared buffer. Pure: depends on the grid alone.

        Indexes are relative to the item; the engine shifts them as `BufferSpec.offset` says.
        """

    @abstractmethod
    def forward(self, buffers: TowerBuffers) -> Tensor | tuple[Tensor, ...]:
        """Static shapes in, `[levels, M, C]` out: tokens first, then the deepstack maps. Never syncs with the host.

        A tower that declares extra outputs returns a tuple, one `[levels, rows, width]` per entry of `spec.outputs`.
        """

    def compile_regions(self) -> Iterable[nn.Module]:
        """Repeated modules that `compile=True` compiles, one compiled code for all of them."""
        return ()
