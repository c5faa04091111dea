"""Noticing, on every call and without touching the device, that a module is not what it was."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

RECORDER = "transformers.utils.output_capturing"
"""Transformers leaves hooks of this module behind once hidden states were asked for; they do nothing by themselves."""


class Slots:
    """Entries of the dictionaries in which modules keep submodules and parameters: whether all are the same objects."""

    def __init__(self, entries: Iterable[tuple[dict[str, Any], str, Any]]) -> None:
        columns = list(zip(*entries, strict=True)) or [(), (), ()]
        self._owners, self._names, self._values = columns

    def changed(self) -> bool:
        """Whether an entry was replaced or removed."""
        # Runs on every call over hundreds of entries, so the loop is left to C.
        return not all(map(is_, map(dict.get, self._owners, self._names), self._values))


class TreeWatch(Slots):
    """The submodules of a module. What is added beside them is not looked at: forward does not know it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__((m._modules, name, child) for m in module.modules() for name, child in m._modules.items())


class WeightWatch:
    """The submodules and parameters of a module: whether they are still the same objects at the same addresses."""

    def __init__(self, module: nn.Module) -> None:
        self._inner = _inside(module)
        self._dicts = [child.__dict__ for child in self._inner]
        self._tree = TreeWatch(module)
        slots = [(m._parameters, name, value) for m in module.modules() for name, value in m._parameters.items()]
        self._parameters = Slots(slots)
        # Subclasses such as distributed tensors have no memory of their own to point at.
        self._plain = [p for _, _, p in slots if type(p) is nn.Parameter]
        self._addresses = self._locate()

    def _locate(self) -> list[int]:
        return list(map(Tensor.data_ptr, self._plain))

    def moved(self) -> bool:
        """Whether a submodule or parameter was replaced, or a parameter's memory is another."""
        return self._tree.changed() or self._parameters.changed() or self._locate() != self._addresses

    def refuse_replaced(self) -> str:
        """Why a call must run the module's own forward: that of a submodule was replaced on the instance, other than to
        place inputs. Empty when none was."""
        # Almost never: asked in C first.
        if not any(map(dict.__contains__, self._dicts, repeat("forward"))):
            return ""
        replaced = (m for m in self._inner if "forward" in m.__dict__ and not _only_placed(m))
        found = next(replaced, None)
        return "" if found is None else f"{type(found).__name__} inside the module has a forward of its own"


class HookWatch:
    """Forward hooks on the modules inside a module: they would not see a call that does not run those modules.

    Hooks on the module itself run as always and are not looked at.
    """

    def __init__(self, module: nn.Module) -> None:
        self._hooks = [hooks for m in _inside(module) for hooks in (m._forward_hooks, m._forward_pre_hooks)]

    def any(self) -> bool:
        """Whether a hook is registered that does something."""
        return any(map(_acts, filter(None, self._hooks))) or torch.nn.modules.module._has_any_global_hook()


def _acts(hooks: dict[int, Any]) -> bool:
    return any(getattr(hook, "__module__", "") != RECORDER for hook in hooks.values())


def _inside(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.modules() if child is not module]


def only_places(hook: Any) -> bool:
    """Whether a hook of Hugging Face's accelerate does no more than move inputs to the device of the weights."""
    return type(hook).__name__ == "AlignDevicesHook" and not hook.offload and not hook.io_same_device


def _only_placed(module: nn.Module) -> bool:
    """Whether forward was replaced by such a hook, as `device_map` over several devices does it inside of towers."""
    hook, own = module.__dict__.get("_hf_hook"), module.__dict__.get("_old_forward")
    return hook is not None and only_places(hook) and getattr(own, "__func__", None) is type(module).forward
