"""Activations of MLPs in one Triton kernel: `act(x)` in place, or `act(gate) * up`; in fp32, rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitgraph.launch import launch_kernel

SLOPES = {"silu": 1.0, "quick_gelu": 1.702}
"""Activations of the form x * sigmoid(slope * x)."""

BLOCK = 1024


@triton.jit
def _activate_kernel(
    x_ptr,
    up_ptr,
    out_ptr,
    columns,
    stride_x,
    stride_up,
    stride_out,
    SLOPE: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program makes BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < columns
    x = tl.load(x_ptr + row * stride_x + cols, mask=mask, other=0.0).to(tl.float32)
    y = x / (1.0 + tl.exp(-SLOPE * x))
    if GATED:
        y *= tl.load(up_ptr + row * stride_up + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * stride_out + cols, y.to(out_ptr.dtype.element_ty), mask=mask)


def activate_in_place(x: Tensor, activation: str) -> Tensor:
    """`x * sigmoid(slope * x)`: `x [P, F]`, its rows contiguous.

    Returns:
        `x` itself.
    """
    return _launch(x, None, x, activation)


def gate(x: Tensor, up: Tensor, activation: str) -> Tensor:
    """`act(x) * up`: both `[P, F]`, rows contiguous, strides free."""
    return _launch(x, up, torch.empty(x.shape, dtype=x.dtype, device=x.device), activation)


def _launch(x: Tensor, up: Tensor | None, out: Tensor, activation: str) -> Tensor:
    rows, columns = x.shape
    assert x.stride(1) == 1 and (up is None or up.stride(1) == 1), "the values of a row must lie one after another"
    other = x if up is None else up
    launch_kernel(
        _activate_kernel, (rows, triton.cdiv(columns, BLOCK)),
        x, other, out, columns, x.stride(0), other.stride(0), out.stride(0),
        SLOPE=SLOPES[activation], GATED=up is not None, BLOCK=BLOCK,
    )  # fmt: skip
    return out
