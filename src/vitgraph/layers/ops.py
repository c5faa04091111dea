"""Operations of the block that CUDA runs as one kernel, each beside its plain form.

Under torch.compile they are opaque operators, so that the compiler fuses what lies around them and keeps them whole.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitgraph.layers.norm import RMSNorm
from vitgraph.layers.pos_embed import gather_table
from vitgraph.layers.rotary import apply_rotary

Activation = Literal["gelu_tanh", "gelu", "quick_gelu", "silu"]
HALF_DTYPES = (torch.bfloat16, torch.float16)
HAS_TRITON = find_spec("triton") is not None


def rotate_qk(qk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on `qk [P, 2, H, Dh]`, `cos`, `sin [P, Dh/2]` fp32; may work in place.

    CUDA: one Triton kernel. Elsewhere: `apply_rotary`.
    """
    if not (qk.is_cuda and HAS_TRITON):
        return apply_rotary(qk, cos, sin)
    if torch.compiler.is_compiling():
        _rotate_op(qk, cos, sin)
    else:
        _rotate(qk, cos, sin)
    return qk


def _rotate(qk: Tensor, cos: Tensor, sin: Tensor) -> None:
    from vitgraph.layers.rotary_triton import rotate_in_place

    rotate_in_place(qk, cos, sin)


@torch.library.custom_op("vitgraph::rotate_qk", mutates_args=("qk",))
def _rotate_op(qk: Tensor, cos: Tensor, sin: Tensor) -> None:
    _rotate(qk, cos, sin)


def add_table(x: Tensor, table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """`x + gather_table(table, index, weight)` in the dtype of `x [P, D]`; may work in place.

    CUDA: one Triton kernel. Elsewhere: `gather_table`.
    """
    if not _has_kernel(x):
        return x + gather_table(table, index, weight).to(x.dtype)
    from vitgraph.layers.pos_embed_triton import add_table_in_place

    return add_table_in_place(x, table, index, weight)


def fuses_residual(x: Tensor, norm: nn.Module) -> bool:
    """Whether `fused_norm` and `add_norm` have a kernel for this input and norm; torch.compile fuses by itself."""
    return _has_kernel(x) and x.dtype in HALF_DTYPES and isinstance(norm, (nn.LayerNorm, RMSNorm))


def fused_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """`norm(x)` in one kernel, where `fuses_residual` says so."""
    from vitgraph.layers import norm_triton

    assert isinstance(norm, (nn.LayerNorm, RMSNorm))
    return norm_triton.norm(x, norm.weight, _bias(norm), norm.eps)


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """`norm(x)`: `x [P, D]`. CUDA: one Triton kernel."""
    return fused_norm(x, norm) if fuses_residual(x, norm) else norm(x)


def add_norm(
    x: Tensor, delta: Tensor, norm: nn.Module, bias: Tensor | None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`norm(x + scale * delta)` and `x + scale * delta + bias` in one kernel, where `fuses_residual` says so."""
    from vitgraph.layers import norm_triton

    assert isinstance(norm, (nn.LayerNorm, RMSNorm))
    return norm_triton.add_norm(x, delta, norm.weight, _bias(norm), norm.eps, bias, scale)


def _bias(norm: nn.LayerNorm | RMSNorm) -> Tensor | None:
    return norm.bias if isinstance(norm, nn.LayerNorm) else None


def activate(x: Tensor, activation: Activation) -> Tensor:
    """The named activation: GELU in its tanh or exact (erf) form, x * sigmoid(1.702 x), or SiLU; may work in place.

    CUDA: one kernel.
    """
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation == "gelu":
        return F.gelu(x)
    if _has_kernel(x):
        from vitgraph.layers import activation_triton

        return activation_triton.activate_in_place(x, activation)
    return x * torch.sigmoid(1.702 * x) if activation == "quick_gelu" else F.silu(x)


def gate(x: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """`activate(x) * up`: both `[P, F]`. CUDA: one Triton kernel where the activation has a sigmoid."""
    if activation in ("silu", "quick_gelu") and _has_kernel(x):
        from vitgraph.layers import activation_triton

        return activation_triton.gate(x, up, activation)
    return activate(x, activation) * up


def _has_kernel(x: Tensor) -> bool:
    """Whether our own kernels run; torch.compile fuses by itself."""
    return x.is_cuda and HAS_TRITON and not torch.compiler.is_compiling()
