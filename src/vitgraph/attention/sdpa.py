"""Reference attention through torch's scaled_dot_product_attention: exact and slow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitgraph.attention.base import Segments


class SdpaAttention:
    """Packed attention, one call per segment where host lengths are known, else one masked call.

    The masked form holds a `[T, T]` mask: it is for correctness at small sizes, on any device and inside graphs.
    """

    name = "sdpa"

    def block(self, rows: int, longest: int) -> int:
        return 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
        if segments.lengths is not None:
            return _per_segment(q, k, v, segments.lengths, scale)
        return _masked(q, k, v, segments.cu_seqlens, scale)


def _per_segment(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float) -> Tensor:
    out = torch.zeros_like(q)
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        out[rows] = _attend(q[rows], k[rows], v[rows], None, scale)
        start += length
    return out


def _masked(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    rows = torch.arange(q.shape[0], device=q.device, dtype=cu_seqlens.dtype)
    segment = torch.searchsorted(cu_seqlens[1:], rows, right=True)
    valid = (rows < cu_seqlens[-1])[:, None, None]
    # A masked key still meets V as 0 x NaN, so whatever lies in the padding must go first.
    q, k, v = (torch.where(valid, x, 0) for x in (q, k, v))
    out = _attend(q, k, v, segment[:, None] == segment[None, :], scale)
    return torch.where(valid, out, 0)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).squeeze(0).transpose(0, 1)
