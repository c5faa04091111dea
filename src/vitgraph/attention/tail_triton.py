"""Zeroes the rows past the last segment in one launch whose time hardly depends on the buffer's size."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 16, 512


@triton.jit
def _tail_kernel(x_ptr, ends_ptr, last, rows, stride, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One program zeroes ROWS rows, as far as they lie past the last segment."""
    first = tl.program_id(0) * ROWS
    filled = tl.load(ends_ptr + last)
    if first + ROWS > filled:
        row = first + tl.arange(0, ROWS)
        row_mask = (row >= filled) & (row < rows)
        row = row.to(tl.int64)
        for start in range(0, WIDTH, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            mask = row_mask[:, None] & (column < WIDTH)[None, :]
            zeros = tl.zeros([ROWS, COLUMNS], x_ptr.dtype.element_ty)
            tl.store(x_ptr + row[:, None] * stride + column[None, :], zeros, mask=mask)


def zero_tail(x: Tensor, cu_seqlens: Tensor) -> None:
    """Zeroes `x[cu_seqlens[-1]:]` in place.

    Args:
        x: `[T, H, Dh]`; a row's values lie one after another.
        cu_seqlens: `[S + 1]` int32 on the same device.
    """
    rows, heads, head_dim = x.shape
    assert x.stride()[1:] == (head_dim, 1), "a row's heads must lie one after another"
    _tail_kernel[(triton.cdiv(rows, ROWS),)](
        x, cu_seqlens, cu_seqlens.shape[0] - 1, rows, x.stride(0), WIDTH=heads * head_dim, ROWS=ROWS, COLUMNS=COLUMNS
    )
