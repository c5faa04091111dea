"""Choice of an attention backend by name, device and dtype."""

from __future__ import annotations

import logging
from importlib.util import find_spec

import torch

from vitgraph.attention.auto import AutoAttention
from vitgraph.attention.base import VarlenAttention
from vitgraph.attention.flash import Fa3Attention, Fa4Attention
from vitgraph.attention.sdpa import SdpaAttention
from vitgraph.attention.torch_varlen import TorchVarlenAttention
from vitgraph.errors import ConfigError
from vitgraph.launch import begin

logger = logging.getLogger("vitgraph")

HALF_DTYPES = (torch.bfloat16, torch.float16)
FLASH: dict[str, type[Fa3Attention] | type[Fa4Attention]] = {"fa3": Fa3Attention, "fa4": Fa4Attention}


def select_attention(name: str, device: torch.device, dtype: torch.dtype) -> VarlenAttention:
    """The backend that `name` stands for here.

    "auto" is our Triton kernel on CUDA in bf16 or fp16 (torch's flash kernel where Triton is not installed), else the
    reference. Where FlashAttention-3 or -4 is installed too, it is measured against ours for packs of one or of long
    segments. Where kernels of Triton's may follow, what it does once per process begins here, in threads.

    Raises:
        ConfigError: when the named backend cannot run on this device and dtype.
    """
    fast = device.type == "cuda" and dtype in HALF_DTYPES
    has_triton = find_spec("triton") is not None
    if fast and has_triton:
        begin()
    if name == "auto":
        name = ("triton" if has_triton else "varlen") if fast else "sdpa"
        logger.debug("attention: %s for %s on %s", name, dtype, device)
        others = [kind() for kind in FLASH.values() if not kind.missing(device, dtype)] if name == "triton" else []
        if others:
            return AutoAttention(_triton(), others, device, dtype)
    if name == "sdpa":
        return SdpaAttention()
    if not fast:
        raise ConfigError(
            f"attention={name!r} needs CUDA with bfloat16 or float16, not {device.type} with {dtype}; "
            "use attention='auto' or 'sdpa'."
        )
    if name == "varlen":
        return TorchVarlenAttention()
    if not has_triton:
        raise ConfigError(f"attention={name!r} needs the package triton; install it, or use attention='varlen'.")
    if name in FLASH:
        missing = FLASH[name].missing(device, dtype)
        if missing:
            raise ConfigError(f"attention={name!r} cannot run here: {missing}; use attention='auto' or 'triton'.")
        return FLASH[name]()
    return _triton()


def _triton() -> VarlenAttention:
    from vitgraph.attention.triton_varlen import TritonVarlenAttention

    return TritonVarlenAttention()
