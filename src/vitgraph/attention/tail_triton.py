"""What kernels need that look past a segment: zeros behind the last one, and values that times 0 are 0."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitgraph.launch import launch_kernel

ROWS, COLUMNS = 16, 512


# One compiled kernel for all buffers: the numbers only end a loop or a mask.
@triton.jit(do_not_specialize=["last", "rows"])
def _guard_kernel(
    x_ptr, ends_ptr, last, rows, stride, BOUND: tl.constexpr, LARGEST: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program guards ROWS rows: it reads them, and writes what must change. Before the tail that is nothing without
    BOUND, or in a pack of one segment, where nothing has a neighbour."""
    first = tl.program_id(0) * ROWS
    filled = tl.load(ends_ptr + last)
    has_work = first + ROWS > filled
    if BOUND:
        has_work |= tl.load(ends_ptr + 1) < filled
    if has_work:
        row = first + tl.arange(0, ROWS)
        tail = (row >= filled)[:, None]
        row_mask = (row < rows)[:, None]
        row = row.to(tl.int64)
        for start in range(0, WIDTH, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            mask = row_mask & (column < WIDTH)[None, :]
            at = x_ptr + row[:, None] * stride + column[None, :]
            x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            kept = x
            if BOUND:
                kept = tl.where(x != x, LARGEST, tl.minimum(tl.maximum(x, -LARGEST), LARGEST))
            kept = tl.where(tail, 0.0, kept)
            tl.store(at, kept.to(x_ptr.dtype.element_ty), mask=mask & (kept != x))


def guard(x: Tensor, cu_seqlens: Tensor) -> None:
    """Zeroes `x[cu_seqlens[-1]:]` and, where there are several segments, makes everything before finite, in place:
    infinities and NaN become the largest finite number. Times zero that is zero, and times a weight it is still far
    from any sensible value.

    Args:
        x: `[T, H, Dh]`; a row's values lie one after another.
        cu_seqlens: `[S + 1]` int32 on the same device.
    """
    _launch(x, cu_seqlens, bound=True)


def zero_tail(x: Tensor, cu_seqlens: Tensor) -> None:
    """Zeroes `x[cu_seqlens[-1]:]` in place.

    Args:
        x: `[T, H, Dh]`; a row's values lie one after another.
        cu_seqlens: `[S + 1]` int32 on the same device.
    """
    _launch(x, cu_seqlens, bound=False)


def _launch(x: Tensor, cu_seqlens: Tensor, bound: bool) -> None:
    rows, heads, head_dim = x.shape
    assert x.stride()[1:] == (head_dim, 1), "a row's heads must lie one after another"
    launch_kernel(
        _guard_kernel, (triton.cdiv(rows, ROWS),),
        x, cu_seqlens, cu_seqlens.shape[0] - 1, rows, x.stride(0), BOUND=bound, LARGEST=torch.finfo(x.dtype).max,
        WIDTH=heads * head_dim, ROWS=ROWS, COLUMNS=COLUMNS,
    )  # fmt: skip
