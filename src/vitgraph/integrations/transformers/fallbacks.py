"""When a call must run the module's own forward, whatever the backend."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

COMPILING = "torch.compile or torch.jit traces the model"
CAPTURING = "the caller captures a CUDA graph"
RECORDED = ("output_hidden_states", "output_attentions")

INERT = frozenset(
    {
        "attention_mask",
        "cache_position",
        "labels",
        "logits_to_keep",
        "mm_token_type_ids",
        "num_items_in_batch",
        "output_router_logits",
        "past_key_values",
        "return_dict",
        "shift_labels",
        "token_type_ids",
        "use_cache",
        *RECORDED,
    }
)
"""Arguments of a language model that come along and that no vision tower reads."""


def refuse_state(module: nn.Module, arguments: Mapping[str, Any], records: Collection[str] = ()) -> str:
    """Why the mode that the caller is in needs the module's own forward; empty when it does not.

    Args:
        module: whose forward is called.
        arguments: of the call by name.
        records: names of `RECORDED` that the backend decides on itself when they are arguments.
    """
    if module.training:
        checkpointing = getattr(module, "gradient_checkpointing", False)
        return "training mode with gradient checkpointing" if checkpointing else "training mode"
    if torch.is_grad_enabled() and _needs_gradients(module, arguments):
        return "gradients are recorded (call under torch.no_grad or torch.inference_mode)"
    if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    for name in RECORDED:
        value = arguments.get(name)
        if value is None:
            value = getattr(getattr(module, "config", None), name, False)
        elif name in records:
            continue
        if value is not None and value is not False:
            return f"{name} is asked for"
    return _refuse_accelerate_hook(module)


def _needs_gradients(module: nn.Module, arguments: Mapping[str, Any]) -> bool:
    tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
    return any(t.requires_grad for t in tensors) or any(p.requires_grad for p in module.parameters())


def _refuse_accelerate_hook(module: nn.Module) -> str:
    """Hugging Face's accelerate replaces forward, too: its hooks may bring weights or move what comes out."""
    hook = module.__dict__.get("_hf_hook")
    if hook is None:
        return ""
    if type(hook).__name__ != "AlignDevicesHook":
        return f"accelerate's {type(hook).__name__} is installed on the module"
    if hook.offload:
        return "accelerate offloads the module's weights"
    return "accelerate returns outputs on the caller's device" if hook.io_same_device else ""


def unknown_argument(arguments: Mapping[str, Any], known: frozenset[str]) -> str:
    """Why an argument that a backend does not know needs the module's own forward; empty when there is none.

    Arguments that are None or False ask for nothing.
    """
    for name, value in arguments.items():
        if value is not None and value is not False and name not in known and name not in INERT:
            return f"argument {name!r} is given"
    return ""
