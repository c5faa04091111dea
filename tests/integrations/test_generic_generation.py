"""Whole models whose vision module the generic backend runs: generation before and after `vitgraph.accelerate`."""

from __future__ import annotations

import pytest
import torch

import vitgraph
from tiny_generic import NAMES, make, prompts
from tiny_transformers import generate
from vitgraph.config import EncoderConfig

CONFIG = EncoderConfig(max_tokens=64, lazy=True, lazy_after=2)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_generation_is_equal(name: str) -> None:
    model = make(name)
    inputs = prompts(name)
    want = [generate(model, one) for one in inputs]
    vitgraph.accelerate(model, CONFIG, backend="generic")
    assert [generate(model, one) for one in inputs] == want
    (report,) = vitgraph.acceleration(model).modules.values()
    assert report.backend == "generic" and report.copied_bytes == 0
    assert report.calls >= len(inputs) and not report.fallbacks and not report.stats.fallbacks
    vitgraph.restore(model)
    assert [generate(model, one) for one in inputs[:1]] == want[:1]


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_equal_and_depend_on_the_pixels(name: str) -> None:
    model, inputs = make(name), prompts(name)[0]
    with torch.no_grad():
        want = model(**inputs).logits
        changed = model(**{**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}).logits
        vitgraph.accelerate(model, CONFIG)
        got = model(**inputs).logits
    assert vitgraph.acceleration(model).fallbacks == {}
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert (changed - want).abs().max() > 1e-2
