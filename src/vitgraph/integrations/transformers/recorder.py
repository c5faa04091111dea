"""Recording which metadata functions a vision module calls: Transformers' `get_vision_*`, with what arguments.

Each takes the grids first and `kwargs`, from which it takes its result where the caller precomputed it. A recorded
call can be made again for one item alone, on the host.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from vitgraph.errors import UnsupportedModuleError

PREFIX = "get_vision_"
GRID_COLUMNS = (0, 1, 2)
_patching = threading.Lock()


class _Keys(dict[str, Any]):
    """Stands in for `kwargs`: notes the names that a function looks for, and has none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def pop(self, key: str, *default: Any) -> Any:
        self.asked.append(key)
        return default[0] if default else None

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.append(key)
        return default

    def __contains__(self, key: object) -> bool:
        self.asked.append(str(key))
        return False


@dataclass(frozen=True)
class RecordedCall:
    """One call of a metadata function.

    Attributes:
        function: as the modeling file knows it.
        arguments: without the grids (their name is `grid`) and `kwargs`.
        grid: name of the parameter that took the grids.
        columns: order of t, h and w in what it took.
    """

    function: Callable[..., Any]
    arguments: dict[str, Any]
    grid: str
    columns: tuple[int, ...] = GRID_COLUMNS

    @property
    def name(self) -> str:
        return self.function.__name__

    def compute(self, grids: Tensor) -> dict[str, Tensor]:
        """What the function gives for these grids `[items, 3]`, by the keywords under which it would be passed.

        Several values that are passed under one keyword are named `keyword[0]`, `keyword[1]`, ...; a number among them
        comes as that many zeros. Other numbers (the longest segment) are left out: the host bounds them once and for
        all.

        Raises:
            UnsupportedModuleError: it looks for other keywords than it returns values.
        """
        keys = _Keys()
        result = self.function(**self.arguments, **{self.grid: grids[:, self.columns]}, kwargs=keys)
        values = result if isinstance(result, tuple) else (result,)
        names = list(dict.fromkeys(keys.asked))
        if len(names) == 1 and isinstance(result, tuple):
            names = [f"{names[0]}[{i}]" for i in range(len(values))]
            values = tuple(torch.zeros(v, dtype=torch.int32) if isinstance(v, int) else v for v in values)
        if len(names) != len(values):
            raise UnsupportedModuleError(f"{self.name} looks for {', '.join(names)} but returns {len(values)} values")
        return {name: value for name, value in zip(names, values, strict=True) if isinstance(value, Tensor)}


@contextmanager
def record(module: nn.Module, grids: Tensor) -> Iterator[list[RecordedCall]]:
    """Within it, calls of metadata functions by this module, on this thread and these grids, are recorded.

    The functions are replaced in the modules' files while it lasts; other threads' calls pass through.

    Args:
        module: whose files are watched.
        grids: the very tensor that the forward is given.
    """
    calls: list[RecordedCall] = []
    thread = threading.get_ident()
    with _patching:
        originals = [(space, name, space[name]) for space in _namespaces(module) for name in _functions(space)]
        for space, name, function in originals:
            space[name] = _recording(function, calls, grids, thread)
        try:
            yield calls
        finally:
            for space, name, function in originals:
                space[name] = function


def _namespaces(module: nn.Module) -> list[dict[str, Any]]:
    names = {type(m).__module__ for m in module.modules() if type(m).__module__.startswith("transformers.")}
    return [vars(sys.modules[name]) for name in sorted(names)]


def _functions(space: dict[str, Any]) -> list[str]:
    return [
        name
        for name, value in space.items()
        if name.startswith(PREFIX) and inspect.isfunction(value) and "kwargs" in inspect.signature(value).parameters
    ]


def _recording(function: Callable[..., Any], calls: list[RecordedCall], grids: Tensor, thread: int) -> Any:
    signature = inspect.signature(function)

    def recorded(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == thread:
            bound = signature.bind(*args, **kwargs)
            calls.append(_call(function, dict(bound.arguments), grids))
        return function(*args, **kwargs)

    return recorded


def _call(function: Callable[..., Any], arguments: dict[str, Any], grids: Tensor) -> RecordedCall:
    given = arguments.pop("kwargs", None)
    name = function.__name__
    if given is None:
        raise UnsupportedModuleError(f"{name} is called without kwargs, so its result cannot be passed in")
    grid, columns = _find_grid(arguments, grids)
    if not grid:
        raise UnsupportedModuleError(f"{name} is called on other sizes than the caller's grid_thw")
    del arguments[grid]
    tensors = [key for key, value in arguments.items() if isinstance(value, torch.Tensor)]
    if tensors:
        raise UnsupportedModuleError(f"{name} also depends on the tensor {', '.join(tensors)}")
    return RecordedCall(function, arguments, grid, columns)


def _find_grid(arguments: dict[str, Any], grids: Tensor) -> tuple[str, tuple[int, ...]]:
    """Name of the argument that is the grids, or the grids with their columns in another order."""
    for columns in permutations(GRID_COLUMNS):
        ordered = grids[:, columns]
        for name, value in arguments.items():
            if isinstance(value, Tensor) and value.shape == grids.shape and torch.equal(value, ordered):
                return name, columns
    return "", GRID_COLUMNS
