"""torch's variable-length flash kernel (torch.nn.attention.varlen) for CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from vitgraph.attention.base import Segments


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
    """Packed attention in one flash kernel. bf16 or fp16, CUDA.

    Args:
        q, k, v: `[T, H, Dh]`, Dh a multiple of 8.
        segments: see `Segments`; `max_seqlen` sizes the launch.
        scale: factor on the logits.

    Returns:
        `[T, H, Dh]`; rows past the last segment are zero.
    """
    from torch.nn.attention.varlen import varlen_attn

    cu_seqlens, longest = segments.cu_seqlens, segments.max_seqlen
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, scale=scale)
    assert isinstance(out, Tensor)
    # The kernel leaves rows past the last segment unwritten; a NaN there would reach the next layer's V.
    rows = torch.arange(q.shape[0], device=q.device, dtype=cu_seqlens.dtype)
    return torch.where((rows < cu_seqlens[-1])[:, None, None], out, 0)
