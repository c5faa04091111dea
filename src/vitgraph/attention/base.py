"""One signature for packed bidirectional attention, and the choice of a backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """How the rows of a buffer are cut into attention segments.

    Attributes:
        cu_seqlens: `[S + 1]` int32 offsets on the device, from 0; empty segments repeat the last offset.
        max_seqlen: host constant, at least the longest segment ever replayed with these buffers, in rows.
        lengths: segment lengths on the host where they are known (eager on the CPU), else None. A captured
            graph must not depend on them.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    lengths: tuple[int, ...] | None = None


VarlenAttention = Callable[[Tensor, Tensor, Tensor, Segments, float], Tensor]
"""`attention(q, k, v, segments, scale)`: q, k, v and the result are `[T, H, Dh]`. Row i attends to the rows of its
own segment. Rows past the last segment come out as zeros, whatever lies in q, k and v there."""
