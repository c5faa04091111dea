"""Choice of an attention backend by name, device and dtype."""

from __future__ import annotations

import torch

from vitgraph.attention.base import VarlenAttention
from vitgraph.attention.sdpa import sdpa_attention
from vitgraph.attention.torch_varlen import varlen_attention
from vitgraph.errors import ConfigError

_FLASH_DTYPES = (torch.bfloat16, torch.float16)


def select_attention(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, VarlenAttention]:
    """The backend that `name` stands for here.

    "auto" is the flash kernel on CUDA in bf16 or fp16, else the reference.

    Returns:
        The chosen name, "varlen" or "sdpa", and the backend.

    Raises:
        ConfigError: when the named backend cannot run on this device and dtype.
    """
    flash = device.type == "cuda" and dtype in _FLASH_DTYPES
    if name == "auto":
        name = "varlen" if flash else "sdpa"
    if name == "varlen":
        if not flash:
            raise ConfigError(
                f"attention='varlen' needs CUDA with bfloat16 or float16, not {device.type} with {dtype}; "
                "use attention='auto' or 'sdpa'."
            )
        return name, varlen_attention
    if name == "sdpa":
        return name, sdpa_attention
    raise ConfigError(f"unknown attention {name!r}; known: auto, sdpa, varlen.")
