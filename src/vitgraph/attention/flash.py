"""FlashAttention-3 and -4 from their own wheels, where they are installed.

Their kernels leave rows past the last segment unwritten, and load whole tiles of keys and values: what lies behind a
segment is multiplied by zero, and 0 x NaN would reach the segment's rows. So V is guarded before the kernel, and the
result's rows past the last segment are zeroed after it.
"""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitgraph.attention.base import Segments
from vitgraph.measured import cache_folder

logger = logging.getLogger("vitgraph")

TILE, TILED = (192, 160), (64, 80)
"""FlashAttention-4's rows of queries and of keys of a tile on compute capability 9.x, for head dims above 64 and up to
80. The wheel's own tile has 144 keys; on an H100, 16 heads of 72, ours takes 0 to 4 % less time."""
WARM_UP_ROWS = 512
"""More than one tile, for which another kernel would be compiled."""


class FlashWheel(ABC):
    """What the wheels have in common."""

    def block(self, rows: int, longest: int) -> int:
        return 0

    def warm_up(self, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> None:
        """Loads or compiles what it runs, which no capture can hold, and compiles what runs beside it."""
        q, k, v = torch.zeros(WARM_UP_ROWS, 3, heads, head_dim, device=device, dtype=dtype).unbind(1)
        ends = torch.tensor([0, WARM_UP_ROWS], dtype=torch.int32, device=device)
        self(q, k, v, Segments(ends, WARM_UP_ROWS), 1.0)

    @abstractmethod
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor: ...


class Fa3Attention(FlashWheel):
    """FlashAttention-3 (wheel `fa3-fwd`): compute capability 8.x and 9.x, bf16."""

    name = "fa3"

    @staticmethod
    def missing(device: torch.device, dtype: torch.dtype) -> str:
        """Why it cannot run here; empty when it can."""
        if find_spec("fa3_fwd_interface") is None:
            return "the package fa3-fwd is not installed"
        if dtype != torch.bfloat16:
            return f"it takes bfloat16, not {dtype}"
        return "" if _capability(device)[0] in (8, 9) else "it needs a GPU of compute capability 8.x or 9.x"

    @staticmethod
    def version() -> str:
        return _version("fa3-fwd")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
        import fa3_fwd_interface

        return _guarded(fa3_fwd_interface._flash_attn_forward, q, k, v, segments, scale)


class Fa4Attention(FlashWheel):
    """FlashAttention-4 (wheel `flash-attn-4`, CuTe DSL): compiled on first use; compute capability 8.x to 12.x."""

    name = "fa4"

    @staticmethod
    def missing(device: torch.device, dtype: torch.dtype) -> str:
        """Why it cannot run here; empty when it can."""
        if find_spec("flash_attn") is None or find_spec("flash_attn.cute") is None:
            return "the package flash-attn-4 is not installed"
        if _capability(device)[0] < 8:
            return "it needs a GPU of compute capability 8.0 or more"
        return _fa4_import_error()

    @staticmethod
    def version() -> str:
        return _version("flash-attn-4")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
        return _guarded(_fa4(q.device, q.shape[2]), q, k, v, segments, scale)


@cache
def _fa4_import_error() -> str:
    """Why the package cannot be imported; empty when it is, which takes seconds. What it compiles is kept on disk."""
    _keep_fa4_kernels(cache_folder() / "flash_attention_4")
    try:
        import_module("flash_attn.cute.interface")
    except Exception as error:  # its own dependencies may fail in any way
        logger.warning("FlashAttention-4 is installed and cannot be imported: %s", error)
        return f"importing flash-attn-4 failed: {error}"
    return ""


def _keep_fa4_kernels(folder: Path) -> None:
    """Asks the package, before it is imported, to keep what it compiles in the folder; not where nobody may write."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(folder))


@cache
def _fa4(device: torch.device, head_dim: int) -> Callable[..., Any]:
    """FlashAttention-4 with our tile where that is better, else as the wheel's public function calls it."""
    from flash_attn.cute import flash_attn_varlen_func, interface

    if _capability(device)[0] != 9 or not TILED[0] < head_dim <= TILED[1]:
        return flash_attn_varlen_func
    forward = getattr(interface, "_flash_attn_fwd", None)
    if forward is None or not {"tile_mn", "mma_pv_is_rs"} <= set(signature(forward).parameters):
        logger.info("FlashAttention-4 %s runs its own tiles: it takes none", Fa4Attention.version())
        return flash_attn_varlen_func
    # P read from registers, the default where a tile is given, makes tiles of 192 rows slower by a third.
    return partial(forward, tile_mn=TILE, mma_pv_is_rs=False)


def _guarded(kernel: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
    """The kernel's result, the first one where it has several, with what it needs done before and after."""
    from vitgraph.attention.tail_triton import guard, zero_tail

    ends, longest = segments.cu_seqlens, segments.max_seqlen
    guard(v, ends)
    found = kernel(
        q, k, v, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=longest, max_seqlen_k=longest, softmax_scale=scale
    )
    out: Tensor = found[0] if isinstance(found, (tuple, list)) else found
    zero_tail(out, ends)
    return out


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
