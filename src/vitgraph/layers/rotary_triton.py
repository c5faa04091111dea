"""The rotary embedding of q and k in one Triton kernel, in place: one read and one write of each row.

Same arithmetic as `layers.rotary.apply_rotary`: rotated in fp32, rounded once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotate_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    stride,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HEADS_P2: tl.constexpr,
    HALF_P2: tl.constexpr,
):
    """One program rotates HEADS heads of one row."""
    row = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, HEADS_P2)[:, None]
    dims = tl.arange(0, HALF_P2)[None, :]
    mask = (heads < HEADS) & (dims < HALF)
    cos = tl.load(cos_ptr + row * HALF + dims, mask=dims < HALF, other=1.0)
    sin = tl.load(sin_ptr + row * HALF + dims, mask=dims < HALF, other=0.0)
    first_ptr = x_ptr + row * stride + heads * (2 * HALF) + dims
    second_ptr = first_ptr + HALF
    first = tl.load(first_ptr, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(second_ptr, mask=mask, other=0.0).to(tl.float32)
    tl.store(first_ptr, (first * cos - second * sin).to(x_ptr.dtype.element_ty), mask=mask)
    tl.store(second_ptr, (second * cos + first * sin).to(x_ptr.dtype.element_ty), mask=mask)


def rotate_in_place(qk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates `qk [P, 2, H, Dh]` (rows may be strided, heads and dims contiguous) by `cos`, `sin [P, Dh/2]` fp32.

    Returns:
        `qk` itself.
    """
    rows, two, heads, head_dim = qk.shape
    assert qk.stride()[1:] == (heads * head_dim, head_dim, 1), "q and k heads must lie one after another"
    _rotate_kernel[(rows,)](
        qk,
        cos,
        sin,
        qk.stride(0),
        HEADS=two * heads,
        HALF=head_dim // 2,
        HEADS_P2=triton.next_power_of_2(two * heads),
        HALF_P2=triton.next_power_of_2(head_dim // 2),
        num_warps=2,
    )
    return qk
