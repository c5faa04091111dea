"""torch's variable-length flash kernel (torch.nn.attention.varlen) for CUDA, bf16 and fp16."""

from __future__ import annotations

import torch
from torch import Tensor

from vitgraph.attention.base import Segments


class TorchVarlenAttention:
    """Packed attention in one flash kernel, launched for `max_seqlen`. Dh must be a multiple of 8."""

    name = "varlen"

    def block(self, rows: int, longest: int) -> int:
        return 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        cu_seqlens, longest = segments.cu_seqlens, segments.max_seqlen
        out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, scale=scale)
        assert isinstance(out, Tensor)
        # The kernel leaves rows past the last segment unwritten; a NaN there would reach the next layer's V.
        rows = torch.arange(q.shape[0], device=q.device, dtype=cu_seqlens.dtype)
        return torch.where((rows < cu_seqlens[-1])[:, None, None], out, 0)
