"""Holding a tower made from a module against the module itself, before it runs anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitgraph.attention.base import VarlenAttention
from vitgraph.config import EncoderConfig
from vitgraph.core import Grid
from vitgraph.engine.engine import Engine
from vitgraph.errors import UnsupportedModuleError
from vitgraph.integrations.transformers.host_reads import HostRead, refuse_host_reads, where
from vitgraph.integrations.transformers.module_tower import ModuleTower
from vitgraph.models.contract import TowerBuffers

TOLERANCE = {torch.float32: 5e-3}
HALF_TOLERANCE = 5e-2
"""Largest relative error: far above rounding (convolutions may use TF32), far below what a mistake makes."""

SEED = 0
EXAMPLE_FAILS = "its forward fails on an example"


@dataclass(frozen=True)
class Place:
    """Where a module's weights lie, and in what type."""

    device: torch.device
    dtype: torch.dtype


def example_rows(rows: int, width: int, place: Place) -> Tensor:
    """The same random pixel rows `[rows, width]` at every call; the global generators are left alone."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(rows, width, generator=generator).to(place.device, place.dtype)


def attempt(module: nn.Module, arguments: Mapping[str, Any]) -> Any:
    """The module's output.

    Raises:
        UnsupportedModuleError: whatever its forward raises; the call was our own idea.
    """
    try:
        return module(**arguments)
    except UnsupportedModuleError:
        raise
    except Exception as error:
        raise UnsupportedModuleError(f"{EXAMPLE_FAILS}: {first_line(error)}") from error


def verify(
    tower: ModuleTower,
    packs: Sequence[Sequence[Grid]],
    expected: Sequence[Sequence[Tensor]],
    place: Place,
    attention: VarlenAttention,
) -> None:
    """Runs the tower packed, padded and with NaN in the padding, and compares with the module's own outputs.

    Args:
        tower: to verify.
        packs: items of each pack.
        expected: per pack the module's tensors.
        place: of the module.
        attention: the tower's backend.

    Raises:
        UnsupportedModuleError: the forward does what a graph cannot hold, or gives other numbers.
    """
    most = max(sum(tower.spec.counts(grid)["token"] for grid in grids) for grids in packs)
    frames = max(sum(grid.t for grid in grids) for grids in packs)
    # One budget with room to spare, so that every pack has padding.
    config = EncoderConfig(budgets=(2 * most,), max_items=2 * frames, max_frames=2 * frames, lazy=True)
    checked = Engine(_Checked(tower), place.device, place.dtype, config, attention)
    for grids, tensors in zip(packs, expected, strict=True):
        sizes = [grid.patches for grid in grids]
        rows = example_rows(sum(sizes), tower.spec.patch_width, place).split(sizes)
        for _ in range(2):  # the second time, what the first left in the padding is NaN
            outputs = checked.run(rows, grids, "padded")
            checked.poison_padding()
        found = tower.form.flatten(tower.build(outputs))
        for leaf, own, reference in zip(tower.leaves, found, tensors, strict=True):
            _compare(leaf.name, own, reference, place)
    checked.release()


def _compare(name: str, own: Tensor, reference: Tensor, place: Place) -> None:
    if reference.dtype != place.dtype:
        raise UnsupportedModuleError(f"its output {name} is {reference.dtype}, its weights are {place.dtype}")
    difference = (own.float() - reference.float()).norm() / reference.float().norm().clamp(min=1e-6)
    if not bool(difference <= TOLERANCE.get(place.dtype, HALF_TOLERANCE)):
        raise UnsupportedModuleError(f"its output {name} differs by {float(difference):.1e} when packed and padded")


class _Checked(ModuleTower):
    """A tower whose forward may not do what a graph cannot hold."""

    def __init__(self, tower: ModuleTower) -> None:
        super().__init__(tower._twin[0], tower.call, tower.form, tower.leaves)
        self._tower = (tower,)
        self.spec = tower.spec

    def metadata(self, grid: Grid) -> dict[str, np.ndarray]:
        return self._tower[0].metadata(grid)

    def forward(self, buffers: TowerBuffers) -> tuple[Tensor, ...]:
        try:
            with refuse_host_reads():
                return self._tower[0](buffers)
        except UnsupportedModuleError:
            raise
        except HostRead as error:
            raise UnsupportedModuleError(str(error)) from error
        except Exception as error:
            raise UnsupportedModuleError(f"its forward fails {where(error)}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Class and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
