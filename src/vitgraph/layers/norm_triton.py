"""LayerNorm and RMSNorm of every row in one Triton kernel, which also adds a vector to the row it has read.

The block uses the second output as the residual of the GEMM that follows: with the GEMM's bias already in it, product,
bias and residual leave the tensor cores in one write.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _norm_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    add_ptr,
    y_ptr,
    sum_ptr,
    eps,
    DIM: tl.constexpr,
    DIM_P2: tl.constexpr,
    RMS: tl.constexpr,
    ADD: tl.constexpr,
):
    """One program normalises one row."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, DIM_P2)
    mask = cols < DIM
    stored = tl.load(x_ptr + row * DIM + cols, mask=mask, other=0.0)
    x = stored.to(tl.float32)
    if ADD:
        add = tl.load(add_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(sum_ptr + row * DIM + cols, (x + add).to(stored.dtype), mask=mask)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if RMS:
        scaled = x * tl.rsqrt(tl.sum(x * x, 0) / DIM + eps)
        # The reference casts before it multiplies by the weight.
        y = weight * scaled.to(stored.dtype).to(tl.float32)
    else:
        centred = tl.where(mask, x - tl.sum(x, 0) / DIM, 0.0)
        bias = tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        y = centred * tl.rsqrt(tl.sum(centred * centred, 0) / DIM + eps) * weight + bias
    tl.store(y_ptr + row * DIM + cols, y.to(stored.dtype), mask=mask)


def norm_and_add(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, add: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`norm(x)` and `x + add`, both `[P, D]` in the dtype of `x`.

    Args:
        x: `[P, D]`, contiguous.
        weight, bias: `[D]`; without a bias it is RMSNorm.
        eps: of the norm.
        add: `[D]`, or None: then the second result is `x` itself.
    """
    rows, dim = x.shape
    assert x.is_contiguous(), "rows must lie one after another"
    y = torch.empty_like(x)
    total = x if add is None else torch.empty_like(x)
    _norm_kernel[(rows,)](
        x,
        weight,
        weight if bias is None else bias,
        weight if add is None else add,
        y,
        total,
        eps,
        DIM=dim,
        DIM_P2=triton.next_power_of_2(dim),
        RMS=bias is None,
        ADD=add is not None,
        num_warps=1 if dim <= 2048 else 4,
    )
    return y, total
