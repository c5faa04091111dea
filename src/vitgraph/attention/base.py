"""One signature for packed bidirectional attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


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
        long: whether there is never more than one segment, or only long ones.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    lengths: tuple[int, ...] | None = None
    tiles: Tensor | None = None
    block: int = 0
    long: bool = False


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


def has_own_graph(attention: VarlenAttention, rows: int) -> bool:
    """Whether packs of one or of long segments in a buffer of `rows` rows run another kernel than the others."""
    long = getattr(attention, "long", None)
    return long is not None and long(rows)


def tile_bound(rows: int, segments: int, block: int) -> int:
    """Most tiles that `write_tiles` can need."""
    return rows // block + segments + 1


def write_tiles(cu_seqlens: np.ndarray, rows: int, block: int, out: np.ndarray) -> None:
    """Writes the schedule of a pack on the host: a launch over it covers the real tiles and nothing else.

    A tile is (first row, end row, first key row, end key row). Real tiles come first, those with most keys leading so
    that long ones do not finish last. Then come tiles with no keys, whose rows are written as zeros: the rows past
    the last segment. The rest of the schedule is empty tiles.

    Args:
        cu_seqlens: `[S + 1]` segment offsets.
        rows: rows of the buffer.
        block: query rows of a tile.
        out: `[tile_bound(rows, S, block), 4]` int32; every entry is written.
    """
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    if len(starts) > 1:
        order = np.argsort(starts - ends, kind="stable")
        starts, ends = starts[order], ends[order]
    counts = -((starts - ends) // block)
    owner = np.repeat(np.arange(len(starts)), counts)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    real = len(owner)
    first = starts[owner] + within * block
    out[:real, 0] = first
    out[:real, 1] = np.minimum(first + block, ends[owner])
    out[:real, 2] = starts[owner]
    out[:real, 3] = ends[owner]
    tail = np.arange(int(cu_seqlens[-1]), rows, block)
    end = real + len(tail)
    out[real:end, 0] = tail
    out[real:end, 1] = np.minimum(tail + block, rows)
    out[real:end, 2:] = 0
    out[end:] = 0
