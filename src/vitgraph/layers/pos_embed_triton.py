"""Adds resampled rows of a position table to embedded patches, in place, in one Triton kernel.

Same arithmetic as `x + gather_table(...).to(x.dtype)`: the weighted sum in fp32, rounded, then added and rounded.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vitgraph.launch import launch_kernel


@triton.jit
def _add_table_kernel(
    x_ptr,
    table_ptr,
    index_ptr,
    weight_ptr,
    DIM: tl.constexpr,
    DIM_P2: tl.constexpr,
    TAPS: tl.constexpr,
):
    """One program adds to one row."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, DIM_P2)
    mask = cols < DIM
    dtype = x_ptr.dtype.element_ty
    total = tl.zeros([DIM_P2], tl.float32)
    for tap in tl.static_range(TAPS):
        index = tl.load(index_ptr + row * TAPS + tap).to(tl.int64)
        weight = tl.load(weight_ptr + row * TAPS + tap)
        total += weight * tl.load(table_ptr + index * DIM + cols, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * DIM + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(x_ptr + row * DIM + cols, (x + total.to(dtype).to(tl.float32)).to(dtype), mask=mask)


def add_table_in_place(x: Tensor, table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Adds `sum over taps of weight * table[index]` to each row of `x`.

    Args:
        x: `[P, D]`, contiguous.
        table: `[N, D]`, contiguous.
        index: `[P, taps]` int32.
        weight: `[P, taps]` fp32.

    Returns:
        `x` itself.
    """
    rows, dim = x.shape
    assert x.is_contiguous() and table.is_contiguous(), "rows must lie one after another"
    launch_kernel(
        _add_table_kernel, (rows,),
        x, table, index, weight, DIM=dim, DIM_P2=triton.next_power_of_2(dim), TAPS=index.shape[1],
    )  # fmt: skip
    return x
