"""On a GPU: composed metadata equals what the host writes, and new combinations of known sizes need nothing else."""

from __future__ import annotations

import gc
import random

import pytest
import torch

from composing import Composing, check
from families import awkward_grids
from vitgraph import EncoderConfig, VisionEncoder
from vitgraph.core import Grid, sum_counts
from vitgraph.engine.mailbox import ENTRIES
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


SLEEP_CYCLES = 300_000_000
"""Of the GPU's clock: some tenths of a second."""


def test_a_host_that_is_far_ahead_waits_and_mixes_nothing_up() -> None:
    with make("qwen3_vl") as encoder:
        batches = [[Grid(1, 4, 4)], [Grid(1, 6, 4), Grid(1, 2, 2)], [Grid(1, 4, 8)]]
        width, calls = encoder.spec.patch_width, ENTRIES + 70
        encoder.capture(progress=False)
        xs = [torch.randn(sum(grid.patches for grid in batch), width, device="cuda") for batch in batches]
        want = [encoder.encode_patches(x, batch, mode="padded") for x, batch in zip(xs, batches, strict=True)]
        torch.cuda.synchronize()
        torch.cuda._sleep(SLEEP_CYCLES)
        got = [encoder.encode_patches(xs[number % 3], batches[number % 3]) for number in range(calls)]
        for number, items in enumerate(got):
            assert all(torch.equal(g.tokens, w.tokens) for g, w in zip(items, want[number % 3], strict=True)), number


@pytest.mark.parametrize("pinned", [False, True])
def test_an_encoder_may_go_while_its_replays_are_in_flight(pinned: bool) -> None:
    encoder, batch = make("qwen3_vl"), [Grid(1, 6, 4), Grid(1, 2, 2)]
    x = torch.randn(28, encoder.spec.patch_width)
    x = x.pin_memory() if pinned else x.cuda()
    encoder.capture(progress=False)
    want = [item.tokens.clone() for item in encoder.encode_patches(x, batch, mode="padded")]
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP_CYCLES)
    got = [encoder.encode_patches(x, batch) for _ in range(20)]
    del encoder
    gc.collect()
    # Whoever gets the memory next writes over it at once.
    for _ in range(20):
        torch.zeros(1 << 16, dtype=torch.int32, pin_memory=True).fill_(-1)
    for items in got:
        assert all(torch.equal(g.tokens, w) for g, w in zip(items, want, strict=True))
