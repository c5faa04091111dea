"""Models that Hugging Face's accelerate has placed or offloaded. Its hooks replace forwards on the instance, too."""

from __future__ import annotations

import accelerate
import pytest
import torch
from torch import nn

import vitgraph
from tiny_transformers import IMAGES, MODELS, generate, prompt, vision_module
from vitgraph import EncoderConfig

CONFIG = EncoderConfig(max_tokens=64)
INPUTS = prompt("qwen3_vl", IMAGES)
PARTS = ("", "model.visual", "model.language_model", "lm_head")


@pytest.fixture
def model() -> nn.Module:
    return MODELS["qwen3_vl"].make()


@pytest.fixture
def want(model: nn.Module) -> list[int]:
    return generate(model, INPUTS)


def place(model: nn.Module) -> None:
    """As `device_map` over several devices does it: hooks on every part, and on the modules inside of it."""
    from accelerate.hooks import attach_align_device_hook_on_blocks

    attach_align_device_hook_on_blocks(model, dict.fromkeys(PARTS, "cpu"), dict.fromkeys(PARTS, False))


def test_a_placed_model_is_accelerated_and_restored(model: nn.Module, want: list[int]) -> None:
    place(model)
    tower = vision_module(model)
    assert sum("forward" in module.__dict__ for module in tower.modules()) > 10
    before, forward = set(tower.__dict__), tower.forward
    vitgraph.accelerate(model, CONFIG)
    assert generate(model, INPUTS) == want
    report = vitgraph.acceleration(model).modules["model.visual"]
    assert (report.backend, report.calls, report.fallbacks) == ("native", 1, {})
    vitgraph.restore(model)
    assert set(tower.__dict__) == before and tower.forward is forward
    assert generate(model, INPUTS) == want


def test_a_model_that_is_placed_later_stays_accelerated_and_is_restored(model: nn.Module, want: list[int]) -> None:
    vitgraph.accelerate(model, CONFIG)
    place(model)
    assert generate(model, INPUTS) == want
    report = vitgraph.acceleration(model).modules["model.visual"]
    assert (report.calls, report.fallbacks) == (1, {})
    vitgraph.restore(model)
    assert vitgraph.acceleration(model).modules == {}
    assert generate(model, INPUTS) == want


def test_an_offloaded_model_is_left_as_it_is(model: nn.Module, want: list[int]) -> None:
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    vitgraph.accelerate(model, CONFIG)
    assert generate(model, INPUTS) == want
    report = vitgraph.acceleration(model).modules["model.visual"]
    assert (report.class_name, report.backend) == ("Qwen3VLVisionModel", "")
    assert "meta device: not loaded, or offloaded" in report.reason


def test_a_model_that_is_offloaded_later_falls_back(model: nn.Module, want: list[int]) -> None:
    vitgraph.accelerate(model, CONFIG)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert generate(model, INPUTS) == want
    ((reason, times),) = vitgraph.acceleration(model).fallbacks.items()
    assert ("meta device" in reason or "offloads" in reason) and times == 1
    vitgraph.restore(model)
    assert generate(model, INPUTS) == want


def test_a_tower_in_two_places_is_left_as_it_is(model: nn.Module) -> None:
    vision_module(model).merger.to("meta")
    vitgraph.accelerate(model, CONFIG)
    assert "meta device" in vitgraph.acceleration(model).modules["model.visual"].reason
