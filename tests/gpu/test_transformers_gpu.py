"""On a GPU: Transformers models before and after `vitgraph.accelerate`, with graphs."""

from __future__ import annotations

import gc
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import vitgraph
from greedy import assert_tokens_follow, logits_of
from tiny_transformers import CLIPS, IMAGES, MODELS, NAMES, Grids, generate, prompt, tower_inputs, vision_module
from vitgraph import EncoderConfig
from vitgraph.integrations.transformers.handle import ModuleReport

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CONFIG = EncoderConfig(budgets=(8, 16, 32, 64, 128), lazy=True, lazy_after=2)
ROOM = 1 << 20
"""Bytes that the allocator may hold more or less between two looks at it."""


def on_gpu(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: v.to("cuda", dtype if v.is_floating_point() else None) for k, v in inputs.items()}


def make(name: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    return MODELS[name].make(dtype=dtype).cuda()


def report_of(model: nn.Module) -> ModuleReport:
    (report,) = vitgraph.acceleration(model).modules.values()
    return report


def features(output: object) -> Tensor:
    pooled = output.pooler_output if output.pooler_output is not None else output.last_hidden_state
    return pooled.float()


def error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape and got.isfinite().all()
    return ((got - want).norm() / want.norm()).item()


def prompts(name: str) -> list[dict[str, Tensor]]:
    made = [prompt(name, IMAGES), prompt(name, IMAGES[:1])]
    return [*made, prompt(name, clips=CLIPS)] if MODELS[name].video else made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_features_are_as_near_to_fp32_as_the_modules_own(name: str, dtype: torch.dtype) -> None:
    model, wide = make(name, dtype), make(name, torch.float32)
    wide.load_state_dict(model.state_dict())
    tower, exact = vision_module(model), vision_module(wide)
    grids = list(CLIPS) if name == "kimi_k25" else IMAGES
    inputs = on_gpu(tower_inputs(name, grids), dtype)
    with torch.no_grad():
        want = features(exact(**{k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}))
        own = error(features(tower(**inputs)), want)
        vitgraph.accelerate(model, CONFIG, backend="native")
        runs = [features(tower(**inputs)) for _ in range(4)]
    report = report_of(model)
    assert not report.fallbacks and report.stats.captured_graphs >= 1 and report.stats.graph_replays >= 1
    # The call that waited, the one that captured and those that replayed.
    assert all(error(run, want) < 1.5 * own + 1e-3 for run in runs)


@pytest.mark.parametrize("name", NAMES)
def test_bf16_logits_are_as_near_to_fp32_as_the_models_own(name: str) -> None:
    """Of whole prompts, all positions together: what bf16 does to one logit of a tiny random model is up to chance."""
    model, wide = make(name), make(name, torch.float32)
    wide.load_state_dict(model.state_dict())
    given = prompts(name)
    want = logits_of(wide, given)
    own = error(logits_of(model, given), want)
    vitgraph.accelerate(model, CONFIG, backend="native")
    found = [error(logits_of(model, given), want) for _ in range(3)]
    report = report_of(model)
    assert report.stats.graph_replays > 0 and not report.fallbacks
    assert max(found) < 1.5 * own + 1e-3, (found, own)


@pytest.mark.parametrize("name", NAMES)
def test_bf16_generation_follows_the_same_tokens(name: str) -> None:
    """Equal up to the first position at which the best logits lie within rounding."""
    model, wide = make(name), make(name, torch.float32)
    wide.load_state_dict(model.state_dict())
    assert_tokens_follow(model, wide, prompts(name), lambda m: vitgraph.accelerate(m, CONFIG, backend="native"))
    report = report_of(model)
    assert report.stats.graph_replays > 0 and not report.fallbacks


def check_tokens_stay(model: torch.nn.Module, name: str) -> tuple[list[dict[str, Tensor]], list]:
    """Accelerates a float32 model, whose greedy tokens stay what they are; its inputs, and those tokens."""
    inputs = [on_gpu(one, torch.float32) for one in prompts(name)]
    want = [generate(model, one) for one in inputs]
    vitgraph.accelerate(model, CONFIG, backend="native")
    for _ in range(3):
        assert [generate(model, one) for one in inputs] == want
    report = report_of(model)
    assert report.stats.graph_replays > 0 and not report.fallbacks
    return inputs, want


@pytest.mark.parametrize("name", NAMES)
def test_fp32_generation_is_equal_token_by_token(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The module's convolutions would round to TF32, which the tower's products do not.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    check_tokens_stay(make(name, torch.float32), name)


def random_grids(name: str, source: random.Random) -> Grids:
    if name == "internvl":
        return [(1, 4, 4)] * source.randint(1, 12)
    return [
        (source.choice((1, 1, 2)), 2 * source.randint(1, 8), 2 * source.randint(1, 8))
        for _ in range(source.randint(1, 4))
    ]


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl", "internvl"])
def test_a_thousand_calls_hold_no_more_memory_and_capture_nothing_anew(name: str) -> None:
    model = vitgraph.accelerate(make(name), CONFIG, backend="native")
    tower, source = vision_module(model), random.Random(0)
    with torch.no_grad():
        vitgraph.acceleration(model).capture(progress=False)
        complete = report_of(model).stats
        assert complete.captured_graphs == len(tower.forward.backend._engine.budgets)
        held = 0

        def others() -> int:
            """Bytes beside static buffers."""
            torch.cuda.synchronize()
            gc.collect()
            return torch.cuda.memory_allocated() - report_of(model).stats.static_bytes

        for call in range(1000):
            features(tower(**on_gpu(tower_inputs(name, random_grids(name, source)), torch.bfloat16)))
            if call == 100:
                held = others()
    assert abs(others() - held) < ROOM
    stats = report_of(model).stats
    assert (stats.captured_graphs, stats.capture_seconds) == (complete.captured_graphs, complete.capture_seconds)
    assert stats.graph_bytes == complete.graph_bytes
    assert stats.static_bytes == complete.static_bytes
    assert report_of(model).calls == 1000 and not report_of(model).fallbacks


def test_restore_gives_the_memory_back() -> None:
    model = make("internvl")
    inputs = on_gpu(tower_inputs("internvl", IMAGES), torch.bfloat16)
    with torch.no_grad():
        vision_module(model)(**inputs)
        gc.collect()
        before = torch.cuda.memory_allocated()
        vitgraph.accelerate(model, CONFIG)
        vitgraph.acceleration(model).capture(progress=False)
        vision_module(model)(**inputs)
    assert report_of(model).copied_bytes > 0
    assert torch.cuda.memory_allocated() > before + report_of(model).copied_bytes
    vitgraph.restore(model)
    gc.collect()
    assert abs(torch.cuda.memory_allocated() - before) < ROOM


@pytest.mark.parametrize("name", ["qwen3_vl", "internvl"])
def test_graphs_see_weights_that_change_in_place(name: str) -> None:
    model, other = make(name), MODELS[name].make(seed=1, dtype=torch.bfloat16).cuda()
    tower, inputs = vision_module(model), on_gpu(tower_inputs(name, IMAGES), torch.bfloat16)
    vitgraph.accelerate(model, CONFIG)
    with torch.no_grad():
        first = [features(tower(**inputs)) for _ in range(3)][-1]
        captured = report_of(model).stats.captured_graphs
        tower.load_state_dict(vision_module(other).state_dict())
        second, want = features(tower(**inputs)), features(vision_module(other)(**inputs))
    assert report_of(model).stats.captured_graphs == captured > 0
    assert error(second, want) < 0.05 < error(first, want)


def test_a_model_that_moves_gets_new_graphs() -> None:
    model = vitgraph.accelerate(make("qwen3_vl"), CONFIG)
    tower, inputs = vision_module(model), on_gpu(tower_inputs("qwen3_vl", IMAGES), torch.bfloat16)
    with torch.no_grad():
        want = [features(tower(**inputs)) for _ in range(3)][-1]
        model.cpu()
        model.cuda()
        again = [features(tower(**inputs)) for _ in range(3)][-1]
    assert error(again, want) < 0.02
    assert report_of(model).stats.captured_graphs > 0 and not report_of(model).fallbacks


def test_inside_a_callers_capture_the_own_forward_runs() -> None:
    model = make("qwen3_vl")
    tower = vision_module(model)
    inputs = on_gpu(tower_inputs("qwen3_vl", IMAGES), torch.bfloat16)
    vitgraph.accelerate(model, CONFIG)
    forward = tower.forward
    seen = []
    forward.original = lambda **arguments: seen.append(arguments) or torch.zeros(1, device="cuda")
    side = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(side), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=side):
        tower(**inputs)
    assert len(seen) == 1
    assert list(vitgraph.acceleration(model).fallbacks) == ["the caller captures a CUDA graph"]


PARTS = ("", "model.visual", "model.language_model", "lm_head")


@pytest.mark.parametrize("hooks", [False, True], ids=["device_map", "device_map with hooks"])
def test_a_model_that_device_map_places_is_accelerated(hooks: bool, tmp_path: Path, monkeypatch) -> None:
    """Hugging Face's accelerate places a model on one device as it is, and on several with hooks on its parts."""
    pytest.importorskip("accelerate")
    from accelerate.hooks import attach_align_device_hook_on_blocks

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    made = MODELS["qwen3_vl"].make()
    made.save_pretrained(tmp_path)
    model = type(made).from_pretrained(tmp_path, dtype=torch.float32, device_map="cuda").eval()
    assert next(vision_module(model).parameters()).is_cuda
    if hooks:
        attach_align_device_hook_on_blocks(model, dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, False))
    inputs, want = check_tokens_stay(model, "qwen3_vl")
    vitgraph.restore(model)
    assert [generate(model, one) for one in inputs] == want


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_tower_on_another_device_than_the_current_one() -> None:
    model = MODELS["qwen3_vl"].make(dtype=torch.bfloat16).to("cuda:1")
    tower = vision_module(model)
    inputs = {k: v.to("cuda:1") for k, v in on_gpu(tower_inputs("qwen3_vl", IMAGES), torch.bfloat16).items()}
    with torch.no_grad():
        want = features(tower(**inputs))
        vitgraph.accelerate(model, CONFIG)
        for _ in range(3):
            got = features(tower(**inputs))
            assert got.device == torch.device("cuda:1") and error(got, want) < 0.02
    assert report_of(model).stats.captured_graphs > 0
