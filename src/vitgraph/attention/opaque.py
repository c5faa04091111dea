"""Attention as one operator of torch.compile: compiled code knows no kernel, so that one serves every budget."""

from __future__ import annotations

from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from vitgraph.attention.base import ANY, Segments, VarlenAttention

_handles = count(2)  # torch.compile makes code of its own for the integers 0 and 1
_backends: WeakValueDictionary[int, VarlenAttention] = WeakValueDictionary()


def handle_of(backend: VarlenAttention) -> int:
    """A new number that `attend_opaquely` knows the backend by, for as long as it lives."""
    handle = next(_handles)
    _backends[handle] = backend
    return handle


def attend_opaquely(
    handle: int, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, form: int = ANY
) -> Tensor:
    """`backend(q, k, v, segments, scale)`, which torch.compile does not look into.

    The backend chooses its kernel when the operator runs. Were the choice traced, each of its outcomes would compile
    the block once more.

    Args:
        handle: from `handle_of`.
        q, k, v, segments, scale: see `VarlenAttention`; `segments.lengths` does not pass.
        form: `segments.form`, from a backend that asks.
    """
    return _attend(
        handle, q, k, v, segments.cu_seqlens, segments.tiles, segments.max_seqlen, segments.block, form, scale
    )


@torch.library.custom_op("vitgraph::varlen_attention", mutates_args=())
def _attend(
    handle: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    tiles: Tensor | None,
    max_seqlen: int,
    block: int,
    form: int,
    scale: float,
) -> Tensor:
    segments = Segments(cu_seqlens, max_seqlen, tiles=tiles, block=block, form=form)
    return _backends[handle](q, k, v, segments, scale)


@_attend.register_fake
def _(
    handle: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    tiles: Tensor | None,
    max_seqlen: int,
    block: int,
    form: int,
    scale: float,
) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)
