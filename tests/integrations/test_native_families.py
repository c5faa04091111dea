"""Every native family: a Transformers model before and after `vitgraph.accelerate`.

Tokens of greedy generation are equal. Tensors in fp32 differ by rounding alone: relative error below 1e-5.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import vitgraph
from tiny_transformers import CLIPS, IMAGES, MODELS, NAMES, generate, pixels, prompt, tower_inputs, vision_module
from vitgraph import EncoderConfig
from vitgraph.integrations.transformers.native_families import NATIVE, native_family

CONFIG = EncoderConfig(max_tokens=64)
BOUND = 1e-5


def error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape and got.dtype == want.dtype
    return ((got - want).norm() / want.norm()).item()


def tensors(output: object) -> list[Tensor]:
    """All tensors of an output, in order, whatever they are nested in."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [] if output is None else [tensor for value in values for tensor in tensors(value)]


def same(got: object, want: object) -> None:
    """The same classes and fields, and tensors equal within rounding."""
    assert type(got) is type(want)
    if isinstance(want, dict):
        assert list(got) == list(want)
        for name in want:
            same(got[name], want[name])
    elif isinstance(want, (list, tuple)):
        for a, b in zip(got, want, strict=True):
            same(a, b)
    elif isinstance(want, Tensor):
        assert error(got, want) < BOUND
        assert not got.requires_grad


def grids_of(name: str) -> list[tuple[int, int, int]]:
    """What the reference takes in one direct call: GLM's position table takes one frame per grid, Kimi's mean over
    frames clips of one length."""
    if name.startswith("glm4v"):
        return list(IMAGES)
    return list(CLIPS) if name == "kimi_k25" else [*IMAGES, *CLIPS]


def prompts(name: str) -> list[dict[str, Tensor]]:
    made = [prompt(name, IMAGES)]
    if MODELS[name].video:
        made.append(prompt(name, clips=CLIPS))
    if MODELS[name].video not in ("", "alone"):
        made.append(prompt(name, IMAGES[:2], CLIPS))
    return made


@pytest.fixture(scope="module", params=NAMES)
def tiny(request) -> tuple[str, nn.Module]:
    return request.param, MODELS[request.param].make()


@pytest.fixture
def case(tiny):
    yield tiny
    vitgraph.restore(tiny[1])


def test_every_row_of_the_table_has_a_tiny_model() -> None:
    assert {row.name for row in NATIVE} == {type(vision_module(m.make())).__name__ for m in MODELS.values()}


def test_greedy_generation_is_equal(case) -> None:
    name, model = case
    inputs = prompts(name)
    want = [generate(model, one) for one in inputs]
    vitgraph.accelerate(model, CONFIG, backend="native")
    assert [generate(model, one) for one in inputs] == want
    (report,) = vitgraph.acceleration(model).modules.values()
    assert report.calls >= len(inputs) and not report.fallbacks and not report.stats.fallbacks


def test_logits_are_equal_and_depend_on_the_pixels(case) -> None:
    name, model = case
    inputs = prompt(name, IMAGES)
    other = {**inputs, "pixel_values": pixels(name, IMAGES, seed=7)}
    with torch.no_grad():
        want, changed = (model(**one).logits for one in (inputs, other))
        vitgraph.accelerate(model, CONFIG)
        assert error(model(**inputs).logits, want) < BOUND
    assert error(changed, want) > 1e-3


@pytest.mark.parametrize("asks", ["class", "tuple", "tuple by config"])
def test_the_tower_returns_the_same_classes_and_fields(case, asks: str, monkeypatch) -> None:
    name, model = case
    tower, flags = vision_module(model), {"return_dict": False} if asks == "tuple" else {}
    if asks == "tuple by config":
        for config in {id(m.config): m.config for m in tower.modules() if hasattr(m, "config")}.values():
            monkeypatch.setattr(config, "return_dict", False)
    for grids in (grids_of(name), IMAGES[:1]):
        inputs = tower_inputs(name, grids)
        with torch.no_grad():
            want = tower(**inputs, **flags)
            vitgraph.accelerate(model, CONFIG)
            for _ in range(2):
                same(tower(**inputs, **flags), want)
        assert isinstance(want, tuple) is (asks != "class")
        assert vitgraph.acceleration(model).fallbacks == {}
        vitgraph.restore(model)


def test_image_and_video_features_are_the_same(case) -> None:
    name, model = case
    calls = [(model.get_image_features, "pixel_values", "image_grid_thw", prompt(name, IMAGES))]
    if MODELS[name].video:
        calls.append((model.get_video_features, "pixel_values_videos", "video_grid_thw", prompt(name, clips=CLIPS)))
    for get, rows, grids, inputs in calls:
        arguments = [inputs[key] for key in (rows, grids) if key in inputs]
        with torch.no_grad():
            want = get(*arguments)
            vitgraph.accelerate(model, CONFIG)
            same(get(*arguments), want)
        assert not vitgraph.acceleration(model).fallbacks
        vitgraph.restore(model)


def test_a_batch_larger_than_the_largest_budget(case) -> None:
    name, model = case
    grids = [*IMAGES * 9, (1, 12, 24)]
    tower, inputs = vision_module(model), tower_inputs(name, grids)
    with torch.no_grad():
        want = tower(**inputs)
        vitgraph.accelerate(model, EncoderConfig(budgets=(16, 32)))
        same(tower(**inputs), want)
    (report,) = vitgraph.acceleration(model).modules.values()
    assert report.calls == 1 and report.stats.packs > 2
    assert (report.stats.eager_packs > 0) == (name != "internvl")


def test_a_call_without_images_is_the_modules_own_affair(case) -> None:
    name, model = case
    inputs = {key: value[:0] for key, value in tower_inputs(name, IMAGES).items()}
    tower = vision_module(model)

    def outcome() -> object:
        with torch.no_grad():
            try:
                return tower(**inputs)
            except (RuntimeError, ValueError, IndexError) as error:
                return str(error)

    want = outcome()
    vitgraph.accelerate(model, CONFIG)
    got = outcome()
    assert type(got) is type(want)
    assert got == want if isinstance(want, str) else all(t.shape[0] == 0 for t in tensors(got))
    assert vitgraph.acceleration(model).fallbacks == {"there is no image": 1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_fp32_as_the_reference(case, dtype: torch.dtype) -> None:
    name, _ = case
    model = MODELS[name].make(dtype=dtype)
    wide, narrow = vision_module(MODELS[name].make()), vision_module(model)
    wide.load_state_dict(narrow.state_dict())
    inputs = tower_inputs(name, IMAGES)
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    with torch.no_grad():
        exact = wide(**{k: v.float() if v.is_floating_point() else v for k, v in inputs.items()})
        reference = narrow(**inputs)
        vitgraph.accelerate(model, CONFIG)
        fast = narrow(**inputs)
    for a, b, c in zip(tensors(fast), tensors(reference), tensors(exact), strict=True):
        assert a.dtype == dtype
        assert error(a.float(), c) < 1.5 * error(b.float(), c) + 1e-4


def test_a_subclass_is_not_taken_for_the_class(case) -> None:
    tower = vision_module(case[1])
    plain = type(tower)
    assert native_family(tower) is not None
    try:
        tower.__class__ = type(plain.__name__, (plain,), {"__module__": "elsewhere"})
        assert native_family(tower) is None
    finally:
        tower.__class__ = plain
