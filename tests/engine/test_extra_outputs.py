"""A tower that declares more outputs than tokens: each is split, copied out and joined by its own rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from vitgraph import EncoderConfig, VisionEncoder
from vitgraph.attention.select import select_attention
from vitgraph.core import Grid
from vitgraph.engine.engine import Engine
from vitgraph.models.contract import OutputSpec, Tower, TowerBuffers

GRIDS = [Grid(1, 8, 8), Grid(3, 4, 4), Grid(1, 2, 10)]


class WithPixels(Tower):
    """A tower that also returns its pixel rows, doubled."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.inner = tower
        self.spec = replace(tower.spec, extra_outputs=(OutputSpec("pixels", "patch", tower.spec.patch_width),))

    def metadata(self, grid: Grid) -> dict[str, np.ndarray]:
        return self.inner.metadata(grid)

    def forward(self, buffers: TowerBuffers) -> tuple[Tensor, ...]:
        return self.inner(buffers), 2 * buffers.pixel_values[None]


@pytest.mark.parametrize("budgets", [(64,), (8, 24), (4,)], ids=["one-pack", "several-packs", "cut-and-eager"])
def test_extra_outputs_follow_their_items(budgets: tuple[int, ...]) -> None:
    encoder = VisionEncoder.from_config("qwen3_vl", device="cpu")
    config = EncoderConfig(budgets=budgets)
    attention = select_attention("sdpa", encoder.device, encoder.dtype)
    engine = Engine(WithPixels(encoder.tower), encoder.device, encoder.dtype, config, attention)
    rows = [torch.randn(grid.patches, encoder.spec.patch_width) for grid in GRIDS]
    want = encoder.encode_patches(torch.cat(rows), GRIDS, mode="eager")
    for (tokens, pixels), own, embedding in zip(engine.run(rows, GRIDS), rows, want, strict=True):
        assert torch.equal(pixels, 2 * own[None])
        torch.testing.assert_close(tokens[0], embedding.tokens, rtol=1e-5, atol=1e-5)


def test_embeddings_are_ordinary_tensors() -> None:
    """Embeddings may enter a recorded computation, such as the training of what follows a frozen tower."""
    encoder = VisionEncoder.from_config("qwen3_vl", device="cpu")
    tokens = encoder.encode_patches(torch.randn(64, encoder.spec.patch_width), [(1, 8, 8)])[0].tokens
    weight = torch.ones(tokens.shape[1], requires_grad=True)
    (tokens * weight).sum().backward()
    torch.testing.assert_close(weight.grad, tokens.sum(0))
