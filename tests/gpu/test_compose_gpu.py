"""On a GPU: composed metadata equals what the host writes, and new combinations of known sizes need nothing else."""

from __future__ import annotations

import random

import pytest
import torch

from composing import Composing, check
from families import awkward_grids
from vitgraph import EncoderConfig, VisionEncoder
from vitgraph.core import Grid, sum_counts
from vitgraph.models.registry import families

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

FAMILIES = [family.name for family in families()]
BUDGETS = (32, 64, 160, 320)


def make(family: str, **settings: object) -> VisionEncoder:
    return VisionEncoder.from_config(family, device="cuda", config=EncoderConfig(budgets=BUDGETS, **settings))


@pytest.mark.parametrize("family", FAMILIES)
def test_composed_metadata_is_what_the_host_writes(family: str) -> None:
    with make(family) as encoder:
        spec = encoder.spec
        grids = awkward_grids(spec)
        total = sum_counts(spec.counts(grid) for grid in grids)
        capacities = [total, {kind: n + 3000 for kind, n in total.items()}]
        made = Composing(encoder.tower, capacities, torch.device("cuda"), 1 << 22)
        choose = random.Random(0)
        for _ in range(6):
            for budget in (0, 1):
                check(made, choose.sample(grids, choose.randint(1, len(grids))), budget)


def written_for_replays(encoder: VisionEncoder) -> int:
    """Packs in budgets whose metadata the host wrote."""
    return encoder.stats.host_metadata - encoder.stats.eager_packs


@pytest.mark.parametrize("family", FAMILIES)
def test_new_combinations_of_known_sizes_give_what_the_padded_forward_gives(family: str) -> None:
    with make(family) as encoder:
        spec = encoder.spec
        grids = awkward_grids(spec)
        choose = random.Random(1)
        encoder.capture(progress=False)
        before = encoder.stats.metadata_misses
        for seed in range(8):
            batch = choose.choices(grids, k=choose.randint(1, 4))
            generator = torch.Generator("cuda").manual_seed(seed)
            rows = sum(grid.patches for grid in batch)
            x = torch.randn(rows, spec.patch_width, device="cuda", generator=generator)
            written = written_for_replays(encoder)
            got = encoder.encode_patches(x, batch)
            assert written_for_replays(encoder) == written
            # Another pack lies in the static buffers before the reference writes its own metadata again.
            encoder.encode_patches(x[: grids[0].patches], grids[:1])
            want = encoder.encode_patches(x, batch, mode="padded")
            assert all(torch.equal(g.tokens, w.tokens) for g, w in zip(got, want, strict=True))
        assert encoder.stats.metadata_misses - before <= len(set(grids))


def test_a_large_clip_and_many_items_at_once() -> None:
    config = EncoderConfig(budgets=(1024, 4096))
    with VisionEncoder.from_config("qwen3_vl", device="cuda", config=config) as encoder:
        for batch in ([Grid(4, 32, 32)], [Grid(1, 8, 8)] * 64, [Grid(1, 64, 64), *[Grid(1, 4, 6)] * 100]):
            x = torch.randn(sum(grid.patches for grid in batch), encoder.spec.patch_width, device="cuda")
            got, want = encoder.encode_patches(x, batch), encoder.encode_patches(x, batch, mode="eager")
            for g, w in zip(got, want, strict=True):
                assert (g.tokens - w.tokens).float().norm() <= 2e-2 * w.tokens.float().norm()
