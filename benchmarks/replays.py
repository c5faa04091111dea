"""Replay time by size, with the utilisation of the GPU, and where the time goes.

    python benchmarks/replays.py [--geometry qwen3-vl-8b] [--profile] [--json FILE]

Needs a CUDA device. Each number of patches as one image and as eight equal images, in a budget of exactly that size.
`MFU` is model FLOPs (without padding) over time and over the measured matmul ceiling. With --profile, kernel times by
class, per layer. Random weights and pixels.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from measuring import arguments, device_time, graph_of, make_encoder, matmul_ceiling, tower_flops, write_report
from torch.profiler import ProfilerActivity, profile

from vitgraph import VisionEncoder
from vitgraph.core import Grid
from vitgraph.engine.graph import CapturedGraph
from vitgraph.layers.block import Attention

REST_SECONDS, WARM_SECONDS = 1.0, 0.1
"""Before each size: a GPU lowers its clock under load, which the next size should not inherit, and when it rests."""

ONE = {256: (16, 16), 1024: (32, 32), 2304: (48, 48), 4096: (64, 64), 8192: (64, 128), 16384: (128, 128)}
"""Patches -> grid of one image."""

EIGHT = {256: (4, 8), 1024: (8, 16), 2304: (16, 18), 4096: (16, 32), 8192: (32, 32), 16384: (32, 64)}
"""Patches -> grid of each of eight images."""

CLASSES = {
    "attention": r"varlen|flash|attention",
    "gemm": r"gemm|nvjet|cutlass|cublas|xmma|sm90_",
    "norm": r"norm",
    "rotary": r"rotate",
    "copy": r"memcpy|memset|copy",
}
"""Kernel class -> what its kernels' names hold; the first match wins, the rest is 'other'."""


def kernel_class(name: str) -> str:
    """The class of a kernel."""
    return next((kind for kind, pattern in CLASSES.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def kernel_times(replay: Callable[[], object], runs: int = 5) -> dict[str, float]:
    """Microseconds of one replay by class of kernel."""
    replay()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(runs):
            replay()
    times: dict[str, float] = defaultdict(float)
    for event in trace.key_averages():
        times[kernel_class(event.key)] += event.self_device_time_total / runs
    return dict(times)


def staged(encoder: VisionEncoder, grids: list[Grid]) -> CapturedGraph:
    """The graph of items that fill one budget, ready to replay."""
    (pack,) = encoder.engine.planner.plan(grids, eager=False)
    assert pack.budget is not None
    encoder.engine.stage(pack.budget, grids)
    return graph_of(encoder, pack)


def measure(encoder: VisionEncoder, grids: list[Grid], ceiling: float) -> dict[str, Any]:
    """One cell of the table."""
    replay = staged(encoder, grids).replay
    time.sleep(REST_SECONDS)
    end = time.perf_counter() + WARM_SECONDS
    while time.perf_counter() < end:
        replay()
        torch.cuda.synchronize()
    time_ms = device_time(replay)
    flops = sum(tower_flops(encoder, grids))
    return {
        "patches": sum(grid.patches for grid in grids),
        "images": len(grids),
        "ms": time_ms,
        "tflop": flops / 1e12,
        "mfu": flops / time_ms / 1e9 / ceiling,
    }


def main() -> None:
    chosen = arguments(__doc__, flags=["profile"], geometry="qwen3-vl-8b")
    budgets = tuple(patches // 4 for patches in ONE)
    ceiling = matmul_ceiling()
    print(f"matmul ceiling {ceiling:.0f} TFLOP/s")
    fillings = [grids for n in ONE for grids in ([Grid(1, *ONE[n])], [Grid(1, *EIGHT[n])] * 8)]
    with make_encoder(chosen.geometry, budgets=budgets, max_items=8, measure=False) as encoder:
        encoder.capture(progress=False)
        layers = sum(isinstance(module, Attention) for module in encoder.tower.modules())
        rows = [measure(encoder, grids, ceiling) for grids in fillings]
        if chosen.profile:
            # Afterwards: once a profiler was attached, launches take longer.
            for row, grids in zip(rows, fillings, strict=True):
                times = kernel_times(staged(encoder, grids).replay)
                row["kernels_us_per_layer"] = {kind: us / layers for kind, us in times.items()}
    for row in rows:
        detail = "  ".join(f"{kind} {us:.1f}" for kind, us in row.get("kernels_us_per_layer", {}).items())
        print(f"{row['patches']:6} / {row['images']}  {row['ms']:8.3f} ms  MFU {row['mfu']:.2f}  {detail}")
    write_report(chosen.json, rows, geometry=chosen.geometry, matmul_tflops=ceiling, layers=layers)


if __name__ == "__main__":
    main()
