"""Forms of call: how a vision module is called, apart from sizes and values. Graphs are made for one form."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitgraph.core import Grid
from vitgraph.errors import PatchError
from vitgraph.models.contract import TowerSpec

GRID = "grid_thw"
NoneType = type(None)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

UNREAD = frozenset({"return_dict", "use_cache", "past_key_values", "cache_position", "logits_to_keep"})
"""Arguments of a language model that come along and that no vision tower reads."""


@dataclass(frozen=True)
class PixelForm:
    """Shape of what a module takes as pixels.

    Attributes:
        trailing: shape of one row: a flattened patch, a patch, or a tile.
        batched: whether an axis of length one stands before the rows.
    """

    trailing: tuple[int, ...]
    batched: bool = False

    @classmethod
    def of(cls, pixels: Tensor, batched: bool) -> PixelForm:
        """The form of an input."""
        return cls(tuple(pixels.shape[2 if batched else 1 :]), batched)

    @property
    def width(self) -> int:
        return int(np.prod(self.trailing))

    def shape(self, rows: Tensor) -> Tensor:
        """`[P, width]` as the module takes it."""
        pixels = rows.view(rows.shape[0], *self.trailing)
        return pixels.unsqueeze(0) if self.batched else pixels


@dataclass(frozen=True)
class FullMask:
    """A mask `[N, *trailing]` that is true everywhere: every picture is whole."""

    trailing: tuple[int, ...]


@dataclass(frozen=True)
class CallForm:
    """How a module is called, apart from sizes.

    Attributes:
        pixels, grid: names of the parameters; `grid` is empty for tiles.
        form: of the pixels.
        constants: further arguments by name; a `FullMask` stands for a tensor of that form.
    """

    pixels: str
    grid: str
    form: PixelForm
    constants: tuple[tuple[str, Any], ...] = ()

    def arguments(self, rows: Tensor, grid: Tensor | None) -> dict[str, Any]:
        """Keyword arguments of the module's forward for pixel rows `[P, width]`."""
        given: dict[str, Any] = {self.pixels: self.form.shape(rows)}
        for name, value in self.constants:
            whole = isinstance(value, FullMask)
            shape = (len(rows), *value.trailing) if whole else ()
            given[name] = torch.ones(shape, dtype=torch.bool, device=rows.device) if whole else value
        return {**given, self.grid: grid} if self.grid else given

    @property
    def masked(self) -> bool:
        """Whether a mask is among the arguments."""
        return any(isinstance(value, FullMask) for _, value in self.constants)


class CallReader:
    """Reads the calls of one module.

    Args:
        module: its class's forward says which arguments there are.
    """

    def __init__(self, module: nn.Module) -> None:
        parameters = inspect.signature(type(module).forward).parameters
        self.grid = GRID if GRID in parameters else ""
        self._pixels = first_parameter(module)
        self._defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}

    def form(self, arguments: Mapping[str, Any], batched: bool) -> CallForm | str:
        """The form of a call, or why it must run the module's own forward.

        Args:
            arguments: by name.
            batched: whether the module takes an axis of length one before its rows.
        """
        pixels = arguments.get(self._pixels)
        if not isinstance(pixels, Tensor) or not pixels.is_floating_point() or pixels.dim() < 2 or not pixels.numel():
            return f"{self._pixels} is no tensor of pictures in floating point"
        if self.grid:
            grids = arguments.get(self.grid)
            if not isinstance(grids, Tensor) or not are_sizes(grids) or not len(grids):
                return f"{self.grid} is no tensor of sizes [items, 3]"
            batched = batched and pixels.dim() > 2 and pixels.shape[0] == 1
        constants = []
        for name, value in arguments.items():
            if name in (self._pixels, self.grid) or name in UNREAD or self._is_default(name, value):
                continue
            constant = self._constant(value, len(pixels))
            if constant is NotImplemented:
                return f"argument {name!r} is given"
            constants.append((name, constant))
        return CallForm(self._pixels, self.grid, PixelForm.of(pixels, batched), tuple(sorted(constants)))

    def split(self, arguments: Mapping[str, Any], form: CallForm, spec: TowerSpec) -> tuple[Tensor, list[Grid]]:
        """Pixel rows of all items, `[P, width]`, and the grid of every item; pictures are one item, (pictures, 1, 1).

        Raises:
            PatchError: rows and grids do not fit each other or the tower, or a picture is padded.
        """
        pixels: Tensor = arguments[self._pixels]
        rows = pixels.reshape(-1, form.form.width)
        if not self.grid:
            # Read back here, as Transformers does to build the attention mask.
            if not all(bool(arguments[k].all()) for k, v in form.constants if isinstance(v, FullMask)):
                raise PatchError("a picture is padded: its mask is not true everywhere")
            return rows, [Grid(len(rows), 1, 1)]
        return rows, host_grids(arguments[self.grid], len(rows), spec)

    def _is_default(self, name: str, value: Any) -> bool:
        """Whether an argument says what its absence says; None and False ask nothing of an argument without a name."""
        default = self._defaults.get(name)
        return value is default or (name not in self._defaults and value is False)

    def _constant(self, value: Any, pictures: int) -> Any:
        """What stands for an argument in a form of call; NotImplemented for one that no graph is made for."""
        if isinstance(value, Tensor):
            mask = not self.grid and value.dtype == torch.bool and value.dim() > 0 and len(value) == pictures
            return FullMask(tuple(value.shape[1:])) if mask else NotImplemented
        constant = tuple(value) if isinstance(value, list) else value
        parts = constant if isinstance(constant, tuple) else (constant,)
        return constant if all(isinstance(part, (bool, int, str, NoneType)) for part in parts) else NotImplemented


def are_sizes(grids: Tensor) -> bool:
    """Whether these are whole numbers `[items, 3]`."""
    return grids.dim() == 2 and grids.shape[1] == 3 and grids.dtype in INTEGERS


def host_grids(grid_thw: Tensor, rows: int, spec: TowerSpec) -> list[Grid]:
    """The items' grids. Those on the device are read back here; Transformers' own forward reads them, too.

    Args:
        grid_thw: `[items, 3]`.
        rows: of all items together.
        spec: of the tower.

    Raises:
        PatchError: grids do not fit the tower or the rows.
    """
    grids = [Grid(*grid) for grid in grid_thw.tolist()]
    for grid in grids:
        spec.check_grid(grid)
    patches = sum(grid.patches for grid in grids)
    if patches != rows:
        raise PatchError(f"{rows} rows for grids of {patches} patches")
    return grids


def first_parameter(module: nn.Module) -> str:
    """Name of the parameter that takes the pixels."""
    names = list(inspect.signature(type(module).forward).parameters)
    return names[1] if len(names) > 1 else ""
