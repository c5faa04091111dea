"""What the conformance suite needs to know of a family, read from its own declarations."""

from __future__ import annotations

from math import isqrt

import numpy as np
import torch
from torch import Tensor

from vitgraph import EncoderConfig, VisionEncoder
from vitgraph.core import Counts, Grid, sum_counts
from vitgraph.embedding import VisionEmbedding
from vitgraph.engine.buffers import MetadataLayout
from vitgraph.errors import PatchError
from vitgraph.models.contract import Tower, TowerSpec
from vitgraph.planning.metadata import GridPlan

MOST_FRAMES = 4


def make(family: str, **settings) -> VisionEncoder:
    return VisionEncoder.from_config(family, device="cpu", dtype="float32", config=EncoderConfig(**settings))


def image_grids(spec: TowerSpec) -> list[Grid]:
    """Ragged, one cell high or wide, larger and smaller than any window, two of one size."""
    if spec.unit > 1:
        side = spec.merge * isqrt(spec.unit)
        return [Grid(1, side, side), Grid(3, side, side), Grid(1, side, side), Grid(2, side, side)]
    cells = [(1, 1), (1, 10), (10, 1), (3, 5), (9, 17), (4, 4), (4, 4)]
    return [Grid(1, h * spec.merge, w * spec.merge) for h, w in cells]


def clip_grids(spec: TowerSpec) -> list[Grid]:
    """Clips with odd and even frame counts; none for families without video."""
    if "video" not in spec.modalities or spec.unit > 1:
        return []
    return [Grid(t, h * spec.merge, w * spec.merge) for t, h, w in [(2, 2, 3), (3, 5, 1), (4, 3, 3)]]


def awkward_grids(spec: TowerSpec) -> list[Grid]:
    """Images and clips side by side."""
    return [*image_grids(spec), *clip_grids(spec)]


def pixels(spec: TowerSpec, grids: list[Grid], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(g.patches for g in grids), spec.patch_width, generator=generator)


def stacked(embeddings: list[VisionEmbedding]) -> Tensor:
    """All items as the towers return them, `[levels, M, C]`."""
    levels = [[e.tokens[None], *([] if e.deepstack is None else [e.deepstack])] for e in embeddings]
    return torch.cat([torch.cat(level) for level in levels], dim=1)


def one_by_one(encoder: VisionEncoder, x: Tensor, grids: list[Grid]) -> Tensor:
    """The slow reference: one item per call, on buffers of exactly its size."""
    parts = x.split([g.patches for g in grids])
    return stacked([encoder.encode_patches(p, [g], mode="eager")[0] for p, g in zip(parts, grids, strict=True)])


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def longest_clip(spec: TowerSpec) -> Grid | None:
    """The longest clip of one-cell frames that the tower takes, up to MOST_FRAMES temporal patches."""
    for t in range(MOST_FRAMES, 1, -1):
        try:
            spec.check_grid(Grid(t, *image_grids(spec)[0][1:]))
        except PatchError:
            continue
        return Grid(t, *image_grids(spec)[0][1:])
    return None


def composed(tower: Tower, grids: list[Grid], spare: int = 0) -> tuple[dict[str, np.ndarray], Counts]:
    """Metadata of several items as the engine writes it, with `spare` rows of every kind, and the rows filled."""
    plans = [GridPlan(tower.spec.counts(grid), tower.metadata(grid)) for grid in grids]
    total = sum_counts(plan.counts for plan in plans)
    layout = MetadataLayout(tower.spec, {kind: n + spare for kind, n in total.items()})
    arrays = layout.arrays(np.full(layout.nbytes, 0xFF, np.uint8))
    layout.write(arrays, plans)
    return arrays, total
