"""What the benchmark scripts share: timing on the device, the machine's ceiling, FLOPs of a tower, reports."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitgraph import EncoderConfig, VisionEncoder
from vitgraph.attention.trial import elapsed
from vitgraph.bench.geometries import geometry
from vitgraph.bench.report import environment
from vitgraph.core import Grid, Pack
from vitgraph.engine.graph import CapturedGraph
from vitgraph.layers.block import Attention
from vitgraph.planning.cost import load_of

RUNS, WARMUP, SHORT_US = 30, 5, 4000.0
TOKEN_MODULES = ("merger", "projector", "downsample", "mlp1")
"""Parts of a tower whose rows are tokens, by what their names hold."""


def call_times(call: Callable[[], object], runs: int = RUNS) -> tuple[float, float]:
    """Median wall clock and host time of one call, milliseconds."""
    walls, hosts = [], []
    for run in range(WARMUP + runs):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        returned = time.perf_counter()
        torch.cuda.synchronize()
        if run >= WARMUP:
            walls.append((time.perf_counter() - start) * 1e3)
            hosts.append((returned - start) * 1e3)
    return statistics.median(walls), statistics.median(hosts)


def device_time(call: Callable[[], object], runs: int = RUNS) -> float:
    """Median time between events around one call, milliseconds; of a short one without the host's launch."""
    lead = elapsed(call) < SHORT_US
    return statistics.median([elapsed(call, lead=lead) / 1e3 for _ in range(WARMUP + runs)][WARMUP:])


def matmul_ceiling(size: int = 8192) -> float:
    """TFLOP/s of a square bf16 matmul, the ceiling that utilisation is measured against."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / device_time(lambda: a @ b, 10) / 1e9


def tower_flops(encoder: VisionEncoder, grids: Sequence[Grid]) -> tuple[float, float]:
    """FLOPs of the linears, and of full attention in every block, for items of these grids without padding."""
    counts = [encoder.spec.counts(grid) for grid in grids]
    rows, tokens = (sum(c[kind] for c in counts) for kind in ("patch", "token"))
    linear = attention = 0.0
    load = sum(load_of(c, encoder.spec.load_sets) for c in counts)
    for name, module in encoder.tower.named_modules():
        if isinstance(module, nn.Linear):
            per_token = any(part in name for part in TOKEN_MODULES)
            linear += 2.0 * module.weight.numel() * (tokens if per_token else rows)
        elif isinstance(module, Attention):
            attention += 4.0 * load * module.heads * module.head_dim
    return linear, attention


def graph_of(encoder: VisionEncoder, pack: Pack) -> CapturedGraph:
    """The graph that a pack replays."""
    engine = encoder.engine
    assert pack.budget is not None
    return engine.captured(pack.budget, engine.ladder.runs_long(pack.budget, pack.counts))


def replay_time(encoder: VisionEncoder, grids: Sequence[Grid]) -> float:
    """Milliseconds of the graphs that these items need, alone, summed over their packs."""
    total = 0.0
    for pack in encoder.engine.planner.plan(list(grids), eager=False):
        assert pack.budget is not None
        encoder.engine.stage(pack.budget, pack.grids)
        total += device_time(graph_of(encoder, pack).replay)
    return total


def make_encoder(name: str, **settings: Any) -> VisionEncoder:
    """An encoder of a named geometry on CUDA in bf16, random weights."""
    return VisionEncoder.from_config(geometry(name), device="cuda", config=EncoderConfig(**settings))


def arguments(description: str | None, flags: Sequence[str] = (), **defaults: str) -> argparse.Namespace:
    """Parses `--json FILE`, flags, and one option per default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", default=default)
    for flag in flags:
        parser.add_argument(f"--{flag}", action="store_true")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def write_report(path: Path | None, results: Any, **facts: Any) -> None:
    """Writes hardware, versions, date, facts and results as JSON, if a path is given."""
    if path is not None:
        report = {**environment(torch.device("cuda")), **facts, "results": results}
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
