"""From the arguments of a vision module to rows and grids, and from outputs of the engine to the module's.

Shapes: P patch rows, M tokens, C output width, D hidden width, m merge side, N tiles.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vitgraph.core import Grid
from vitgraph.engine.engine import Outputs
from vitgraph.integrations.transformers.call_forms import are_sizes, host_grids
from vitgraph.integrations.transformers.fallbacks import unknown_argument
from vitgraph.models.contract import TowerSpec


class Call(ABC):
    """One form of call.

    Args:
        spec: of the tower.
        output: class of what the module returns.
        config: of the module.
    """

    known: frozenset[str]
    records: tuple[str, ...] = ()

    def __init__(self, spec: TowerSpec, output: type, config: Any) -> None:
        self.spec, self.output, self.config = spec, output, config

    def refuse(self, arguments: Mapping[str, Any]) -> str:
        """Why the arguments need the module's own forward, from their names and shapes; empty when they do not."""
        return unknown_argument(arguments, self.known) or self._refuse(arguments)

    @abstractmethod
    def _refuse(self, arguments: Mapping[str, Any]) -> str: ...

    @abstractmethod
    def split(self, arguments: Mapping[str, Any]) -> tuple[Tensor, list[Grid]]:
        """Pixel rows of all items, `[P, patch_width]`, and the grid of every item.

        Raises:
            PatchError: rows and grids do not fit each other or the tower.
        """

    @abstractmethod
    def join(self, outputs: Sequence[Outputs], arguments: Mapping[str, Any]) -> Any:
        """The module's output from the engine's outputs of all items."""


class GridCall(Call):
    """Patch rows with `grid_thw` in; tokens, deepstack maps and `last_hidden_state` out."""

    known = frozenset({"hidden_states", "pixel_values", "grid_thw"})

    def _refuse(self, arguments: Mapping[str, Any]) -> str:
        rows, grids = _rows(arguments), arguments.get("grid_thw")
        if not isinstance(rows, Tensor) or not isinstance(grids, Tensor):
            return "rows or grids are no tensors"
        if not len(grids):
            return "there is no image"
        if not are_sizes(grids) or not rows.is_floating_point():
            return "rows or grids have another shape or type"
        return "rows or grids have another shape or type" if rows.numel() % self.spec.patch_width else ""

    def split(self, arguments: Mapping[str, Any]) -> tuple[Tensor, list[Grid]]:
        rows: Tensor = _rows(arguments).reshape(-1, self.spec.patch_width)
        return rows, host_grids(arguments["grid_thw"], len(rows), self.spec)

    def join(self, outputs: Sequence[Outputs], arguments: Mapping[str, Any]) -> Any:
        tokens, hidden = _join(outputs, 0), _join(outputs, 1)
        fields: dict[str, Any] = {"last_hidden_state": hidden[0], "pooler_output": tokens[0]}
        if "deepstack_features" in self.output.__dataclass_fields__:  # type: ignore[attr-defined]
            fields["deepstack_features"] = list(tokens[1:].unbind())
        return self.output(**fields)


class CellCall(GridCall):
    """As `GridCall`; a token is its cell of m * m patches: `pooler_output` is `[M, m * m, D]`."""

    def join(self, outputs: Sequence[Outputs], arguments: Mapping[str, Any]) -> Any:
        cells = _join(outputs, 0)[0].unflatten(1, (self.spec.merge**2, -1))
        return self.output(last_hidden_state=_join(outputs, 1)[0], pooler_output=cells)


class TileCall(Call):
    """Pictures `[N, 3, side, side]` in pixels in; `last_hidden_state` `[N, 1 + patches, D]` out."""

    known = frozenset({"pixel_values"})
    records = ("output_hidden_states",)
    """The model around it may ask for the last hidden state by its index."""

    @property
    def side(self) -> int:
        """Patches on a side of a tile."""
        return self.spec.side  # type: ignore[attr-defined]

    @property
    def patch(self) -> int:
        """Pixels on a side of a patch."""
        return round((self.spec.patch_width // 3) ** 0.5)

    def _refuse(self, arguments: Mapping[str, Any]) -> str:
        pixels, size = arguments.get("pixel_values"), self.side * self.patch
        if arguments.get("output_hidden_states") not in (None, False, -1):
            return "output_hidden_states is asked for"
        if not isinstance(pixels, Tensor) or not pixels.is_floating_point() or pixels.dim() != 4:
            return "pixel_values have another shape or type"
        if not len(pixels):
            return "there is no image"
        return "" if tuple(pixels.shape[1:]) == (3, size, size) else "tiles are of another size"

    def split(self, arguments: Mapping[str, Any]) -> tuple[Tensor, list[Grid]]:
        side, patch = self.side, self.patch
        tiles: Tensor = arguments["pixel_values"]
        cells = tiles.unflatten(3, (side, patch)).unflatten(2, (side, patch))
        rows = cells.permute(0, 2, 4, 1, 3, 5).reshape(-1, self.spec.patch_width)
        return rows, [Grid(len(tiles), side, side)]

    def join(self, outputs: Sequence[Outputs], arguments: Mapping[str, Any]) -> Any:
        last = _join(outputs, 0)[0].unflatten(0, (-1, 1 + self.side**2))
        if arguments.get("output_hidden_states") != -1:
            return self.output(last_hidden_state=last)
        return self.output(last_hidden_state=last, hidden_states=(*[None] * self.config.num_hidden_layers, last))


CALLS: Mapping[str, type[Call]] = {"grid": GridCall, "cells": CellCall, "tiles": TileCall}


def _rows(arguments: Mapping[str, Any]) -> Any:
    """The rows, under the name that the class gives its first argument."""
    return arguments.get("hidden_states", arguments.get("pixel_values"))


def _join(outputs: Sequence[Outputs], index: int) -> Tensor:
    """One output of all items, `[levels, rows, width]`."""
    parts = [item[index] for item in outputs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
