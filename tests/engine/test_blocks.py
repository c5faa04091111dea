"""Metadata blocks kept on the device."""

from __future__ import annotations

import torch

from vitgraph import EncoderConfig, VisionEncoder
from vitgraph.engine.blocks import BlockCache


def block(value: int, size: int = 4) -> torch.Tensor:
    return torch.full((size,), value, dtype=torch.uint8)


def test_a_block_is_kept_when_it_comes_again_and_the_oldest_leaves() -> None:
    cache = BlockCache(most_bytes=8)
    cache.offer("a", block(1))
    assert cache.find("a") is None, "once is no habit"
    for key, value in (("a", 1), ("b", 2), ("b", 2)):
        cache.offer(key, block(value))
    assert cache.nbytes == 8
    kept = cache.find("a")
    assert kept is not None and kept.content is not None and kept.content.tolist() == [1] * 4
    for _ in range(2):
        cache.offer("c", block(3))
        cache.offer("large", block(9, size=9))
    assert cache.find("b") is None, "used longest ago"
    assert cache.find("large") is None
    assert cache.find("a") is not None and cache.find("c") is not None
    cache.clear()
    assert cache.find("a") is None and cache.nbytes == 0


def test_what_is_kept_does_not_follow_the_static_buffer() -> None:
    cache = BlockCache()
    static = block(1)
    for _ in range(2):
        cache.offer("a", static)
    static.fill_(7)
    kept = cache.find("a")
    assert kept is not None and kept.content is not None and kept.content.tolist() == [1] * 4


def test_a_batch_that_comes_again_gives_the_same_and_counts_as_found() -> None:
    encoder = VisionEncoder.from_config("qwen2_5_vl", device="cpu", config=EncoderConfig(budgets=(64, 128)))
    batches = [[(1, 8, 8), (1, 4, 12)], [(1, 8, 8)], [(1, 4, 12), (1, 8, 8)], [(1, 12, 12)]]
    inputs = [torch.randn(sum(t * h * w for t, h, w in b), encoder.spec.patch_width) for b in batches]
    first = [encoder.encode_patches(x, b) for x, b in zip(inputs, batches, strict=True)]
    for _ in range(3):
        for x, b, want in zip(inputs, batches, first, strict=True):
            got = encoder.encode_patches(x, b)
            assert all(torch.equal(g.tokens, w.tokens) for g, w in zip(got, want, strict=True))
    assert encoder.engine.staging.blocks.nbytes > 0
    stats = encoder.stats
    assert stats.metadata_misses == 3
    assert stats.metadata_hits == 4 * sum(map(len, batches)) - 3
