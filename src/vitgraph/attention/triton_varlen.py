"""Variable-length bidirectional flash attention in Triton, launched over a tile schedule built on the host.

The online softmax is FlashAttention-2's (Dao 2023, algorithm 1, forward). Head dims that are no power of two are cut in
two (72 = 64 + 16 with 8 dead columns), so that 72 is not padded to 128.

Shapes: T rows, H heads, Dh head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitgraph.attention.base import Segments

LOG2_E = 1.4426950408889634
SMALL_BLOCK, LARGE_BLOCK = 64, 128
LARGE_ROWS = 2048
KEY_BLOCK = 64


@triton.jit
def _columns(base, rows, stride, first, head_dim, WIDTH: tl.constexpr, row_mask):
    """Rows x WIDTH columns from column `first`, zero outside the head and outside `row_mask`."""
    cols = first + tl.arange(0, WIDTH)
    mask = row_mask[:, None] & (cols < head_dim)[None, :]
    return tl.load(base + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0)


@triton.jit
def _store_columns(base, rows, stride, first, head_dim, WIDTH: tl.constexpr, row_mask, values):
    cols = first + tl.arange(0, WIDTH)
    mask = row_mask[:, None] & (cols < head_dim)[None, :]
    tl.store(base + rows[:, None] * stride + cols[None, :], values, mask=mask)


@triton.jit
def _varlen_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    tiles_ptr,
    stride_q,
    stride_k,
    stride_v,
    stride_out,
    scale_log2,
    HEAD_Q: tl.constexpr,
    HEAD_K: tl.constexpr,
    HEAD_V: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDE: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program is one tile of queries of one head. WIDE + REST >= HEAD_DIM; REST is 0 for powers of two.

    Head strides are constants, so that the compiler sees that a head of 72 starts on 16 bytes.
    """
    tile = tiles_ptr + tl.program_id(0) * 4
    row_start = tl.load(tile)
    row_end = tl.load(tile + 1)
    if row_start < row_end:
        key_start = tl.load(tile + 2)
        key_end = tl.load(tile + 3)
        head = tl.program_id(1)
        rows = row_start + tl.arange(0, BLOCK_M)
        row_mask = rows < row_end
        rows = rows.to(tl.int64)
        q_base = q_ptr + head * HEAD_Q
        k_base = k_ptr + head * HEAD_K
        v_base = v_ptr + head * HEAD_V
        q = _columns(q_base, rows, stride_q, 0, HEAD_DIM, WIDE, row_mask)
        acc = tl.zeros([BLOCK_M, WIDE], tl.float32)
        if REST > 0:
            q_rest = _columns(q_base, rows, stride_q, WIDE, HEAD_DIM, REST, row_mask)
            acc_rest = tl.zeros([BLOCK_M, REST], tl.float32)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for start in range(key_start, key_end, BLOCK_N):
            keys = start + tl.arange(0, BLOCK_N)
            # Rows outside the segment load as zeros: a NaN there never meets the dot product.
            key_mask = keys < key_end
            keys = keys.to(tl.int64)
            k = _columns(k_base, keys, stride_k, 0, HEAD_DIM, WIDE, key_mask)
            scores = tl.dot(q, tl.trans(k))
            if REST > 0:
                k_rest = _columns(k_base, keys, stride_k, WIDE, HEAD_DIM, REST, key_mask)
                scores = tl.dot(q_rest, tl.trans(k_rest), scores)
            scores = tl.where(key_mask[None, :], scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1) * scale_log2)
            p = tl.exp2(scores * scale_log2 - higher[:, None])
            shrink = tl.exp2(top - higher)
            total = total * shrink + tl.sum(p, 1)
            top = higher
            p = p.to(v_ptr.dtype.element_ty)
            v = _columns(v_base, keys, stride_v, 0, HEAD_DIM, WIDE, key_mask)
            acc = tl.dot(p, v, acc * shrink[:, None])
            if REST > 0:
                v_rest = _columns(v_base, keys, stride_v, WIDE, HEAD_DIM, REST, key_mask)
                acc_rest = tl.dot(p, v_rest, acc_rest * shrink[:, None])
        # A tile without keys keeps total = 0 and acc = 0: its rows are written as zeros.
        inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
        out_base = out_ptr + head * HEAD_DIM
        result = (acc * inverse[:, None]).to(out_ptr.dtype.element_ty)
        _store_columns(out_base, rows, stride_out, 0, HEAD_DIM, WIDE, row_mask, result)
        if REST > 0:
            rest = (acc_rest * inverse[:, None]).to(out_ptr.dtype.element_ty)
            _store_columns(out_base, rows, stride_out, WIDE, HEAD_DIM, REST, row_mask, rest)


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """Two column widths whose sum covers `head_dim` at least waste: powers of two, the second at least 16 or 0."""
    wide = 1 << (head_dim.bit_length() - 1)
    rest = head_dim - wide
    return wide, max(16, 1 << (rest - 1).bit_length()) if rest else 0


def _launch(q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, block: int, scale: float) -> Tensor:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    wide, rest = split_head_dim(q.shape[2])
    _varlen_kernel[(tiles.shape[0], q.shape[1])](
        q,
        k,
        v,
        out,
        tiles,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        out.stride(0),
        scale * LOG2_E,
        HEAD_Q=q.stride(1),
        HEAD_K=k.stride(1),
        HEAD_V=v.stride(1),
        HEAD_DIM=q.shape[2],
        WIDE=wide,
        REST=rest,
        BLOCK_M=block,
        BLOCK_N=KEY_BLOCK,
        num_warps=4 if block <= LARGE_BLOCK else 8,
        num_stages=3,
    )
    return out


@torch.library.custom_op("vitgraph::varlen_attention", mutates_args=())
def _varlen_op(q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, block: int, scale: float) -> Tensor:
    return _launch(q, k, v, tiles, block, scale)


@_varlen_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, block: int, scale: float) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


class TritonVarlenAttention:
    """Packed attention in one Triton kernel over the tile schedule. bf16 and fp16; any Dh up to 256."""

    name = "triton"

    def block(self, rows: int, longest: int) -> int:
        return LARGE_BLOCK if min(rows, longest) >= LARGE_ROWS else SMALL_BLOCK

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
        assert segments.tiles is not None, "the Triton backend needs a tile schedule"
        if torch.compiler.is_compiling():
            return _varlen_op(q, k, v, segments.tiles, segments.block, scale)
        return _launch(q, k, v, segments.tiles, segments.block, scale)
