"""On a GPU: the cost model is made in time and predicts what plans take."""

from __future__ import annotations

import importlib
import os
import statistics
from pathlib import Path
from types import ModuleType

import pytest
import torch

from vitgraph import EncoderConfig, VisionEncoder
from vitgraph.bench.geometries import geometry
from vitgraph.core import Grid

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="timings need the GPU for themselves"),
]

MOST_SECONDS = 2.0
TOLERANCE = 0.05
CLOCK = 0.03
"""All plans together may differ from the model by so much more, for a GPU's clock is not the same in every minute."""
RUNS = 3
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def encoder():
    with VisionEncoder.from_config(geometry("qwen3-vl-8b"), device="cuda", config=EncoderConfig()) as made:
        made.capture(progress=False)
        yield made


@pytest.fixture(scope="module")
def plans():
    """The benchmark of what is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("plans")


def test_timing_the_default_ladder_takes_less_than_two_seconds(encoder: VisionEncoder) -> None:
    cost = encoder.engine.planner.cost
    assert cost.unit == "us"
    assert encoder.stats.measure_seconds < MOST_SECONDS
    assert sum(cost.measured) >= 20


def test_plans_take_what_the_model_predicts(encoder: VisionEncoder, plans: ModuleType) -> None:
    """From rest, as the model is measured; under load a GPU lowers its clock, by up to an eighth."""
    planner, batches = encoder.engine.planner, plans.random_batches()[:24]
    chosen = [planner.plan(grids, eager=False) for grids in batches]
    taken = [
        statistics.median(plans.replays_us(encoder, plan, plans.REST_SECONDS) for _ in range(RUNS)) for plan in chosen
    ]
    found = plans.beside(taken, list(map(planner.predicted, chosen)))
    assert abs(found["clock"] - 1) < CLOCK
    sides = [str([grid.h for grid in grids]) for grids in batches]
    off = {own: share for own, share in zip(sides, found["shares"], strict=True) if abs(share) > TOLERANCE}
    assert not off, f"sides: off by {off}"


def test_a_choice_of_eager_is_right(encoder: VisionEncoder, plans: ModuleType) -> None:
    """Where the plan leaves the graph, the call is not slower than with the graph."""
    from vitgraph.bench.timing import time_call

    planner = encoder.engine.planner
    for grids in plans.random_batches()[:12]:
        if all(pack.budget is not None for pack in planner.plan(grids)):
            continue
        rows = sum(grid.patches for grid in grids)
        pixels = torch.randn(rows, encoder.spec.patch_width, device="cuda", dtype=torch.bfloat16)
        chosen = time_call(lambda: encoder.encode_patches(pixels, grids), encoder.device, 5, 2)  # noqa: B023
        padded = time_call(lambda: _with_graphs(encoder, pixels, grids), encoder.device, 5, 2)  # noqa: B023
        assert chosen.median <= padded.median * (1 + TOLERANCE)


def _with_graphs(encoder: VisionEncoder, pixels: torch.Tensor, grids: list[Grid]) -> None:
    rows = pixels.split([grid.patches for grid in grids])
    for pack in encoder.engine.planner.plan(grids, eager=False):
        pieces = torch.cat([rows[piece.item] for piece in pack.pieces])
        encoder.encode_patches(pieces, [piece.grid for piece in pack.pieces])
