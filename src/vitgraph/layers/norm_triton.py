"""Norm of a residual stream in one Triton kernel: add a sublayer's output, normalise, prepare the next residual.

Per row, in fp32: `total = x + scale * delta`; the first result is `norm(total)`, the second `total + bias`, each
rounded once. With the bias of the block's last GEMM in the second result, that GEMM adds product and residual in one
write.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitgraph.launch import launch_kernel, only_compiles

FEW_ROWS, MOST_DIM = 512, 2048
FEW_WARPS, MANY_WARPS = 2, 4
"""A row wants more warps where few rows leave most of the GPU idle, and where it is long."""


@triton.jit
def _norm_kernel(
    x_ptr,
    delta_ptr,
    weight_ptr,
    norm_bias_ptr,
    bias_ptr,
    scale_ptr,
    y_ptr,
    residual_ptr,
    eps,
    DIM: tl.constexpr,
    DIM_P2: tl.constexpr,
    RMS: tl.constexpr,
    DELTA: tl.constexpr,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
):
    """One program normalises one row. It asks for all that it reads before it waits for any: a layer's weights come
    from memory, as those of all other layers were read since."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, DIM_P2)
    mask = cols < DIM
    dtype = y_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * DIM + cols, mask=mask, other=0.0).to(tl.float32)
    if DELTA:
        delta = tl.load(delta_ptr + row * DIM + cols, mask=mask, other=0.0).to(tl.float32)
        if SCALE:
            scale = tl.load(scale_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        if BIAS:
            bias = tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if not RMS:
        norm_bias = tl.load(norm_bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if DELTA:
        if SCALE:
            delta *= scale
        x += delta
        residual = x
        if BIAS:
            residual += bias
        tl.store(residual_ptr + row * DIM + cols, residual.to(dtype), mask=mask)
    if RMS:
        scaled = x * tl.rsqrt(tl.sum(x * x, 0) / DIM + eps)
        # The reference casts before it multiplies by the weight.
        y = weight * scaled.to(dtype).to(tl.float32)
    else:
        centred = tl.where(mask, x - tl.sum(x, 0) / DIM, 0.0)
        y = centred * tl.rsqrt(tl.sum(centred * centred, 0) / DIM + eps) * weight + norm_bias
    tl.store(y_ptr + row * DIM + cols, y.to(dtype), mask=mask)


def norm(x: Tensor, weight: Tensor, norm_bias: Tensor | None, eps: float) -> Tensor:
    """`norm(x)`: `x [P, D]` contiguous, `weight`, `norm_bias [D]`; without a bias it is RMSNorm."""
    y = torch.empty_like(x)
    _launch(x, None, weight, norm_bias, None, None, y, None, eps)
    return y


def add_norm(
    x: Tensor,
    delta: Tensor,
    weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    bias: Tensor | None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`norm(x + scale * delta)` and `x + scale * delta + bias`.

    Args:
        x, delta: `[P, D]`, contiguous.
        weight, norm_bias: `[D]` of the norm; without a bias it is RMSNorm.
        eps: of the norm.
        bias, scale: `[D]`, or None for none.
    """
    y, residual = torch.empty_like(x), torch.empty_like(x)
    _launch(x, delta, weight, norm_bias, bias, scale, y, residual, eps)
    return y, residual


def _launch(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    norm_bias: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    y: Tensor,
    residual: Tensor | None,
    eps: float,
) -> None:
    rows, dim = x.shape
    assert x.is_contiguous() and (delta is None or delta.is_contiguous()), "rows must lie one after another"
    # What is compiled beforehand serves other numbers of rows, too.
    for warps in {_warps(1, dim), _warps(FEW_ROWS + 1, dim)} if only_compiles() else {_warps(rows, dim)}:
        launch_kernel(
            _norm_kernel,
            (rows,),
            x,
            x if delta is None else delta,
            weight,
            weight if norm_bias is None else norm_bias,
            weight if bias is None else bias,
            weight if scale is None else scale,
            y,
            y if residual is None else residual,
            eps,
            DIM=dim,
            DIM_P2=triton.next_power_of_2(dim),
            RMS=norm_bias is None,
            DELTA=delta is not None,
            BIAS=bias is not None,
            SCALE=scale is not None,
            num_warps=warps,
        )


def _warps(rows: int, dim: int) -> int:
    return MANY_WARPS if rows <= FEW_ROWS or dim > MOST_DIM else FEW_WARPS
