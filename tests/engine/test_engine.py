"""The engine on the CPU: same packing, padding and static buffers, replayed by calling forward."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from vitgraph import EncoderConfig, VisionEncoder
from vitgraph.core import Grid
from vitgraph.engine.engine import Mode
from vitgraph.errors import ConfigError, EngineReleasedError, FallbackError, PatchError

GRIDS = [(1, 8, 8), (1, 2, 2), (1, 6, 10), (1, 2, 20)]


def make(**settings) -> VisionEncoder:
    return VisionEncoder.from_config("qwen3_vl", device="cpu", config=EncoderConfig(**settings))


def rows_of(encoder, grids, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(t * h * w for t, h, w in grids), encoder.spec.patch_width, generator=generator)


def alone(encoder, x, grids):
    """The slow reference: one item per call, buffers of exactly its size."""
    out, row = [], 0
    for grid in grids:
        rows = int(np.prod(grid))
        out += encoder.encode_patches(x[row : row + rows], [grid], mode="eager")
        row += rows
    return out


def assert_same(got, want) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.tokens, b.tokens, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(a.deepstack, b.deepstack, rtol=1e-5, atol=1e-5)
        assert a.grid == b.grid


def test_counters_tell_what_ran() -> None:
    encoder = make(budgets=(32, 64))
    encoder.encode_patches(rows_of(encoder, GRIDS), GRIDS)
    stats = encoder.stats
    tokens = sum(h * w // 4 for _, h, w in GRIDS)
    assert (stats.items, stats.real_tokens) == (4, tokens)
    assert stats.padded_tokens >= tokens
    assert stats.padding == pytest.approx(1 - tokens / stats.padded_tokens)
    assert stats.packs == stats.replays
    assert (stats.metadata_hits, stats.metadata_misses) == (0, 4)
    assert stats.host_metadata == stats.packs
    encoder.encode_patches(rows_of(encoder, GRIDS), GRIDS)
    assert encoder.stats.metadata_hits == 4
    assert stats.items == 4, "a snapshot does not move"
    written = encoder.stats.host_metadata
    encoder.engine.stage(0, GRIDS[:1])
    assert encoder.stats.host_metadata == written, "what is staged to be timed is no pack"


@pytest.mark.parametrize(
    "settings, grids, fallback",
    [
        ({"budgets": (16,)}, [(1, 20, 20), (1, 4, 4)], "patch+token"),
        ({"budgets": (64,), "max_items": 1}, [(1, 4, 4)] * 5, None),
        ({"budgets": (64,), "max_frames": 2, "max_items": 2}, [(7, 4, 4), (1, 4, 4)], None),
        ({"budgets": (8,)}, [(40, 4, 4)], None),
        ({"budgets": (1,)}, [(3, 4, 4)], "patch+token"),
    ],
    ids=["too large", "too many items", "too many frames", "long clip", "nothing fits"],
)
def test_whatever_does_not_fit_is_split_or_eager_and_counted(settings, grids, fallback) -> None:
    encoder = make(**settings)
    x = rows_of(encoder, grids)
    assert_same(encoder.encode_patches(x, grids), alone(encoder, x, grids))
    reasons = encoder.stats.fallbacks
    if fallback is None:
        assert not reasons
    else:
        assert any(fallback in reason for reason in reasons)
        assert encoder.stats.eager_packs == sum(reasons.values())
    assert encoder.stats.split_items == sum(t > 1 for t, _, _ in grids) * (fallback is None)


def test_a_fallback_is_logged_once(caplog) -> None:
    encoder = make(budgets=(16,))
    for seed in range(3):
        encoder.encode_patches(rows_of(encoder, [(1, 20, 20)], seed), [(1, 20, 20)])
    assert [r.levelname for r in caplog.records if "running without a graph" in r.message] == ["WARNING"]


def test_strict_raises_instead_of_falling_back() -> None:
    encoder = make(budgets=(16,), strict=True)
    with pytest.raises(FallbackError, match=r"1x20x20.*patch\+token"):
        encoder.encode_patches(rows_of(encoder, [(1, 20, 20)]), [(1, 20, 20)])
    assert len(encoder.encode_patches(rows_of(encoder, [(1, 4, 4)]), [(1, 4, 4)])) == 1


def test_without_graphs_packs_run_on_exact_buffers_and_nothing_counts_as_fallback() -> None:
    encoder = make(graph=False)
    x = rows_of(encoder, GRIDS)
    assert_same(encoder.encode_patches(x, GRIDS), alone(encoder, x, GRIDS))
    assert encoder.stats.replays == 0
    assert encoder.stats.fallbacks == {}


def test_stale_rows_of_a_larger_pack_do_not_show() -> None:
    encoder = make(budgets=(16, 128))
    large = [(1, 20, 20)]
    for seed in range(3):
        encoder.encode_patches(rows_of(encoder, large, seed), large)
        x = rows_of(encoder, GRIDS[:2], seed)
        assert_same(encoder.encode_patches(x, GRIDS[:2]), alone(encoder, x, GRIDS[:2]))


def test_results_do_not_alias_the_static_buffers() -> None:
    encoder = make(budgets=(64,))
    first = encoder.encode_patches(rows_of(encoder, GRIDS[:1]), GRIDS[:1])[0]
    kept = first.tokens.clone()
    encoder.encode_patches(rows_of(encoder, GRIDS[:1], seed=9), GRIDS[:1])
    assert torch.equal(first.tokens, kept)


def test_threads_may_share_an_encoder() -> None:
    encoder = make(budgets=(32, 64))
    jobs = [(rows_of(encoder, [grid], i), [grid]) for i, grid in enumerate(GRIDS * 3)]
    want = [encoder.encode_patches(x, g)[0].tokens for x, g in jobs]
    got = {}

    def work(start: int) -> None:
        torch.set_num_threads(1)  # per thread; more would sum in another order
        for i in range(start, len(jobs), 3):
            got[i] = encoder.encode_patches(*jobs[i])[0].tokens

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[i], tokens) for i, tokens in enumerate(want))


def test_a_released_encoder_says_so() -> None:
    with make() as encoder:
        encoder.encode_patches(rows_of(encoder, GRIDS), GRIDS)
    with pytest.raises(EngineReleasedError, match="from_pretrained"):
        encoder.encode_patches(rows_of(encoder, GRIDS), GRIDS)


def test_an_empty_batch_gives_an_empty_list() -> None:
    encoder = make()
    assert encoder.encode([]) == []
    assert encoder.encode_patches(torch.empty(0, encoder.spec.patch_width), []) == []
    assert len(encoder.engine._prepared) == 0, "nothing has run"


@pytest.mark.parametrize(
    "rows, grids, message",
    [
        (torch.zeros(64, 7), [(1, 8, 8)], r"shape \(64, 7\).*\[patches, 1536\]"),
        (torch.zeros(64), [(1, 8, 8)], "shape"),
        (torch.zeros(60, 1536), [(1, 8, 8)], "60 rows.*64 patches"),
        (torch.zeros(64, 1536, dtype=torch.uint8), [(1, 8, 8)], "floating point.*uint8"),
        (torch.zeros(63, 1536), [(1, 7, 9)], "multiples of 2"),
        (torch.zeros(64, 1536), [(0, 8, 8)], "positive"),
        (torch.zeros(64, 1536), [(8, 8)], r"\(t, h, w\)"),
        (torch.zeros(64, 1536), torch.tensor([[1.0, 8, 8]]), "whole"),
        (torch.zeros(64, 1536), [(1, 8, 8.5)], r"whole numbers of patches, not \(1, 8, 8.5\)"),
        (torch.zeros(64, 1536), [torch.tensor([1.5, 8, 8])], "whole numbers"),
        (torch.zeros(64, 1536), [(1, 8, float("inf"))], "whole numbers"),
        (torch.zeros(64, 1536), [(1, 8, float("nan"))], "whole numbers"),
        (torch.zeros(64, 1536), [(1, 8, "8")], "whole numbers"),
        (torch.zeros(64, 1536), [([1], [8], [8])], "whole numbers"),
        (torch.zeros(64, 1536), [(1, 8, None)], "whole numbers"),
        (torch.zeros(64, 1536), [64], "whole numbers.*not 64"),
        (torch.zeros(64, 1536), [[1, 8, 8], 64], r"one \(t, h, w\) per item.*64\]"),
        (torch.zeros(64, 1536), 64, r"one \(t, h, w\) per item.*64"),
        (torch.zeros(64, 1536), None, r"one \(t, h, w\) per item.*None"),
        ("pixels", [(1, 8, 8)], "floating point"),
    ],
)
def test_patches_that_do_not_fit_are_refused(rows, grids, message) -> None:
    with pytest.raises(PatchError, match=message):
        make().encode_patches(rows, grids)


@pytest.mark.parametrize("mode", ["auto", "padded", "eager"])
@pytest.mark.parametrize("items", [1, 3, 9])
def test_other_rows_than_the_grids_hold_are_refused_before_any_pack_runs(items: int, mode: Mode) -> None:
    encoder = make(budgets=(64, 256))
    grids = [Grid(1, 16, 16)] * items
    rows = rows_of(encoder, grids)
    with encoder, pytest.raises(PatchError, match=f"{len(rows) - 1} rows, but the grids hold {len(rows)} patches"):
        encoder.encode_patches(rows[:-1], grids, mode=mode)
    assert (encoder.stats.replays, encoder.stats.eager_packs, encoder.stats.items) == (0, 0, 0)


def test_other_rows_than_the_grids_hold_are_refused_before_the_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, grids = make(), [(1, 8, 8), (1, 4, 4)]
    rows, captured = rows_of(encoder, grids), []
    monkeypatch.setattr(encoder.engine.ladder, "complete", False)
    monkeypatch.setattr(encoder.engine, "capture", lambda: captured.append(True))
    with pytest.raises(PatchError, match="79 rows, but the grids hold 80 patches"):
        encoder.encode_patches(rows[1:], grids)
    assert not captured
    encoder.encode_patches(rows, grids)
    assert captured


@pytest.mark.parametrize(
    "grids",
    [
        [[1, 8, 8]],
        [(1, 8.0, 8)],
        [torch.tensor([1, 8, 8])],
        [np.array([1, 8, 8])],
        np.array([[1, 8, 8]]),
        torch.tensor([[1, 8, 8]], dtype=torch.int32),
    ],
    ids=["lists", "floats", "tensors", "arrays", "an array", "an int32 tensor"],
)
def test_grids_come_in_many_forms(grids) -> None:
    encoder = make()
    x = torch.randn(64, 1536)
    (want,) = encoder.encode_patches(x, [Grid(1, 8, 8)])
    (got,) = encoder.encode_patches(x, grids)
    assert got.grid == want.grid and torch.equal(got.tokens, want.tokens)


def test_of_a_batch_only_new_grids_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, grids = make(), [Grid(1, 8, 8), Grid(1, 4, 4), Grid(1, 4, 8)]
    encoder.encode_patches(rows_of(encoder, grids[:2]), grids[:2])
    asked: list[Grid] = []
    known = encoder.engine.known
    monkeypatch.setattr(encoder.engine, "known", lambda grid: (asked.append(grid), known(grid))[1])
    for given in (grids, torch.tensor(grids), [list(grid) for grid in grids]):
        encoder.encode_patches(rows_of(encoder, grids), given)
    assert asked == grids[2:]


def test_images_only_families_refuse_clips() -> None:
    encoder = VisionEncoder.from_config("kimi_vl", device="cpu")
    with pytest.raises(PatchError, match="images only"):
        encoder.encode_patches(torch.zeros(128, encoder.spec.patch_width), [(2, 8, 8)])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"device": "tpu"}, "tpu"),
        ({"device": "meta"}, "not supported"),
        ({"dtype": "float64"}, "float64.*bfloat16"),
        ({"dtype": torch.int8}, "int8"),
        ({"device": "cpu", "config": EncoderConfig(attention="varlen")}, "CUDA"),
    ],
)
def test_impossible_places_are_refused(settings, message) -> None:
    with pytest.raises(ConfigError, match=message):
        VisionEncoder.from_config("qwen3_vl", **settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="no CUDA device"):
        VisionEncoder.from_config("qwen3_vl", device="cuda")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_stays_near_fp32(dtype: str) -> None:
    narrow = VisionEncoder.from_config("qwen3_vl", device="cpu", dtype=dtype)
    full = make()
    x = rows_of(full, GRIDS)
    for a, b in zip(narrow.encode_patches(x, GRIDS), full.encode_patches(x, GRIDS), strict=True):
        assert a.tokens.dtype == getattr(torch, dtype)
        assert ((a.tokens.float() - b.tokens).norm() / b.tokens.norm()) < 0.03


def test_the_default_ladder_and_common_grids_are_ready_after_warming() -> None:
    encoder = make()
    encoder.engine.warm_metadata()
    encoder.encode_patches(rows_of(encoder, [(1, 8, 8)]), [(1, 8, 8)])
    assert (encoder.stats.metadata_hits, encoder.stats.metadata_misses) == (1, 0)


def test_cos_and_sin_are_settled_before_a_forward_runs_them_in_threads(monkeypatch) -> None:
    settled: list[bool] = []
    monkeypatch.setattr("vitgraph.engine.engine.settle_cos_and_sin", lambda: settled.append(True))
    make()
    assert settled


@pytest.fixture
def compiled_by(monkeypatch):
    """Has blocks compiled by a backend of one's own."""

    def compile_by(backend: Callable[[torch.fx.GraphModule, object], object]) -> VisionEncoder:
        compile_module = nn.Module.compile
        monkeypatch.setattr(nn.Module, "compile", lambda self, **how: compile_module(self, **how, backend=backend))
        return make(compile=True)

    torch._dynamo.reset()
    yield compile_by
    torch._dynamo.reset()


def test_floats_of_a_tower_are_constants_of_its_compiled_code(compiled_by) -> None:
    inputs: list[list[object]] = []

    def backend(graph: torch.fx.GraphModule, _: object):
        inputs.append([node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"])
        return graph.forward

    compiled, plain = compiled_by(backend), make()
    x = rows_of(plain, GRIDS)
    assert_same(compiled.encode_patches(x, GRIDS), plain.encode_patches(x, GRIDS))
    (code,) = inputs
    assert any(isinstance(value, torch.SymInt) for value in code), "of every number of rows"
    assert not any(isinstance(value, torch.SymFloat) for value in code)
    assert not any(isinstance(value, torch.Tensor) and value.dtype == torch.float64 for value in code)
    assert not torch._dynamo.config.specialize_float, "other compiled functions of the process are as they were"


def test_code_is_compiled_without_other_processes(compiled_by, monkeypatch) -> None:
    from torch._inductor import config

    seen: list[int | None] = []

    def backend(graph: torch.fx.GraphModule, _: object):
        seen.append(config.compile_threads)
        return graph.forward

    monkeypatch.setattr(config, "compile_threads", 7)
    compiled = compiled_by(backend)
    compiled.encode_patches(rows_of(compiled, GRIDS), GRIDS)
    assert seen == [1]
    assert config.compile_threads == 7, "other compiled functions of the process are as they were"
