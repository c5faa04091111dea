"""`accelerate` and `restore`: finding the vision modules of a model and replacing their forward, reversibly."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from vitgraph.config import EncoderConfig
from vitgraph.errors import ConfigError, UnsupportedModuleError
from vitgraph.integrations.transformers.backend import Backend
from vitgraph.integrations.transformers.forward import AcceleratedForward, installed
from vitgraph.integrations.transformers.handle import Acceleration
from vitgraph.integrations.transformers.version import require_transformers

logger = logging.getLogger("vitgraph")

Model = TypeVar("Model", bound=nn.Module)
BACKENDS = ("auto", "native", "generic")
DEFAULT = EncoderConfig(lazy=True, lazy_after=2)
"""A model sees few sizes, or many of them once: a budget is captured when it is used for the second time."""

_unchanged: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
"""Vision modules that no backend took, with the reasons."""


def accelerate(model: Model, config: EncoderConfig | None = None, backend: str = "auto") -> Model:
    """Replaces the forward of a Transformers model's vision modules. Nothing else of the model changes.

    Accelerating a model again with the same settings does nothing.

    Args:
        model: any model of Transformers with a vision module, or a vision module.
        config: default: graphs of the default ladder, each captured on its second use.
        backend: "native" (towers of ours on the module's weights), "generic" (the module itself in graphs), or "auto":
            native where there is such a tower, else generic. With "auto" a module that neither can run is left as it
            is, and the reason is logged and kept in `acceleration(model)`.

    Returns:
        The same model.

    Raises:
        UnsupportedModuleError: no vision module was found, or the named backend cannot run one.
        ConfigError: unknown backend, other settings than before, or settings that the device cannot meet.
        MissingExtraError: Transformers is not installed.
    """
    install(model, config, backend)
    return model


def install(model: nn.Module, config: EncoderConfig | None, backend: str) -> list[AcceleratedForward]:
    """As `accelerate`; returns the forwards that were installed now."""
    require_transformers()
    if backend not in BACKENDS:
        raise ConfigError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}.")
    config = config or DEFAULT
    forwards = []
    for name, module in _vision_modules(model, backend):
        present = installed(module)
        if present is not None:
            if (present.config, present.choice) != (config, backend):
                raise ConfigError(f"{name} is accelerated already, with other settings; call vitgraph.restore first.")
            continue
        made = _make_backend(name, module, config, backend)
        if made is not None:
            forwards.append(AcceleratedForward(module, made, backend, config))
    for forward in forwards:
        _unchanged.pop(forward.module, None)
        forward.install()
    return forwards


def restore(model: Model) -> Model:
    """Gives the vision modules of a model their own forward back and frees graphs, static buffers and copies.

    Does nothing to a model that is not accelerated.

    Returns:
        The same model.
    """
    for module in model.modules():
        forward = installed(module)
        if forward is not None:
            forward.remove()
        _unchanged.pop(module, None)
    return model


@contextmanager
def accelerated(model: Model, config: EncoderConfig | None = None, backend: str = "auto") -> Iterator[Model]:
    """Accelerates a model within a `with` block; what was accelerated before stays so. Arguments as `accelerate`."""
    refused = {module for module in model.modules() if module in _unchanged}
    forwards = install(model, config, backend)
    try:
        yield model
    finally:
        for forward in forwards:
            forward.remove()
        for module in model.modules():
            if module not in refused:
                _unchanged.pop(module, None)


def acceleration(model: nn.Module) -> Acceleration:
    """What `accelerate` did to a model: backends, counters, fallbacks, memory. Empty without an acceleration."""
    forwards, unchanged = {}, {}
    for name, module in model.named_modules():
        forward = installed(module)
        if forward is not None:
            forwards[_title(name, module)] = forward
        elif module in _unchanged:
            unchanged[_title(name, module)] = type(module).__name__, _unchanged[module]
    return Acceleration(forwards, unchanged)


def _title(name: str, module: nn.Module) -> str:
    return name or type(module).__name__


def _vision_modules(model: nn.Module, backend: str) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules that a backend knows, with their names."""
    knows = _discoveries(backend)
    outer: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in outer):
            continue
        if any(known(module) for known in knows):
            outer.append(name + "." if name else "")
            yield _title(name, module), module
    if not outer:
        from vitgraph.integrations.transformers.native_families import native_names

        raise UnsupportedModuleError(
            f"{type(model).__name__} has no vision module that backend={backend!r} knows. Looked for the classes "
            f"{native_names()}" + ("." if backend == "native" else ", and for vision encoders with a fixed tile size.")
        )


def _discoveries(backend: str) -> list[Callable[[nn.Module], bool]]:
    knows: list[Callable[[nn.Module], bool]] = []
    if backend != "generic":
        from vitgraph.integrations.transformers.native import is_native_module

        knows.append(is_native_module)
    if backend != "native":
        from vitgraph.integrations.transformers.generic import is_vision_module

        knows.append(is_vision_module)
    return knows


def _make_backend(name: str, module: nn.Module, config: EncoderConfig, backend: str) -> Backend | None:
    """The first backend that takes the module; with "auto" None, and the reasons are kept, when none does."""
    reasons = []
    for kind in ("native", "generic") if backend == "auto" else (backend,):
        try:
            return _backend(kind)(module, config)
        except UnsupportedModuleError as error:
            reasons.append(f"{kind}: {error}")
    if backend != "auto":
        raise UnsupportedModuleError(f"backend={backend!r} cannot run {name} ({type(module).__name__}): {reasons[0]}")
    _unchanged[module] = "; ".join(reasons)
    logger.warning("%s (%s) is left unchanged: %s", name, type(module).__name__, _unchanged[module])
    return None


def _backend(kind: str) -> Callable[[Any, EncoderConfig], Backend]:
    if kind == "native":
        from vitgraph.integrations.transformers.native import native_backend

        return native_backend
    from vitgraph.integrations.transformers.generic import generic_backend

    return generic_backend
