"""Each technique of the fast path, and how to do without it: for measuring what it brings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from vitgraph import VisionEncoder
from vitgraph.attention import triton_varlen
from vitgraph.engine import engine, ladder
from vitgraph.engine.prepared import PreparedBatches
from vitgraph.layers import block, mlp, overlap, pos_embed_triton
from vitgraph.layers.ops import Activation
from vitgraph.layers.pos_embed import gather_table
from vitgraph.layers.rotary import apply_rotary

POWERS_OF_TWO = (64, 128, 256, 512, 1024, 2048, 4096)


def _gelu_after_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def _gate(x: Tensor, up: Tensor, activation: Activation) -> Tensor:
    return (F.silu(x) if activation == "silu" else x * torch.sigmoid(1.702 * x)) * up


def _add_table(x: Tensor, table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    return x + gather_table(table, index, weight).to(x.dtype)


PATCHES: dict[str, tuple[ModuleType, str, Any]] = {
    "TMA loads": (triton_varlen, "has_tma", lambda _device: False),
    "fused norm and residual": (block, "fuses_residual", lambda _x, _norm: False),
    "rotary kernel": (block, "rotate_qk", apply_rotary),
    "GELU epilogue": (mlp, "linear_gelu_tanh", _gelu_after_linear),
    "no GEMM workspace": (engine, "without_workspace", nullcontext),
    "measured GEMMs": (engine, "make_gemms", lambda *_: None),
    "padded MLP": (mlp, "ALIGNED", 1),
    "gate kernel": (mlp, "gate", _gate),
    "position table kernel": (pos_embed_triton, "add_table_in_place", _add_table),
    "side stream": (overlap, "MOST_ROWS", 0),
    "metadata on the device": (ladder, "make_intake", lambda *_: None),
}
"""Technique -> what stands in for it."""

SETTINGS: dict[str, dict[str, Any]] = {
    "graph": {"graph": False},
    "Triton attention": {"attention": "varlen"},
    "FlashAttention wheels": {"attention": "triton"},
    "fine ladder": {"budgets": POWERS_OF_TWO, "measure": False},
}
"""Technique -> settings of an encoder without it."""

PREPARED = "prepared replays"
ORDER = ("graph", "Triton attention", "TMA loads", "fused norm and residual", "rotary kernel", "GELU epilogue",
         "no GEMM workspace", "padded MLP", "gate kernel", "position table kernel", "side stream",
         "FlashAttention wheels", "fine ladder", "measured GEMMs",
         "metadata on the device", PREPARED)  # fmt: skip
"""As a waterfall adds them. Without wheels the step that adds them changes nothing."""


@contextmanager
def encoder_without(missing: Sequence[str], make: Callable[..., VisionEncoder]) -> Iterator[VisionEncoder]:
    """An encoder that lacks these techniques, captured unless it lacks the graph; freed at the end.

    Args:
        missing: names of ORDER.
        make: makes an encoder from settings.
    """
    settings: dict[str, Any] = {}
    with ExitStack() as stack:
        for name in missing:
            # What comes first in ORDER decides.
            settings = SETTINGS.get(name, {}) | settings
            if name in PATCHES:
                module, attribute, stand_in = PATCHES[name]
                stack.enter_context(patch.object(module, attribute, stand_in))
        encoder = stack.enter_context(make(**settings))
        if PREPARED in missing:
            encoder.engine._prepared = PreparedBatches(0)
        if encoder.config.graph:
            encoder.capture(progress=False)
        yield encoder
