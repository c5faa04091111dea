"""Towers whose forward is that of a Transformers module, on static buffers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitgraph.attention.base import VarlenAttention
from vitgraph.core import Counts, Grid
from vitgraph.integrations.transformers.attention_function import carry
from vitgraph.integrations.transformers.call_forms import CallForm
from vitgraph.integrations.transformers.host_reads import UnreadGrid
from vitgraph.integrations.transformers.leaves import Leaf, OutputForm
from vitgraph.integrations.transformers.metadata_rules import RULES, ModuleSpec, item_arrays
from vitgraph.integrations.transformers.recorder import RecordedCall
from vitgraph.integrations.transformers.shadow import copied_bytes
from vitgraph.integrations.transformers.surroundings import is_capturing, made_on, unnoticed_capture
from vitgraph.models.contract import Tower, TowerBuffers, TowerSpec

KEPT_LENGTHS = 65536


class ModuleTower(Tower):
    """A shadow of the module; its weights stay the module's own and are not registered here.

    Args:
        twin: shadow of the module.
        call: how it is called.
        form, leaves: of its output.

    Attributes:
        captures_begun: how often the forward ran in a capture, those that failed among them.
    """

    def __init__(self, twin: nn.Module, call: CallForm, form: OutputForm, leaves: Sequence[Leaf]) -> None:
        super().__init__()
        # In a tuple, so that nn.Module does not take it for a submodule.
        self._twin = (twin,)
        self.call, self.form, self.leaves = call, form, tuple(leaves)
        self.captures_begun = 0

    def _outputs(self, arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
        self.captures_begun += is_capturing()
        with made_on(arguments[self.call.pixels].device), unnoticed_capture():
            tensors = self.form.flatten(self._twin[0](**arguments))
        return tuple(leaf.pack(tensor) for leaf, tensor in zip(self.leaves, tensors, strict=True))

    def copied_bytes(self, module: nn.Module) -> int:
        """Device memory of what the shadow of this module had to copy there."""
        return copied_bytes(module, self._twin[0])

    def build(self, outputs: Sequence[Sequence[Tensor]]) -> Any:
        """The module's output from the engine's outputs of all items, in order."""
        columns = zip(*outputs, strict=True)
        joined = [column[0] if len(column) == 1 else torch.cat(column, dim=1) for column in columns]
        return self.form.build([leaf.unpack(x) for leaf, x in zip(self.leaves, joined, strict=True)])


class GridTower(ModuleTower):
    """A module on packed patch rows, whose metadata comes in through keywords.

    Args:
        twin, call, form, leaves: see `ModuleTower`.
        spec: without `lengths`.
        calls: its metadata functions.
        attention: backend of its attention function.
        integers: keywords that the module's functions give as int64.
    """

    spec: ModuleSpec

    def __init__(
        self,
        twin: nn.Module,
        call: CallForm,
        form: OutputForm,
        leaves: Sequence[Leaf],
        spec: ModuleSpec,
        calls: Sequence[RecordedCall],
        attention: VarlenAttention,
    ) -> None:
        super().__init__(twin, call, form, leaves)
        self.spec, self._calls, self._attention = spec, tuple(calls), attention
        self._unread = UnreadGrid(call.grid)

    def metadata(self, grid: Grid) -> dict[str, np.ndarray]:
        arrays = item_arrays(self._calls, [grid])
        return {buffer.name: arrays[buffer.name] for buffer in self.spec.buffers}

    def forward(self, buffers: TowerBuffers) -> tuple[Tensor, ...]:
        return self._outputs(self.arguments(buffers))

    def arguments(self, buffers: TowerBuffers) -> dict[str, Any]:
        """What the module's forward gets: indexes in int64, as its own functions make them, offsets with segments."""
        given: dict[str, Any] = self.call.arguments(buffers.pixel_values, self._unread)
        for buffer in self.spec.buffers:
            tensor = buffers.metadata[buffer.name]
            value: Any
            if buffer.name in buffers.segments:
                value = carry(tensor, buffers.segments[buffer.name], self._attention)
            elif RULES[buffer.name].number:
                value = len(tensor)
            else:
                value = tensor.long() if buffer.dtype == "int32" else tensor
            keyword, part, _ = buffer.name.partition("[")
            given[keyword] = (*given.get(keyword, ()), value) if part else value
        return given


def segment_counter(calls: Sequence[RecordedCall], names: Mapping[str, str]) -> Any:
    """A function from a grid to the number of its segments, by kind.

    Args:
        calls: metadata functions.
        names: kind by keyword of the offsets.
    """

    @lru_cache(maxsize=KEPT_LENGTHS)
    def lengths(grid: Grid) -> Counts:
        arrays = item_arrays(calls, [grid])
        return {kind: len(arrays[name]) for name, kind in names.items()}

    return lengths


class TileTower(ModuleTower):
    """A module on pictures of one size, each a row: `[N, ...]` in, `[N, ...]` out."""

    def __init__(self, twin: nn.Module, call: CallForm, form: OutputForm, leaves: Sequence[Leaf], spec: TowerSpec):
        super().__init__(twin, call, form, leaves)
        self.spec = spec

    @property
    def tokens_per_tile(self) -> int:
        """Rows that a picture has in the first output."""
        leaf = self.leaves[0]
        is_map = len(leaf.after) == 3  # channels, height, width
        return leaf.each * math.prod(leaf.after[1:] if is_map else leaf.after[:-1])

    def metadata(self, grid: Grid) -> dict[str, np.ndarray]:
        return {}

    def forward(self, buffers: TowerBuffers) -> tuple[Tensor, ...]:
        return self._outputs(self.call.arguments(buffers.pixel_values, None))
