"""What stands in a vision module's place of `forward`: it runs the backend, or the module's own forward."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import update_wrapper
from types import MethodType
from typing import Any

import torch
from torch import nn

from vitgraph.config import EncoderConfig
from vitgraph.errors import EngineReleasedError, FallbackError, PatchError, UnsupportedModuleError
from vitgraph.integrations.transformers.backend import Backend
from vitgraph.integrations.transformers.fallbacks import CAPTURING, COMPILING, refuse_state
from vitgraph.integrations.transformers.surroundings import is_capturing
from vitgraph.integrations.transformers.watch import HookWatch, TreeWatch

logger = logging.getLogger("vitgraph")

SLOTS = ("forward", "_old_forward")
"""Attributes of a module that may hold a replaced forward: its own, and where accelerate's hooks keep it."""


class AcceleratedForward:
    """The forward of one accelerated module.

    A copy or pickle of the module gets its plain forward back: graphs and static buffers cannot be copied.

    Args:
        module: whose forward it replaces, once `install` is called.
        backend: does the work. If it has an attribute `records`, it decides itself about calls that ask for these
            outputs ("output_hidden_states", "output_attentions"); else they run the module's own forward.
        choice: the caller's `backend=`.
        config: the caller's settings.
    """

    def __init__(self, module: nn.Module, backend: Backend, choice: str, config: EncoderConfig) -> None:
        self.original: Callable[..., Any] = module.forward
        update_wrapper(self, self.original)
        self.__code__ = AcceleratedForward.__call__.__code__  # torch.export asks every forward for its own
        self.module, self.backend, self.choice, self.config = module, backend, choice, config
        self.calls = 0
        self.fallbacks: dict[str, int] = {}
        self._plain = "forward" not in module.__dict__
        self._parameters = inspect.signature(self.original)
        self._tree, self._hooks = TreeWatch(module), HookWatch(module)
        self._removed = False

    def install(self) -> None:
        """Puts this in the module's place of `forward`."""
        self.module.forward = self  # type: ignore[method-assign]

    def remove(self) -> None:
        """Puts the module's own forward back and frees what the backend holds."""
        self._removed = True
        for slot in SLOTS:
            if self.module.__dict__.get(slot) is self:
                if slot == "forward" and self._plain:
                    del self.module.__dict__[slot]
                else:
                    self.module.__dict__[slot] = self.original
        self.backend.release()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._removed:
            return self.original(*args, **kwargs)
        if torch.compiler.is_compiling():
            self._count_compilation()
            return self.original(*args, **kwargs)
        try:
            bound = self._parameters.bind(*args, **kwargs)
        except TypeError:
            return self.original(*args, **kwargs)  # which says what is wrong with the call
        arguments = bound.arguments
        arguments.update(arguments.pop("kwargs", {}))
        reason = self._refuse(arguments)
        if not reason:
            try:
                outputs = self.backend.run(arguments)
            except PatchError:
                reason = "rows and grids do not fit the tower"
            except UnsupportedModuleError as error:
                reason = str(error)
            except EngineReleasedError:
                reason = "another thread restored the model or moved its weights"
            else:
                self.calls += 1
                return outputs.to_tuple() if self._wants_tuple(arguments) else outputs
        self._count(reason)
        return self.original(*args, **kwargs)

    def _refuse(self, arguments: dict[str, Any]) -> str:
        if torch.jit.is_tracing():
            return COMPILING
        if is_capturing():
            return CAPTURING
        reason = refuse_state(self.module, arguments, getattr(self.backend, "records", ()))
        if reason:
            return reason
        if self._tree.changed():
            self._tree, self._hooks = TreeWatch(self.module), HookWatch(self.module)
        if self._hooks.any():
            return "a forward hook is registered inside the module"
        return self.backend.refuse(arguments)

    def _wants_tuple(self, arguments: dict[str, Any]) -> bool:
        return arguments.get("return_dict", getattr(self.module.config, "return_dict", True)) is False

    def _count(self, reason: str) -> None:
        if self.config.strict:
            raise FallbackError(f"strict=True and {type(self.module).__name__} cannot use vitgraph: {reason}.")
        first = reason not in self.fallbacks
        self.fallbacks[reason] = self.fallbacks.get(reason, 0) + 1
        if first:
            name = type(self.module).__name__
            logger.warning("%s runs its own forward: %s (logged once, counted in fallbacks)", name, reason)

    @torch.compiler.assume_constant_result
    def _count_compilation(self) -> None:
        """Runs while a compiler traces the call, so it counts compilations, not calls."""
        self._count(COMPILING)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_plain_forward, (self.module,)) if self._plain else (_identity, (self.original,))


def _plain_forward(module: nn.Module) -> MethodType:
    return MethodType(type(module).forward, module)


def _identity(value: Any) -> Any:
    return value


def installed(module: nn.Module) -> AcceleratedForward | None:
    """The accelerated forward of this very module, or None."""
    for slot in SLOTS:
        forward = module.__dict__.get(slot)
        if isinstance(forward, AcceleratedForward):
            return forward
    return None
