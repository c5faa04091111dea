"""Products with weights. Whoever runs a tower may have them done by other kernels than torch's: see `products_by`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import local
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["plain", "bias", "gelu", "add"]
"""What becomes of a product: nothing more; or a bias is added; or a bias, and GELU (tanh) is applied; or it is added to
the output."""


class Product(NamedTuple):
    """`x @ weight.T`, and what becomes of it.

    Attributes:
        kind: see `Kind`.
        x: `[P, D]`.
        weight: `[F, D]`.
        bias: `[F]`, for the kinds that have one.
        out: `[P, F]`, where the result goes; None: a new tensor.
    """

    kind: Kind
    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    out: Tensor | None = None


Handler = Callable[[Product], Tensor | None]
"""Does a product, or returns None to leave it to torch."""


class _Current(local):
    handler: Handler | None = None


_current = _Current()


@contextmanager
def products_by(handler: Handler) -> Iterator[None]:
    """Products of this thread in the block are offered to the handler first, but for those that torch.compile sees."""
    before, _current.handler = _current.handler, handler
    try:
        yield
    finally:
        _current.handler = before


def _offered(product: Product) -> Tensor | None:
    return None if _current.handler is None else _current.handler(product)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`: `x [P, D]`, `weight [F, D]` -> `[P, F]`, in `out` if given."""
    if not torch.compiler.is_compiling():
        found = _offered(Product("plain" if bias is None else "bias", x, weight, bias, out))
        if found is not None:
            return found
    if out is None:
        return F.linear(x, weight, bias)
    return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)


def add_product(out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """`out + x @ weight.T`, in place: `out [P, F]`, `x [P, D]`, `weight [F, D]`."""
    if not torch.compiler.is_compiling():
        found = _offered(Product("add", x, weight, None, out))
        if found is not None:
            return found
    # torch.addmm would copy the output first.
    return out.addmm_(x, weight.t())


def linear_gelu_tanh(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`gelu_tanh(x @ weight.T + bias)`: `x [P, D]`, `weight [F, D]` -> `[P, F]`.

    CUDA: cuBLASLt adds the bias and applies the GELU while it writes the product.
    """
    if torch.compiler.is_compiling():
        if x.is_cuda:
            return _linear_gelu_op(x, weight, bias)
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")
    found = _offered(Product("gelu", x, weight, bias))
    if found is not None:
        return found
    if not x.is_cuda:
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")
    return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)


@torch.library.custom_op("vitgraph::linear_gelu_tanh", mutates_args=())
def _linear_gelu_op(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)


@_linear_gelu_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])
