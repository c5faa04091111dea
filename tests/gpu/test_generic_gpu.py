"""On a GPU: vision modules of Transformers in graphs of their own forward, bf16."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tiny_generic
import vitgraph
from greedy import assert_tokens_follow, moved
from tiny_transformers import generate
from vision_modules import GRID_CASES, TILE_CASES, Case, tensors_of
from vitgraph.config import EncoderConfig
from vitgraph.core import Grid
from vitgraph.errors import UnsupportedModuleError
from vitgraph.integrations.transformers.generic import GenericBackend, generic_backend
from vitgraph.integrations.transformers.handle import ModuleReport

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CONFIG = EncoderConfig(budgets=(20, 70, 400), max_items=16, max_frames=32, lazy=True, measure=False)
PICTURE_CONFIG = EncoderConfig(max_tokens=64, lazy=True, measure=False)
CASES = [*GRID_CASES, *TILE_CASES]
CLIP, PIXIO = (next(case for case in TILE_CASES if case.folder == name) for name in ("clip", "pixio"))
PADDLE = next(case for case in GRID_CASES if case.folder == "paddleocr_vl")
ERROR = 3e-2
ROOM = 1 << 20
"""Bytes that the allocator may hold more or less between two looks at it."""


def build(case: Case, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.nn.Module, GenericBackend]:
    try:
        module = case.build().to("cuda", dtype)
    except ImportError as error:
        pytest.skip(str(error))
    backend = generic_backend(module, CONFIG if case.grids else PICTURE_CONFIG)
    assert isinstance(backend, GenericBackend)
    return module, backend


def on_device(case: Case, module: torch.nn.Module, seed: int = 0) -> dict[str, Any]:
    """Rows on the device in the module's type, sizes on the host."""
    given = case.arguments(module, seed)
    dtype = next(module.parameters()).dtype
    return {
        k: v if k == "grid_thw" else v.to("cuda", dtype if v.is_floating_point() else v.dtype) for k, v in given.items()
    }


def run(backend: GenericBackend, arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    assert backend.refuse(arguments) == ""
    return tensors_of(backend.run(arguments))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_replays_equal_the_modules_own_forward(case: Case) -> None:
    module, backend = build(case)
    for seed in range(3):
        arguments = on_device(case, module, seed)
        found = run(backend, arguments)
        with torch.no_grad():
            own = module(**{k: v.to("cuda") for k, v in arguments.items()})
        expected = tensors_of(own)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            error = (found[name].float() - tensor.float()).norm() / tensor.float().norm()
            assert error < ERROR, (name, float(error))
        for engine in backend.engines:
            engine.poison_padding()
    assert backend.stats.graph_replays >= 3 and backend.stats.captured_graphs and not backend.stats.fallbacks
    backend.release()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_replay_equals_the_same_padded_forward_bitwise(case: Case) -> None:
    module, backend = build(case)
    arguments = on_device(case, module)
    run(backend, arguments)
    engine = backend.engines[-1]
    pixels = next(iter(arguments.values())).flatten(0, 1 if case.batched else 0)
    rows = pixels.reshape(len(pixels), -1)
    grids = [Grid(*grid) for grid in case.grids] or [Grid(len(rows), 1, 1)]
    parts = list(rows.split([grid.patches for grid in grids]))
    replayed, padded = engine.run(parts, grids), engine.run(parts, grids, "padded")
    for one, other in zip(replayed, padded, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    backend.release()


@pytest.mark.parametrize("case", [GRID_CASES[0], GRID_CASES[2], TILE_CASES[5]], ids=str)
def test_a_replay_does_not_wait_for_the_device(case: Case) -> None:
    module, backend = build(case)
    arguments = on_device(case, module)
    run(backend, arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(backend, arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    backend.release()


@pytest.mark.parametrize("case", [GRID_CASES[0], TILE_CASES[5]], ids=str)
def test_weights_that_move_bring_new_graphs(case: Case) -> None:
    module, backend = build(case)
    arguments = on_device(case, module)
    before = run(backend, arguments)
    for parameter in module.parameters():
        parameter.data = parameter.data * 2
    after = run(backend, arguments)
    with torch.no_grad():
        own = tensors_of(module(**{k: v.to("cuda") for k, v in arguments.items()}))
    for name, tensor in own.items():
        assert (after[name].float() - tensor.float()).norm() / tensor.float().norm() < ERROR
        assert not torch.equal(after[name], before[name])
    backend.release()


def test_grids_on_the_device_are_read_back_as_the_module_does() -> None:
    module, backend = build(GRID_CASES[0])
    arguments = on_device(GRID_CASES[0], module)
    host = run(backend, arguments)
    device = run(backend, {k: v.to("cuda") for k, v in arguments.items()})
    assert all(torch.equal(host[name], device[name]) for name in host)
    backend.release()


@pytest.mark.parametrize(
    "breaking", [lambda x: x.sum().item(), lambda x: torch.tensor([1.0, 2.0]).to(x.device)], ids=["reads", "copies"]
)
def test_a_capture_that_fails_is_counted_and_leaves_the_process_as_it_was(
    breaking: Callable[[torch.Tensor], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What breaks runs in a capture alone, where nothing could have found it before."""
    module = CLIP.build().to("cuda", torch.bfloat16)
    embeddings = next(m for m in module.modules() if type(m).__name__ == "CLIPVisionEmbeddings")
    forward = type(embeddings).forward

    def broken(self: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        made = forward(self, *args, **kwargs)
        if torch.cuda.is_current_stream_capturing():
            breaking(made)
        return made

    monkeypatch.setattr(type(embeddings), "forward", broken)
    arguments = on_device(CLIP, module)
    with torch.no_grad():
        own = tensors_of(module(**arguments))
        vitgraph.accelerate(module, PICTURE_CONFIG)
        for _ in range(3):
            found = tensors_of(module(**arguments))
            assert all(torch.equal(found[name], tensor) for name, tensor in own.items())
    (report,) = vitgraph.acceleration(module).modules.values()
    ((reason, times),) = report.fallbacks.items()
    assert (report.calls, times) == (0, 3) and "its capture fails in <lambda>" in reason, reason
    with pytest.raises(UnsupportedModuleError, match="its capture fails in <lambda>"):
        vitgraph.acceleration(module).capture(progress=False)
    monkeypatch.undo()
    torch.rand(8, device="cuda").sum().item()  # a capture that never ended would hold the generator
    other, backend = build(CLIP)
    run(backend, on_device(CLIP, other))
    assert backend.stats.graph_replays == backend.stats.packs > 0
    backend.release()


def test_a_graph_holds_the_attention_of_the_modules_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers makes masks that say nothing when it notices a capture; they cost the fastest kernels."""
    module, backend = build(PIXIO)
    masks = []
    attention = nn.functional.scaled_dot_product_attention

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        masks.append(kwargs.get("attn_mask"))
        return attention(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watched)
    run(backend, on_device(PIXIO, module))
    assert backend.stats.captured_graphs and masks and not any(mask is not None for mask in masks)
    backend.release()


# -- whole models ----------------------------------------------------------------------------------------------


MODEL_CONFIG = EncoderConfig(budgets=(8, 16, 32, 64, 128), lazy=True, lazy_after=2, measure=False)


def accelerate(model: nn.Module) -> nn.Module:
    return vitgraph.accelerate(model, MODEL_CONFIG, backend="generic")


def report_of(model: nn.Module) -> ModuleReport:
    (report,) = vitgraph.acceleration(model).modules.values()
    return report


@pytest.mark.parametrize("name", tiny_generic.NAMES)
def test_fp32_generation_is_equal_token_by_token(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Convolutions would round to TF32, and otherwise at other sizes.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = tiny_generic.make(name).cuda()
    inputs = [moved(one, model) for one in tiny_generic.prompts(name)]
    want = [generate(model, one) for one in inputs]
    accelerate(model)
    for _ in range(3):
        assert [generate(model, one) for one in inputs] == want
    report = report_of(model)
    assert report.stats.graph_replays > 0 and not report.fallbacks and not report.stats.fallbacks


@pytest.mark.parametrize("name", tiny_generic.NAMES)
def test_bf16_generation_follows_the_same_tokens(name: str) -> None:
    """Equal up to the first position at which the best logits lie within rounding."""
    model, wide = tiny_generic.make(name, torch.bfloat16).cuda(), tiny_generic.make(name).cuda()
    wide.load_state_dict(model.state_dict())
    assert_tokens_follow(model, wide, tiny_generic.prompts(name), accelerate)
    report = report_of(model)
    assert report.stats.graph_replays > 0 and not report.fallbacks and not report.stats.fallbacks


def random_call(case: Case, source: random.Random) -> dict[str, Any]:
    """Images and clips of any size, or any number of pictures, on the device."""
    if not case.grids:
        return {"pixel_values": torch.randn(source.randint(1, 12), 3, 56, 56, device="cuda", dtype=torch.bfloat16)}
    grids = [
        (source.choice((1, 1, 2)), 4 * source.randint(1, 4), 4 * source.randint(1, 4))
        for _ in range(source.randint(1, 4))
    ]
    rows = sum(t * h * w for t, h, w in grids)
    pixels = torch.randn(rows, *case.row, device="cuda", dtype=torch.bfloat16)
    return {"pixel_values": pixels.unsqueeze(0) if case.batched else pixels, "grid_thw": torch.tensor(grids)}


@pytest.mark.parametrize("case", [PADDLE, CLIP], ids=str)
def test_a_thousand_calls_hold_no_more_memory_and_capture_nothing_anew(case: Case) -> None:
    config = EncoderConfig(budgets=(64, 256, 1024), lazy=True, measure=False)
    module = vitgraph.accelerate(case.build().to("cuda", torch.bfloat16), config, backend="generic")
    source, held = random.Random(0), 0
    with torch.no_grad():
        vitgraph.acceleration(module).capture(progress=False)
        complete = report_of(module).stats
        assert complete.captured_graphs > 0

        def others() -> int:
            """Bytes beside static buffers."""
            torch.cuda.synchronize()
            gc.collect()
            return torch.cuda.memory_allocated() - report_of(module).stats.static_bytes

        for call in range(1000):
            module(**random_call(case, source))
            if call == 100:
                held = others()
    assert abs(others() - held) < ROOM
    report = report_of(module)
    assert (report.stats.captured_graphs, report.stats.graph_bytes) == (complete.captured_graphs, complete.graph_bytes)
    assert report.stats.graph_replays >= 1000 and report.calls == 1000 and not report.fallbacks
