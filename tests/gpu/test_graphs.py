"""On a GPU: graph = eager on the same padded buffers bitwise, no host sync, results that outlive replays."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import threading

import pytest
import torch

from families import clip_grids, image_grids, longest_clip
from vitgraph import EncoderConfig, VisionEncoder
from vitgraph.core import Grid
from vitgraph.engine.fast_path import FastPath
from vitgraph.engine.intake import VECTOR
from vitgraph.errors import FallbackError
from vitgraph.models.registry import families

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

FAMILIES = [family.name for family in families()]
BUDGETS = (64, 160, 512)


def make(family: str, dtype: str = "bfloat16", **settings: object) -> VisionEncoder:
    settings = {"budgets": BUDGETS, "measure": False, **settings}
    return VisionEncoder.from_config(family, device="cuda", dtype=dtype, config=EncoderConfig(**settings))


def batches(encoder: VisionEncoder) -> list[list[Grid]]:
    """Batches that need the budgets in mixed order, small after large and back, clips beside images."""
    images, clips = image_grids(encoder.spec), clip_grids(encoder.spec)
    small, large = sorted(images)[0], sorted(images, key=lambda g: g.patches)[-1]
    out = [[large], [small], [large, small], [small] * 3, images, [large, large]]
    return out + [[clip, small] for clip in clips] + ([clips] if clips else [])


def pixels(encoder: VisionEncoder, grids: list[Grid], seed: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    rows = sum(t * h * w for t, h, w in grids)
    return torch.randn(rows, encoder.spec.patch_width, generator=generator, device="cuda", dtype=torch.bfloat16)


def tensors(embeddings: list) -> list[torch.Tensor]:
    return [t for e in embeddings for t in (e.tokens, e.deepstack) if t is not None]


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compile"])
@pytest.mark.parametrize("family", FAMILIES)
def test_graph_equals_eager_on_the_same_padded_buffers_bitwise(family: str, compiled: bool) -> None:
    with make(family, compile=compiled) as encoder:
        encoder.capture(progress=False)
        for seed, grids in enumerate(batches(encoder) * 2):
            x = pixels(encoder, grids, seed)
            replayed = tensors(encoder.encode_patches(x, grids))
            padded = tensors(encoder.encode_patches(x, grids, mode="padded"))
            assert all(torch.equal(a, b) for a, b in zip(replayed, padded, strict=True))
            assert all(t.isfinite().all() for t in replayed)
        used = encoder.stats
        assert used.graph_replays >= len(batches(encoder)) * 2
        # A budget has a second graph where another backend is installed and faster for long segments.
        assert used.captured_graphs == len(encoder.budgets) + len(encoder.engine.ladder.long)
        assert not used.fallbacks


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_graph_is_as_near_to_fp32_as_exact_size_eager(family: str, dtype: str) -> None:
    wide = VisionEncoder.from_config(family, device="cuda", dtype="float32", config=EncoderConfig(graph=False))
    with make(family, dtype) as encoder:
        for narrow, full in zip(encoder.tower.parameters(), wide.tower.parameters(), strict=True):
            narrow.copy_(full)
            full.copy_(narrow)
        for seed, grids in enumerate(batches(encoder)):
            x = pixels(encoder, grids, seed).to(encoder.dtype)
            want = torch.cat([t.flatten() for t in tensors(wide.encode_patches(x.float(), grids))])
            errors = {}
            for mode in ("auto", "eager"):
                got = torch.cat([t.flatten() for t in tensors(encoder.encode_patches(x, grids, mode=mode))])
                errors[mode] = ((got.float() - want).norm() / want.norm()).item()
            assert errors["auto"] < 0.03
            assert errors["auto"] < 1.3 * errors["eager"] + 1e-3


@pytest.mark.parametrize("attention", ["triton", "varlen"])
@pytest.mark.parametrize("family", FAMILIES)
def test_nan_in_padded_rows_reaches_no_token(family: str, attention: str) -> None:
    with make(family, attention=attention) as encoder:
        grids = batches(encoder)[0]
        x = pixels(encoder, grids, 0)
        clean = tensors(encoder.encode_patches(x, grids))
        encoder.engine.poison_padding()
        poisoned = tensors(encoder.encode_patches(x, grids))
        assert all(torch.equal(a, b) for a, b in zip(clean, poisoned, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_nan_in_one_item_stays_in_it(family: str) -> None:
    with make(family) as encoder:
        grids = batches(encoder)[-1] * 2
        x = pixels(encoder, grids, 0)
        x[: grids[0][0] * grids[0][1] * grids[0][2]] = float("nan")
        out = encoder.encode_patches(x, grids)
        assert out[0].tokens.isnan().any()
        assert all(t.isfinite().all() for t in tensors(out[1:]))
        again = encoder.encode_patches(pixels(encoder, grids, 1), grids)
        assert all(t.isfinite().all() for t in tensors(again))


@pytest.mark.parametrize("family", FAMILIES)
def test_replay_path_never_syncs_with_the_host(family: str) -> None:
    with make(family) as encoder:
        encoder.capture(progress=False)
        work = [(pixels(encoder, grids, i), grids) for i, grids in enumerate(batches(encoder))]
        for x, grids in work:
            encoder.encode_patches(x, grids)
        torch.cuda.set_sync_debug_mode("error")
        try:
            # From the second time on replays are prepared.
            for x, grids in work * 3:
                encoder.encode_patches(x, grids)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("family", [f.name for f in families() if "video" in f.modalities])
def test_a_clip_longer_than_the_captured_limits_is_replayed_in_pieces_or_eager(family: str) -> None:
    unit = make(family, budgets=(1,)).spec.unit
    with make(family, budgets=(max(unit, 2),), max_items=1, max_frames=1) as encoder:
        encoder.capture(progress=False)
        image = image_grids(encoder.spec)[0]
        clip = longest_clip(encoder.spec)
        for seed, grids in enumerate(([image], [clip], [image, clip], [image])):
            x = pixels(encoder, grids, seed)
            got = torch.cat([t.flatten() for t in tensors(encoder.encode_patches(x, grids))]).float()
            want = torch.cat([t.flatten() for t in tensors(encoder.encode_patches(x, grids, mode="eager"))]).float()
            assert ((got - want).norm() / want.norm()).item() < 0.03
        stats = encoder.stats
        assert (stats.split_items, stats.eager_packs) == ((2, 0) if encoder.spec.splits_by_frame else (0, 2))
        assert stats.graph_replays > 0


def test_results_do_not_alias_graph_memory() -> None:
    with make("qwen3_vl") as encoder:
        first = encoder.encode_patches(pixels(encoder, [(1, 8, 8)], 0), [(1, 8, 8)])[0]
        kept = first.tokens.clone(), first.deepstack.clone()
        for seed in range(1, 4):
            encoder.encode_patches(pixels(encoder, [(1, 8, 8)], seed), [(1, 8, 8)])
        assert torch.equal(first.tokens, kept[0])
        assert torch.equal(first.deepstack, kept[1])


def test_host_pixels_equal_device_pixels() -> None:
    with make("qwen3_vl") as encoder:
        grids = [(1, 8, 8), (1, 4, 6)]
        x = pixels(encoder, grids, 0)
        on_device = tensors(encoder.encode_patches(x, grids))
        for _ in range(4):
            on_host = tensors(encoder.encode_patches(x.cpu(), grids))
            assert all(torch.equal(a, b) for a, b in zip(on_device, on_host, strict=True))


def test_threads_and_streams_share_an_encoder() -> None:
    with make("qwen3_vl") as encoder:
        jobs = [(pixels(encoder, grids, i), grids) for i, grids in enumerate(batches(encoder) * 3)]
        want = [tensors(encoder.encode_patches(x, grids)) for x, grids in jobs]
        torch.cuda.synchronize()
        got: dict[int, list[torch.Tensor]] = {}

        def work(start: int) -> None:
            with torch.cuda.stream(torch.cuda.Stream()):
                for i in range(start, len(jobs), 3):
                    got[i] = tensors(encoder.encode_patches(*jobs[i]))
                torch.cuda.current_stream().synchronize()

        threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i, expected in enumerate(want):
            assert all(torch.equal(a, b) for a, b in zip(expected, got[i], strict=True))


def test_lazy_capture_and_memory_limit() -> None:
    with make("qwen3_vl", lazy=True) as encoder:
        encoder.encode_patches(pixels(encoder, [(1, 8, 8)], 0), [(1, 8, 8)])
        assert encoder.stats.captured_graphs == 1
    large = [(1, 20, 24)]
    with make("qwen3_vl", memory_limit=1) as encoder:
        out = encoder.encode_patches(pixels(encoder, large, 0), large)
        assert out[0].tokens.isfinite().all()
        assert encoder.stats.captured_graphs == 1
        assert any("memory limit" in reason for reason in encoder.stats.fallbacks)
    with make("qwen3_vl", memory_limit=1, strict=True) as encoder, pytest.raises(FallbackError, match="memory limit"):
        encoder.encode_patches(pixels(encoder, large, 0), large)


def test_weights_replaced_in_place_are_seen_without_recapture() -> None:
    with make("qwen3_vl") as encoder:
        x, grids = pixels(encoder, [(1, 8, 8)], 0), [(1, 8, 8)]
        before = encoder.encode_patches(x, grids)[0].tokens
        with torch.no_grad():
            encoder.tower.merger.fc2.weight.mul_(2)
        after = encoder.encode_patches(x, grids)[0].tokens
        assert not torch.equal(before, after)
        assert torch.equal(after, encoder.encode_patches(x, grids, mode="padded")[0].tokens)


def test_memory_is_flat_over_many_calls() -> None:
    with make("qwen3_vl") as encoder:
        jobs = [(pixels(encoder, grids, i), grids) for i, grids in enumerate(batches(encoder))]
        # Metadata of a pack that comes again stays on the device.
        for x, grids in jobs * 2:
            encoder.encode_patches(x, grids)
        torch.cuda.synchronize()
        gc.collect()  # what an earlier test left may go at any time
        before = torch.cuda.memory_allocated()
        for _ in range(50):
            for x, grids in jobs:
                encoder.encode_patches(x, grids)
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == before


def test_release_frees_device_memory() -> None:
    make("qwen3_vl").capture(progress=False)  # what the first capture of a process keeps, it keeps
    gc.collect()
    torch.cuda.synchronize()
    encoder = make("qwen3_vl")
    before = torch.cuda.memory_allocated()
    encoder.capture(progress=False)
    assert torch.cuda.memory_allocated() > before
    encoder.release()
    assert torch.cuda.memory_allocated() <= before


COMPILE_SCRIPT = """
import torch
from torch._dynamo.utils import counters, get_compilation_metrics
from vitgraph import EncoderConfig, VisionEncoder
config = EncoderConfig(compile=True, budgets=(64, 160, 320, 640))
with VisionEncoder.from_config("qwen3_vl", device="cuda", config=config) as encoder:
    encoder.capture(progress=False)
kinds = "fxgraph_cache_hit", "fxgraph_cache_miss"
print(*(counters["inductor"][kind] for kind in kinds), counters["stats"]["unique_graphs"])
assert not any(code.restart_reasons for code in get_compilation_metrics()), "traced once"
"""


def test_one_compiled_code_serves_all_budgets_and_a_second_process_reuses_it_from_disk(tmp_path) -> None:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    counts = []
    for _ in range(2):
        run = subprocess.run([sys.executable, "-c", COMPILE_SCRIPT], env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        counts.append([int(n) for n in run.stdout.split()])
    (_, first_misses, first_codes), (hits, misses, codes) = counts
    assert first_codes == codes == 1
    assert first_misses > 0
    assert hits > 0
    assert misses == 0


KERNELS_SCRIPT = """
import torch, triton
from vitgraph import EncoderConfig, Grid, VisionEncoder
names = {True: set(), False: set()}
triton.knobs.runtime.jit_post_compile_hook = lambda *, fn, is_manual_warmup, **_: names[is_manual_warmup].add(fn.name)
config = EncoderConfig(attention="triton", budgets=(64, 88, 160, 320, 640, 1280), lazy=LAZY, lazy_after=1)
with VisionEncoder.from_config("qwen3_vl", device="cuda", config=config) as encoder:
    if not LAZY:
        encoder.capture(progress=False)
    for side in (8, 16, 18, 24, 32):
        x = torch.zeros(side * side, encoder.spec.patch_width, device="cuda")
        encoder.encode_patches(x, [Grid(1, side, side)])
    assert encoder.stats.graph_replays == 5
print(*(",".join(sorted(names[ahead])) for ahead in (True, False)), sep="|")
"""


@pytest.mark.parametrize("lazy", [False, True])
def test_no_kernel_is_left_to_be_compiled_by_its_launch(lazy: bool) -> None:
    script = KERNELS_SCRIPT.replace("LAZY", str(lazy))
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    ahead, late = run.stdout.strip().split("|")
    assert {"_varlen_kernel", "_norm_kernel", "_rotate_kernel", "_pixels_kernel"} <= {*ahead.split(",")}
    assert not late


def test_lazy_after_captures_sizes_that_come_again() -> None:
    with make("qwen3_vl", lazy=True, lazy_after=2) as encoder:
        for graphs in (0, 1, 1):
            encoder.encode_patches(pixels(encoder, [(1, 8, 8)], 0), [(1, 8, 8)])
            assert encoder.stats.captured_graphs == graphs
        assert encoder.stats.waiting == 1
        assert not encoder.stats.fallbacks


def test_host_pixels_that_overlap_a_replay_reach_their_own_items() -> None:
    """Calls follow each other without a synchronisation; each has pixels of its own on the host."""
    with make("qwen3_vl") as encoder:
        grids = [(1, 20, 24), (1, 8, 8)]
        batches = [pixels(encoder, grids, seed).cpu() for seed in range(12)]
        encoder.encode_patches(batches[0], grids)
        queued = [encoder.encode_patches(x.pin_memory() if i % 2 else x, grids) for i, x in enumerate(batches)]
        for x, got in zip(batches, queued, strict=True):
            want = encoder.encode_patches(x.cuda(), grids, mode="padded")
            assert all(torch.equal(g.tokens, w.tokens) for g, w in zip(got, want, strict=True))


def test_batches_in_turn_give_the_same_on_any_stream() -> None:
    with make("qwen2_5_vl") as encoder:
        combinations = [[(1, 8, 8), (1, 4, 12)], [(1, 4, 12), (1, 8, 8)], [(1, 20, 24)], [(1, 8, 8)] * 3]
        inputs = [pixels(encoder, grids, seed) for seed, grids in enumerate(combinations)]
        want = [encoder.encode_patches(x, g, mode="padded") for x, g in zip(inputs, combinations, strict=True)]
        torch.cuda.synchronize()
        for turn in range(6):
            with torch.cuda.stream(torch.cuda.Stream()) if turn % 2 else torch.cuda.stream(torch.cuda.default_stream()):
                for x, grids, expected in zip(inputs, combinations, want, strict=True):
                    got = encoder.encode_patches(x, grids)
                    assert all(torch.equal(g.tokens, w.tokens) for g, w in zip(got, expected, strict=True))


def test_packs_of_one_segment_have_a_graph_of_their_own_where_that_is_faster(monkeypatch, tmp_path) -> None:
    """A second backend that is said to be faster for one segment runs such packs, and no others."""
    from vitgraph.attention.auto import CLASSES, AutoAttention
    from vitgraph.attention.choices import save_times
    from vitgraph.attention.torch_varlen import TorchVarlenAttention
    from vitgraph.attention.triton_varlen import TritonVarlenAttention

    class Versioned(TorchVarlenAttention):
        @staticmethod
        def version() -> str:
            return "0"

    monkeypatch.setenv("VITGRAPH_CACHE", str(tmp_path))
    device = torch.device("cuda", torch.cuda.current_device())
    attention = AutoAttention(TritonVarlenAttention(), [Versioned()], device, torch.bfloat16)
    save_times(attention._key(4, 16), {rows: {"triton": 2.0, "varlen": 1.0} for rows in CLASSES})
    monkeypatch.setattr("vitgraph.encoder.select_attention", lambda *_: attention)
    with make("qwen3_vl") as encoder:
        encoder.capture(progress=False)
        assert encoder.stats.captured_graphs == 2 * len(BUDGETS)
        for seed, grids in enumerate([[(1, 20, 24)], [(1, 8, 8), (1, 4, 4)], [(1, 8, 8)], [(1, 20, 24), (1, 8, 8)]]):
            x = pixels(encoder, grids, seed)
            replayed = tensors(encoder.encode_patches(x, grids))
            padded = tensors(encoder.encode_patches(x, grids, mode="padded"))
            assert all(torch.equal(a, b) for a, b in zip(replayed, padded, strict=True))
            assert all(t.isfinite().all() for t in replayed)


@pytest.mark.parametrize("family", FAMILIES)
def test_prepared_replays_in_any_order_on_any_stream_equal_the_padded_run(family: str) -> None:
    with make(family) as encoder:
        encoder.capture(progress=False)
        work = [(pixels(encoder, grids, seed), grids) for seed, grids in enumerate(batches(encoder))]
        want = [tensors(encoder.encode_patches(x, grids, mode="padded")) for x, grids in work]
        for x, grids in work * 2:
            encoder.encode_patches(x, grids)
        assert len(encoder.engine._prepared) > 0
        torch.cuda.synchronize()
        streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
        got = []
        for turn in range(4 * len(work)):
            # Each batch twice in a row, so that its metadata lies there already, mostly written by another stream.
            index = turn // 2 * 3 % len(work)
            with torch.cuda.stream(streams[turn % 3]):
                got.append((index, tensors(encoder.encode_patches(*work[index]))))
        torch.cuda.synchronize()
        for index, outputs in got:
            assert all(torch.equal(a, b) for a, b in zip(outputs, want[index], strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_several_packs_of_rows_that_lie_apart_equal_the_padded_run(family: str) -> None:
    with make(family) as encoder:
        grids = (image_grids(encoder.spec) + clip_grids(encoder.spec)[:1]) * 2
        while len(encoder.plan(grids)) < 2:
            grids = grids * 2
        assert any(len(pack.stretches) > 1 for pack in encoder.plan(grids))
        bf16 = pixels(encoder, grids, 3)
        misaligned = torch.cat([bf16.new_zeros(1), bf16.flatten()])[1:].view(bf16.shape)
        for x in (bf16, bf16.half(), bf16.float(), misaligned, bf16.double()):
            want = tensors(encoder.encode_patches(x, grids, mode="padded"))
            for _ in range(3):
                got = tensors(encoder.encode_patches(x, grids))
                assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert encoder.stats.host_metadata == 5 * len(encoder.plan(grids)), "of the padded runs alone"
        assert encoder.stats.python_searches == 0


def can_be_read(encoder: VisionEncoder, grids: list[tuple[int, int, int]]) -> bool:
    """Whether graphs can read rows of 16 bits where they lie in a batch of these grids."""
    width = encoder.spec.patch_width
    parts = [pack.stretches for pack in encoder.plan(grids)]
    return width % VECTOR == 0 or all(len(part) == 1 and part[0][0] * width % VECTOR == 0 for part in parts)


@pytest.mark.parametrize("family", FAMILIES)
def test_new_batches_on_the_fast_path_equal_the_padded_run(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[bool] = []
    launch = FastPath.launch

    def watched(self: FastPath, *given) -> object:
        launched = launch(self, *given)
        taken.append(launched is not None)
        return launched

    monkeypatch.setattr(FastPath, "launch", watched)
    choose = random.Random(0)
    with make(family) as encoder:
        encoder.capture(progress=False)
        grids = image_grids(encoder.spec) + clip_grids(encoder.spec)[:1]
        encoder.engine.warm_metadata(grids)
        work = [*map(list, {tuple(choose.choices(grids, k=choose.randint(1, 9))): None for _ in range(8)})]
        several = grids[::-1]
        while len(encoder.plan(several)) < 2:
            several = several * 2
        work = [batch for batch in (*work, several) if all(pack.budget is not None for pack in encoder.plan(batch))]
        rows = [pixels(encoder, batch, seed) for seed, batch in enumerate(work)]
        got = [tensors(encoder.encode_patches(x, batch)) for x, batch in zip(rows, work, strict=True)]
        assert any(len(encoder.plan(batch)) > 1 for batch in work)
        assert len(taken) > 4 and taken == [can_be_read(encoder, batch) for batch in work]
        for own, x, batch in zip(got, rows, work, strict=True):
            want = tensors(encoder.encode_patches(x, batch, mode="padded"))
            assert all(torch.equal(a, b) for a, b in zip(own, want, strict=True))


def test_staging_and_poison_between_prepared_replays_do_not_show() -> None:
    with make("qwen3_vl") as encoder:
        grids = [(1, 8, 8), (1, 4, 6)]
        x = pixels(encoder, grids, 0)
        want = tensors(encoder.encode_patches(x, grids, mode="padded"))
        for turn in range(6):
            if turn % 2:
                encoder.engine.stage(turn % 3, [Grid(1, 4, 4)])
            encoder.engine.poison_padding()
            got = tensors(encoder.encode_patches(x, grids))
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert len(encoder.engine._prepared) == 1


def test_the_fast_handle_of_the_current_stream_is_the_public_one() -> None:
    from vitgraph.engine.order import current_handle

    device = torch.device("cuda", torch.cuda.current_device())
    for stream in (torch.cuda.default_stream(), torch.cuda.Stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            assert current_handle(device) == stream.cuda_stream


@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "pageable"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_on_the_host_may_be_overwritten_when_the_call_returns(
    pinned: bool, dtype: torch.dtype, monkeypatch
) -> None:
    # Several parts for the rows that are staged.
    monkeypatch.setattr("vitgraph.engine.slots.CHUNK_BYTES", 4096)
    with make("qwen3_vl") as encoder:
        grids = [(1, 20, 24), (1, 8, 8), (1, 20, 24)]
        batches = [pixels(encoder, grids, seed).to("cpu", dtype) for seed in range(10)]
        rows = torch.empty_like(batches[0], pin_memory=pinned)
        queued = []
        for x in batches:
            rows.copy_(x)
            queued.append(encoder.encode_patches(rows, grids))
            rows.fill_(float("nan"))
        for x, got in zip(batches, queued, strict=True):
            want = encoder.encode_patches(x.cuda(), grids, mode="padded")
            assert all(torch.equal(g.tokens, w.tokens) for g, w in zip(got, want, strict=True))


def test_rows_from_the_host_and_the_device_mix() -> None:
    with make("qwen3_vl") as encoder:
        grids = [Grid(1, 8, 8), Grid(1, 4, 6), Grid(1, 4, 4)]
        on_device = list(pixels(encoder, grids, 0).split([grid.patches for grid in grids]))
        mixed = [on_device[0].cpu().pin_memory(), on_device[1], on_device[2].cpu()]
        want = encoder.engine.run(on_device, grids, "padded")
        for _ in range(3):
            got = encoder.engine.run(mixed, grids)
            assert all(torch.equal(g[0], w[0]) for g, w in zip(got, want, strict=True))
