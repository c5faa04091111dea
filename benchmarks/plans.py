"""Plans beside the cost model: what it predicts, and what their replays take.

    python benchmarks/plans.py [--geometry qwen3-vl-8b] [--json FILE]

Needs a CUDA device. Random batches of one to 24 images; the replays of a batch's plan run in a row, `from rest`, as for
a request that finds the GPU idle, and `under load`, right after the plan before; medians of three. One factor for the
GPU's clock is left to all plans of a line; `off` counts those that differ from the rest by more than 5 %. The model is
measured several times: in capture, which is the model that chose the plans, and again. Random weights.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from measuring import arguments, graph_of, make_encoder, write_report

from vitgraph import VisionEncoder
from vitgraph.attention.trial import spin
from vitgraph.core import Grid, Pack

SIDES = (14, 20, 28, 42, 64)
BATCHES, MOST_IMAGES, SEED = 72, 24, 0
MODELS, RUNS = 5, 3
REST_SECONDS, LEAD_US = 0.06, 1100.0
"""A GPU is at its highest clock again after the first. While it spins for the second, the host gets ahead."""
PAUSE_SECONDS = 1.0
"""Before the model is measured again."""
TOLERANCE = 0.05


def random_batches() -> list[list[Grid]]:
    """Square images of usual sides."""
    choose = random.Random(SEED)
    counts = (choose.randint(1, MOST_IMAGES) for _ in range(BATCHES))
    return [[Grid(1, *[choose.choice(SIDES)] * 2) for _ in range(count)] for count in counts]


def replays_us(encoder: VisionEncoder, plan: Sequence[Pack], rest: float) -> float:
    """Microseconds of a plan's replays in a row, the GPU's own time.

    Args:
        encoder: that made the plan; captured.
        plan: of graphs only.
        rest: seconds before it.
    """
    torch.cuda.synchronize()
    time.sleep(rest)
    spin(LEAD_US)
    marks = []
    for pack in plan:
        assert pack.budget is not None
        encoder.engine.stage(pack.budget, pack.grids)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph_of(encoder, pack).replay()
        end.record()
        marks.append((start, end))
    torch.cuda.synchronize()
    return sum(start.elapsed_time(end) for start, end in marks) * 1e3


def beside(taken: Sequence[float], predicted: Sequence[float]) -> dict[str, Any]:
    """How far plans are from a model, up to one factor."""
    ratios = [time_us / model_us for time_us, model_us in zip(taken, predicted, strict=True)]
    clock = statistics.median(ratios)
    shares = [ratio / clock - 1 for ratio in ratios]
    return {
        "clock": clock, "deviation": statistics.pstdev(shares), "most": max(map(abs, shares)),
        "off": sum(abs(share) > TOLERANCE for share in shares), "shares": shares,
    }  # fmt: skip


def main() -> None:
    chosen = arguments(__doc__, geometry="qwen3-vl-8b")
    # Strict: every plan is one of graphs.
    with make_encoder(chosen.geometry, strict=True) as encoder:
        encoder.capture(progress=False)
        planner = encoder.engine.planner
        plans = [planner.plan(grids, eager=False) for grids in random_batches()]
        models, seconds = [planner.cost], [encoder.stats.measure_seconds]
        runs = {
            name: [[replays_us(encoder, plan, rest) for plan in plans] for _ in range(RUNS)]
            for name, rest in (("from rest", REST_SECONDS), ("under load", 0.0))
        }
        taken = {name: [statistics.median(times) for times in zip(*own, strict=True)] for name, own in runs.items()}
        for _ in range(MODELS - 1):
            time.sleep(PAUSE_SECONDS)
            encoder.engine._measure()
            models.append(planner.cost)
            seconds.append(encoder.stats.measure_seconds)
        lines = []
        for number, (cost, measured_s) in enumerate(zip(models, seconds, strict=True)):
            planner.cost = cost
            predicted = list(map(planner.predicted, plans))
            for name, times in taken.items():
                lines.append({"model": number, "seconds": measured_s, "plans": name, **beside(times, predicted)})
    for line in lines:
        print(
            "model {model}, measured in {seconds:.2f} s, plans {plans:10}  clock {clock:.3f}  deviation "
            "{deviation:.4f}  most {most:.3f}  off {off}".format(**line)
        )
    write_report(chosen.json, {"lines": lines, "runs_us": runs}, geometry=chosen.geometry)


if __name__ == "__main__":
    main()
