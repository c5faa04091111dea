"""A second tree of modules on the same weights, which may be configured otherwise than the first."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

HOOKS = tuple(name for name in nn.Module().__dict__ if name.endswith("_hooks") or "_hooks_" in name)
REPLACED = ("forward", "_old_forward", "_hf_hook", "_output_capturing_hooks_installed")
"""Set on an instance by those who replace forwards; a shadow runs the class's own forward."""


def shadow(module: nn.Module, configure: Callable[[Any], Any] | None = None) -> nn.Module:
    """A tree of the same classes on the same parameters and buffers, in evaluation mode and without hooks.

    The two trees share their tables of parameters and buffers, so whatever replaces a weight in one replaces it in
    the other. The first tree and its configs are not touched. Tensors that are neither parameters nor buffers stay
    behind when a module moves to a device; the shadow has copies of them beside the weights.

    Args:
        module: root of the tree.
        configure: from a module's config to the one of its shadow; each config object is asked for once.
    """
    made: dict[int, nn.Module] = {}
    configs: dict[int, Any] = {}
    weight = next(module.parameters(), None)
    return _shadow(module, configure, made, configs, None if weight is None else weight.device)


def own_config(config: Any) -> Any:
    """A copy of a module's config under which it returns its output class, where the original may ask for tuples."""
    own = copy.copy(config)
    own.__dict__["return_dict"] = True
    return own


def copied_bytes(module: nn.Module, twin: nn.Module) -> int:
    """Memory of the tensors that a module's shadow has a copy of."""
    pairs = zip(module.modules(), twin.modules(), strict=True)
    return sum(
        value.nbytes
        for own, other in pairs
        for name, value in other.__dict__.items()
        if isinstance(value, Tensor) and value is not own.__dict__[name]
    )


def _shadow(
    module: nn.Module,
    configure: Any,
    made: dict[int, nn.Module],
    configs: dict[int, Any],
    device: torch.device | None,
) -> nn.Module:
    if id(module) in made:
        return made[id(module)]
    twin: nn.Module = object.__new__(type(module))
    made[id(module)] = twin
    attributes = {name: value for name, value in module.__dict__.items() if name not in REPLACED}
    attributes |= {name: type(attributes[name])() for name in HOOKS if name in attributes}
    attributes |= {name: value.to(device) for name, value in attributes.items() if isinstance(value, Tensor)}
    attributes["training"] = False
    config = attributes.get("config")
    if configure is not None and config is not None:
        if id(config) not in configs:
            configs[id(config)] = configure(config)
        attributes["config"] = configs[id(config)]
    attributes["_modules"] = {
        name: None if child is None else _shadow(child, configure, made, configs, device)
        for name, child in module._modules.items()
    }
    twin.__dict__.update(attributes)
    return twin
