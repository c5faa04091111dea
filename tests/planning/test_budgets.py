"""The default ladder and explicit budgets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitgraph.config import EncoderConfig
from vitgraph.errors import ConfigError
from vitgraph.planning.budgets import FINE_STEP, FINENESS, MIN_STEP, default_ladder, make_budgets


class Rule:
    def __init__(self, unit: int = 1) -> None:
        self.unit = unit

    def capacity(self, tokens: int, max_items: int, max_frames: int) -> dict[str, int]:
        return {"patch": 4 * tokens, "token": tokens, "item": max_items, "segment": max(max_items, max_frames)}


@given(st.integers(1, 20000), st.integers(1, 20000))
def test_ladder_covers_its_range_in_steps_of_a_sixteenth(a: int, b: int) -> None:
    low, high = sorted((a, b))
    ladder = default_ladder(low, high)
    assert ladder[0] - MIN_STEP < low <= ladder[0]
    assert ladder[-1] - MIN_STEP < high <= ladder[-1]
    steps = np.diff(ladder)
    assert all(0 < step <= max(FINE_STEP, rung / FINENESS) for step, rung in zip(steps, ladder, strict=False))
    assert all(step <= FINE_STEP for step, rung in zip(steps, ladder, strict=False) if rung < 2 * FINENESS * FINE_STEP)
    assert all(step >= MIN_STEP for step in steps[:-1])


def test_expected_padding_of_uniform_sizes_is_under_five_percent() -> None:
    config = EncoderConfig()
    ladder = np.array(default_ladder(config.min_tokens, config.max_tokens))
    sizes = np.arange(config.min_tokens, config.max_tokens + 1)
    padded = ladder[np.searchsorted(ladder, sizes)]
    assert 1 - sizes.sum() / padded.sum() < 0.05
    assert np.mean(1 - sizes / padded) < 0.05


@pytest.mark.parametrize("low, high", [(32, 512), (64, 1024), (256, 4096), (1024, 16384)])
def test_expected_padding_holds_for_narrower_ranges(low: int, high: int) -> None:
    ladder = np.array(default_ladder(low, high))
    sizes = np.arange(low, high + 1)
    padded = ladder[np.searchsorted(ladder, sizes)]
    assert np.mean(1 - sizes / padded) < 0.05


@pytest.mark.parametrize("high", [4096, 16384])
def test_sizes_of_square_images_are_rungs_and_large_rungs_do_not_crowd(high: int) -> None:
    ladder = default_ladder(32, high)
    assert {32, 64, 128, 256, 512, 1024, 2048, 4096, high} <= {*ladder}
    for power in (1024, 2048, 4096, 8192):
        if power < high:
            assert sum(power <= rung < 2 * power for rung in ladder) == FINENESS


def test_explicit_budgets_are_sorted_and_rounded_to_the_unit() -> None:
    budgets = make_budgets(Rule(unit=256), EncoderConfig(budgets=(512, 100, 300, 300)))
    assert [b.tokens for b in budgets] == [256, 512]


def test_limits_override_the_defaults() -> None:
    (budget,) = make_budgets(Rule(), EncoderConfig(budgets=(640,), max_items=3, max_frames=5))
    assert budget.capacity == {"patch": 2560, "token": 640, "item": 3, "segment": 5}
    (default,) = make_budgets(Rule(), EncoderConfig(budgets=(640,)))
    assert default.capacity["item"] == 40


@pytest.mark.parametrize(
    "settings",
    [
        {"budgets": (0,)},
        {"budgets": (-5, 3)},
        {"budgets": (1.5,)},
        {"budgets": 7},
        {"min_tokens": 0},
        {"max_items": 0},
        {"max_frames": -1},
        {"min_tokens": 100, "max_tokens": 50},
        {"attention": "magic"},
        {"memory_limit": 0},
    ],
)
def test_impossible_settings_are_refused_with_the_remedy(settings: dict) -> None:
    with pytest.raises(ConfigError, match=r"positive|list of|larger than|known"):
        EncoderConfig(**settings)


def test_vllm_style_names_are_accepted() -> None:
    config = EncoderConfig.from_dict(
        {
            "cudagraph_mm_encoder": True,
            "compile_mm_encoder": True,
            "encoder_cudagraph_token_budgets": [512, 128],
            "encoder_cudagraph_max_vision_items_per_batch": 8,
            "encoder_cudagraph_max_frames_per_batch": 16,
            "encoder_cudagraph_verbose": True,
        }
    )
    assert config == EncoderConfig(
        graph=True, compile=True, budgets=(128, 512), max_items=8, max_frames=16, verbose=True
    )
    with pytest.raises(ConfigError, match=r"unknown setting 'cudagraph'.*known: .*budgets"):
        EncoderConfig.from_dict({"cudagraph": True})
    with pytest.raises(ConfigError, match="twice"):
        EncoderConfig.from_dict({"graph": True, "cudagraph_mm_encoder": False})
