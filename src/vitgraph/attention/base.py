"""One signature for packed bidirectional attention."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

ANY, LONG = 2, 3
"""Forms of a pack: segments of any lengths; one segment, or only long ones. torch.compile makes one code for these two
numbers; for True and False, or 0 and 1, it would make two."""


@dataclass(frozen=True)
class Segments:
    """How the rows of a buffer are cut into attention segments.

    Attributes:
        cu_seqlens: `[S + 1]` int32 offsets on the device, from 0; empty segments repeat the last offset.
        max_seqlen: host constant, at least the longest segment ever replayed with these buffers, in rows.
        lengths: segment lengths on the host where they are known (eager on the CPU), else None. A captured
            graph must not depend on them.
        tiles: `[tiles, 4]` int32 tile schedule on the device, for backends that ask for one.
        block: query rows of one tile of that schedule.
        form: ANY or LONG.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    lengths: tuple[int, ...] | None = None
    tiles: Tensor | None = None
    block: int = 0
    form: int = ANY


class VarlenAttention(Protocol):
    """An attention backend, called as `backend(q, k, v, segments, scale)`.

    q, k, v and the result are `[T, H, Dh]`. A row attends to the rows of its own segment. Rows past the last segment
    come out as zeros, whatever lies in q, k and v there.
    """

    name: str

    def block(self, rows: int, longest: int) -> int:
        """Query rows of one tile of the schedule for a buffer of `rows` rows whose segments are at most `longest`
        rows long; 0 when the backend needs no schedule."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
        """Packed attention."""


def tune(attention: VarlenAttention, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> None:
    """Lets a backend that has configurations choose among them by measurement; on CUDA, and only where it must."""
    choose = getattr(attention, "tune", None)
    if choose is not None and device.type == "cuda":
        choose(heads, head_dim, device, dtype)


def warm_up(attention: VarlenAttention, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> None:
    """Lets a backend that compiles on first use do so; not under capture."""
    run = getattr(attention, "warm_up", None)
    if run is not None:
        run(heads, head_dim, device, dtype)


def kernel_of(attention: VarlenAttention, rows: int, longest: int) -> Hashable:
    """What tells the kernel for a buffer from a backend's other ones; the arguments are those of `block`."""
    name = getattr(attention, "kernel", attention.block)
    found: Hashable = name(rows, longest)
    return found


def has_own_graph(attention: VarlenAttention, rows: int) -> bool:
    """Whether packs of one or of long segments in a buffer of `rows` rows run another kernel than the others."""
    long = getattr(attention, "long", None)
    return long is not None and long(rows)


def tile_bound(rows: int, segments: int, block: int) -> int:
    """Most tiles that a schedule can need."""
    return rows // block + segments + 1


def tiles_of(ends: np.ndarray, block: int) -> np.ndarray:
    """The real tiles of segments that follow each other from row 0.

    A tile is (first row, end row, first key row, end key row). Those with most keys lead, so that long ones do not
    finish last.

    Args:
        ends: `[S]` last row of each segment, exclusive.
        block: query rows of a tile.

    Returns:
        `[tiles, 4]` int32.
    """
    starts = np.concatenate([np.zeros(1, ends.dtype), ends[:-1]]) if len(ends) else ends
    if len(starts) > 1:
        order = np.argsort(starts - ends, kind="stable")
        starts, ends = starts[order], ends[order]
    counts = -((starts - ends) // block)
    owner = np.repeat(np.arange(len(starts)), counts)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = starts[owner] + within * block
    tiles = np.stack([first, np.minimum(first + block, ends[owner]), starts[owner], ends[owner]], axis=1)
    return tiles.astype(np.int32, copy=False)


def write_schedule(
    parts: Sequence[np.ndarray], shifts: Sequence[int], filled: int, rows: int, block: int, out: np.ndarray
) -> None:
    """Writes the tile schedule of a pack: a launch over it covers the real tiles and nothing else.

    After the real tiles come tiles with no keys, whose rows are written as zeros: the rows past the last segment. The
    rest of the schedule is empty tiles.

    Args:
        parts: `[tiles, 4]` of each item, from `tiles_of`, in launch order.
        shifts: rows before each of these items.
        filled: rows of all items.
        rows: rows of the buffer.
        block: query rows of a tile.
        out: `[tile_bound(rows, S, block), 4]` int32; every entry is written.
    """
    real = 0
    for tiles, shift in zip(parts, shifts, strict=True):
        np.add(tiles, shift, out=out[real : real + len(tiles)])
        real += len(tiles)
    tail = np.arange(filled, rows, block)
    end = real + len(tail)
    out[real:end, 0] = tail
    out[real:end, 1] = np.minimum(tail + block, rows)
    out[real:end, 2:] = 0
    out[end:] = 0


def write_tiles(cu_seqlens: np.ndarray, rows: int, block: int, out: np.ndarray) -> None:
    """As `write_schedule`, for segments as if of one item.

    Args:
        cu_seqlens: `[S + 1]` segment offsets.
        rows, block, out: see `write_schedule`.
    """
    write_schedule([tiles_of(cu_seqlens[1:], block)], [0], int(cu_seqlens[-1]), rows, block, out)
