"""The pre-norm transformer block: x + attention(norm1(x)), then x + mlp(norm2(x)).

Shapes: P packed patches, H heads, Dh head dim, D = H * Dh hidden width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vitgraph.attention.base import Segments, VarlenAttention
from vitgraph.layers.gemm import add_product, linear
from vitgraph.layers.mlp import BlockMlp
from vitgraph.layers.ops import add_norm, fused_norm, fuses_residual, rotate_qk

Rotary = tuple[Tensor, Tensor]
"""cos and sin, each `[P, Dh/2]` fp32."""


class Attention(nn.Module):
    """Packed self-attention with a fused qkv projection.

    Args:
        dim: D.
        heads: H.
        backend: see `VarlenAttention`.
        qkv_bias, proj_bias: of the projections.
        qk_norm: makes the norm of q and of k, given its width; applied before the rotary positions.
        norm_per_head: whether that norm covers one head (Dh) or the full width (D).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        backend: VarlenAttention,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        qk_norm: Callable[[int], nn.Module] | None = None,
        norm_per_head: bool = True,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = dim // heads
        self.scale = self.head_dim**-0.5
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.norm_per_head = norm_per_head
        self.q_norm = qk_norm(self.head_dim if norm_per_head else dim) if qk_norm else None
        self.k_norm = qk_norm(self.head_dim if norm_per_head else dim) if qk_norm else None

    def forward(self, x: Tensor, rotary: Rotary | None, segments: Segments) -> Tensor:
        """`x [P, D]` -> `[P, D]`."""
        qkv = linear(x, self.qkv.weight, self.qkv.bias).unflatten(1, (3, self.heads, self.head_dim))
        qk = qkv[:, :2]
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.stack([self._normalise(qk[:, 0], self.q_norm), self._normalise(qk[:, 1], self.k_norm)], 1)
        q, k = (qk if rotary is None else rotate_qk(qk, *rotary)).unbind(1)
        y = self.backend(q, k, qkv[:, 2], segments, self.scale).flatten(1)
        return linear(y, self.proj.weight, self.proj.bias)

    def _normalise(self, x: Tensor, norm: nn.Module) -> Tensor:
        return norm(x) if self.norm_per_head else norm(x.flatten(1)).view_as(x)


class Block(nn.Module):
    """One transformer block, assembled from a family's norm, attention and MLP.

    Args:
        norm: makes a norm over D.
        attn, mlp: the sublayers.
        layer_scale: width D of learned factors on both sublayers' outputs, or None for none.
    """

    def __init__(
        self, norm: Callable[[], nn.Module], attn: Attention, mlp: BlockMlp, layer_scale: int | None = None
    ) -> None:
        super().__init__()
        self.norm1 = norm()
        self.attn = attn
        self.norm2 = norm()
        self.mlp = mlp
        self.scale1 = nn.Parameter(torch.ones(layer_scale)) if layer_scale else None
        self.scale2 = nn.Parameter(torch.ones(layer_scale)) if layer_scale else None

    def forward(self, x: Tensor, rotary: Rotary | None, segments: Segments) -> Tensor:
        """`x [P, D]` -> `[P, D]`."""
        if fuses_residual(x, self.norm1):
            return self._forward_fused(x, rotary, segments)
        y = self.attn(self.norm1(x), rotary, segments)
        x = x + (y if self.scale1 is None else self.scale1 * y)
        y = self.mlp(self.norm2(x))
        return x + (y if self.scale2 is None else self.scale2 * y)

    def _forward_fused(self, x: Tensor, rotary: Rotary | None, segments: Segments) -> Tensor:
        """The same function. The second norm adds the attention's output to the residual in fp32, with the bias of
        the last GEMM, and that GEMM adds its product: two roundings of the residual, as in the plain form."""
        y = self.attn(fused_norm(x, self.norm1), rotary, segments)
        weight, bias = self.mlp.down
        if self.scale2 is not None:
            # The factors lie between product and residual, so that GEMM cannot add them up.
            y, x = add_norm(x, y, self.norm2, None, self.scale1)
            return torch.addcmul(x, self.scale2, self.mlp(y))
        y, x = add_norm(x, y, self.norm2, bias, self.scale1)
        return add_product(x, self.mlp.up(y), weight)
