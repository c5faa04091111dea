"""Towers that return what Transformers' vision modules return: `last_hidden_state` beside the tokens, and no projector
where Transformers keeps it outside the module.

Shapes: P patch rows, M tokens, D hidden width, C output width, m merge side.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitgraph.attention.base import VarlenAttention
from vitgraph.core import Grid
from vitgraph.layers.pos_embed import gather_table
from vitgraph.models.contract import OutputSpec, Tower, TowerBuffers
from vitgraph.models.internvl import InternVLConfig, InternVLTower, TileSpec
from vitgraph.models.kimi_k25 import KimiK25Config, KimiK25Tower


class WithHidden(Tower):
    """A tower that also returns the rows that enter or leave one of its submodules.

    Args:
        tower: what it runs.
        path: of the submodule.
        output: take what leaves it instead of what enters it.
        rows, width: of these rows.
    """

    def __init__(self, tower: Tower, path: str, output: bool, rows: str, width: int) -> None:
        super().__init__()
        self.inner = tower
        self.spec = replace(tower.spec, extra_outputs=(OutputSpec("hidden", rows, width),))
        self._hidden: list[Tensor] = []
        spot = tower.get_submodule(path)
        if output:
            spot.register_forward_hook(lambda _module, _args, result: self._hidden.append(result))
        else:
            spot.register_forward_pre_hook(lambda _module, args: self._hidden.append(args[0]))

    def metadata(self, grid: Grid) -> dict[str, np.ndarray]:
        return self.inner.metadata(grid)

    def forward(self, buffers: TowerBuffers) -> tuple[Tensor, ...]:
        self._hidden.clear()
        tokens = self.inner(buffers)
        return tokens, self._hidden.pop().unsqueeze(0)

    def compile_regions(self) -> Iterable[nn.Module]:
        return self.inner.compile_regions()


class KimiFeatures(KimiK25Tower):
    """Kimi-K2.5 up to the mean over frames: `[1, M, m * m * D]`, then the final norm's rows `[1, P, D]`."""

    def __init__(self, config: KimiK25Config, attention: VarlenAttention) -> None:
        super().__init__(config, attention)
        del self.projector
        dim = config.hidden_size
        hidden = OutputSpec("hidden", "patch", dim)
        self.spec = replace(self.spec, width=dim * config.merge**2, extra_outputs=(hidden,))

    def forward(self, buffers: TowerBuffers) -> tuple[Tensor, ...]:  # type: ignore[override]
        x = self.encode(buffers)
        index, weight = buffers.metadata["pool_index"], buffers.metadata["pool_weight"]
        frames = weight.shape[1]
        weight = weight[:, None].expand(-1, self.spec.merge**2, -1).reshape(-1, frames)
        mean = gather_table(x, index.view(-1, frames), weight).to(x.dtype)
        return mean.view(1, -1, self.spec.width), x.unsqueeze(0)


@dataclass(frozen=True)
class RowSpec(TileSpec):
    """Tiles whose only output is every row of the last block, the class row first."""

    dim: int = 0

    @property
    def outputs(self) -> tuple[OutputSpec, ...]:
        return (OutputSpec("hidden", "row", self.dim),)


class InternVLFeatures(InternVLTower):
    """InternViT without the projector: all rows of all tiles, `[1, tiles * (1 + side * side), D]`."""

    def __init__(self, config: InternVLConfig, attention: VarlenAttention) -> None:
        super().__init__(config, attention)
        del self.mlp1
        declared: dict[str, Any] = {f.name: getattr(self.spec, f.name) for f in fields(self.spec)}
        self.spec = RowSpec(**declared, dim=config.hidden_size)

    def forward(self, buffers: TowerBuffers) -> Tensor:
        tiles = self.patch_embed(buffers.pixel_values).unflatten(0, (-1, self.spec.side**2))
        tiles = torch.cat([self.cls_token.expand(len(tiles), 1, -1), tiles], dim=1)
        x = (tiles + self.pos_emb.weight).flatten(0, 1)
        for block in self.blocks:
            x = block(x, None, buffers.segments["cu_seqlens"])
        return x.unsqueeze(0)
