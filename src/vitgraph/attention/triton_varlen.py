"""Variable-length bidirectional flash attention in Triton, launched over a tile schedule built on the host.

The online softmax is FlashAttention-2's (Dao 2023, algorithm 1, forward). Head dims that are no power of two are cut in
two (72 = 64 + 16 with 8 dead columns), so that 72 is not padded to 128.

Shapes: T rows, H heads, Dh head dim.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitgraph.attention.base import Segments
from vitgraph.attention.kernel_configs import KernelConfig, KernelConfigs
from vitgraph.attention.opaque import attend_opaquely, handle_of
from vitgraph.attention.trial import device_time
from vitgraph.launch import launch_kernel

LOG2_E = 1.4426950408889634


@triton.jit
def _columns(base, rows, stride, FIRST: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, row_mask):
    """Rows x WIDTH columns from column FIRST, zero outside the head and outside `row_mask`."""
    cols = FIRST + tl.arange(0, WIDTH)
    mask = row_mask[:, None] & (cols < HEAD_DIM)[None, :]
    return tl.load(base + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0)


@triton.jit
def _store_columns(base, rows, stride, FIRST: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, mask, values):
    cols = FIRST + tl.arange(0, WIDTH)
    mask = mask[:, None] & (cols < HEAD_DIM)[None, :]
    tl.store(base + rows[:, None] * stride + cols[None, :], values, mask=mask)


@triton.jit
def _attend(
    state,
    q,
    q_rest,
    k_base,
    v_base,
    k_desc,
    v_desc,
    column,
    start,
    key_end,
    stride_k,
    stride_v,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    WIDE: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RAGGED: tl.constexpr,
    TMA: tl.constexpr,
):
    """One step of the online softmax over BLOCK_N keys; RAGGED when some of them lie past the segment."""
    acc, acc_rest, top, total = state
    keys = start + tl.arange(0, BLOCK_N)
    key_mask = keys < key_end
    keys = keys.to(tl.int64)
    if TMA:  # noqa: SIM108
        k = k_desc.load([start, column])
    else:
        k = _columns(k_base, keys, stride_k, 0, HEAD_DIM, WIDE, key_mask)
    scores = tl.dot(q, tl.trans(k))
    if REST > 0:
        k_rest = _columns(k_base, keys, stride_k, WIDE, HEAD_DIM, REST, key_mask)
        scores = tl.dot(q_rest, tl.trans(k_rest), scores)
    if RAGGED:
        scores = tl.where(key_mask[None, :], scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1) * scale_log2)
    p = tl.exp2(scores * scale_log2 - higher[:, None])
    shrink = tl.exp2(top - higher)
    total = total * shrink + tl.sum(p, 1)
    p = p.to(q.dtype)
    if TMA:
        v = v_desc.load([start, column])
        if RAGGED:
            # Past the segment lies whatever comes next, and 0 x NaN would reach this segment's rows.
            v = tl.where(key_mask[:, None], v, 0.0)
    else:
        v = _columns(v_base, keys, stride_v, 0, HEAD_DIM, WIDE, key_mask)
    acc = tl.dot(p, v, acc * shrink[:, None])
    if REST > 0:
        v_rest = _columns(v_base, keys, stride_v, WIDE, HEAD_DIM, REST, key_mask)
        acc_rest = tl.dot(p, v_rest, acc_rest * shrink[:, None])
    return acc, acc_rest, higher, total


@triton.jit
def _varlen_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    k_desc,
    v_desc,
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
    TMA: tl.constexpr,
):
    """One program is one tile of queries of one head. WIDE + REST >= HEAD_DIM; REST is 0 for powers of two.

    Head strides are constants, so that the compiler sees that a head of 72 starts on 16 bytes. With TMA, keys and
    values of the first WIDE columns come through tensor descriptors of block [BLOCK_N, WIDE] (Hopper and later).
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
        q_rest = q
        if REST > 0:
            q_rest = _columns(q_base, rows, stride_q, WIDE, HEAD_DIM, REST, row_mask)
        acc = tl.zeros([BLOCK_M, WIDE], tl.float32)
        acc_rest = tl.zeros([BLOCK_M, REST if REST > 0 else 16], tl.float32)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        state = acc, acc_rest, top, total
        # Both loops are pipelined. Loads that are not (an `if` for the ragged end, one stage) gave wrong values in
        # the REST columns with Triton 3.6 on Hopper.
        ragged = key_start
        if TMA:
            ragged = key_start + (key_end - key_start) // BLOCK_N * BLOCK_N
            for start in range(key_start, ragged, BLOCK_N):
                state = _attend(
                    state, q, q_rest, k_base, v_base, k_desc, v_desc, head * HEAD_DIM, start, key_end, stride_k,
                    stride_v, scale_log2, HEAD_DIM, WIDE, REST, BLOCK_N, False, TMA,
                )  # fmt: skip
        for start in range(ragged, key_end, BLOCK_N):
            state = _attend(
                state, q, q_rest, k_base, v_base, k_desc, v_desc, head * HEAD_DIM, start, key_end, stride_k,
                stride_v, scale_log2, HEAD_DIM, WIDE, REST, BLOCK_N, True, TMA,
            )  # fmt: skip
        acc, acc_rest, top, total = state
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


@cache
def has_tma(device: torch.device) -> bool:
    """Whether the device loads tiles through tensor descriptors (Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def launch(q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, config: KernelConfig, scale: float, tma: bool) -> Tensor:
    """Runs the kernel.

    Args:
        q, k, v: `[T, H, Dh]` with contiguous heads.
        tiles: `[tiles, 4]`, a schedule of tiles of `config.block` rows.
        config: launch settings.
        scale: of the scores.
        tma: load keys and values through tensor descriptors, where their strides allow it.
    """
    rows, heads, head_dim = q.shape
    assert head_dim % 8 == 0, "a head must start on 16 bytes"
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    wide, rest = split_head_dim(head_dim)
    k_desc = v_desc = tiles
    if tma and all(x.stride(1) == head_dim for x in (k, v)):
        k_desc, v_desc = (_descriptor(x, rows, heads * head_dim, config.keys, wide) for x in (k, v))
    else:
        tma = False
    launch_kernel(
        _varlen_kernel,
        (tiles.shape[0], heads),
        q,
        k,
        v,
        out,
        k_desc,
        v_desc,
        tiles,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        out.stride(0),
        scale * LOG2_E,
        HEAD_Q=q.stride(1),
        HEAD_K=k.stride(1),
        HEAD_V=v.stride(1),
        HEAD_DIM=head_dim,
        WIDE=wide,
        REST=rest,
        BLOCK_M=config.block,
        BLOCK_N=config.keys,
        TMA=tma,
        num_warps=config.warps,
        num_stages=config.stages if wide + rest <= 128 else 2,
    )
    return out


def _descriptor(x: Tensor, rows: int, columns: int, keys: int, wide: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, [rows, columns], [x.stride(0), 1], [keys, wide])


class TritonVarlenAttention:
    """Packed attention in one Triton kernel over the tile schedule. bf16 and fp16; any Dh up to 256."""

    name = "triton"

    def __init__(self) -> None:
        self._configs = KernelConfigs()
        self._handle = handle_of(self)

    def block(self, rows: int, longest: int) -> int:
        return self._configs.choose(rows, longest).block

    def kernel(self, rows: int, longest: int) -> KernelConfig:
        """See `kernel_of`."""
        return self._configs.choose(rows, longest)

    def tune(self, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> None:
        """Chooses configurations by measurement, once per GPU, where none are shipped for it."""
        gpu = torch.cuda.get_device_name(device)
        self._configs.tune(_run, heads, head_dim, device, dtype, gpu, device_time)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
        if torch.compiler.is_compiling():
            return attend_opaquely(self._handle, q, k, v, segments, scale)
        config = self._configs.choose(q.shape[0], segments.max_seqlen)
        if config.block != segments.block:
            config = KernelConfig(segments.block)
        return _run(q, k, v, segments, scale, config)


def _run(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, config: KernelConfig) -> Tensor:
    assert segments.tiles is not None, "the Triton backend needs a tile schedule"
    return launch(q, k, v, segments.tiles, config, scale, has_tma(q.device))
