"""Online requests: 400 of one to four images, one at a time.

    python benchmarks/online.py [--geometry qwen3-vl-8b] [--json FILE]

Needs a CUDA device and Transformers. Three ways with the same weights and inputs: the product, the same kernels under a
plain ladder of powers of two with ascending greedy packing, and Transformers' own tower with SDPA. Wall clock per
request, pixels on the device. `padding` is time that the filled rows do not account for: the share of the requests'
time beyond that of budgets of exactly their size, by the measured costs; also for one call of 32 images of mixed sizes.
Random weights and pixels.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from measuring import arguments, make_encoder, write_report
from techniques import POWERS_OF_TWO

from vitgraph import VisionEncoder
from vitgraph.bench.reference import reference_forward, reference_model
from vitgraph.bench.workloads import parse_workload
from vitgraph.core import Grid, KnownGrid
from vitgraph.planning.packing import Planner
from vitgraph.planning.search import Searched, greedy

SIZES = {224: 0.2, 336: 0.3, 448: 0.2, 672: 0.2, 1008: 0.1}
"""Side in pixels -> share of images; rounded to multiples of 32."""

MIXED = "1x14x14+11x20x20+6x28x28+8x42x42+6x64x64"
"""The call of 32 images."""

REQUESTS, MOST_IMAGES, SEED = 400, 4, 0
PATCH, CELL = 16, 32


def requests() -> list[list[Grid]]:
    """The grids of every request."""
    choose = random.Random(SEED)
    sides = [round(pixels / CELL) * CELL // PATCH for pixels in SIZES]
    count = [choose.randint(1, MOST_IMAGES) for _ in range(REQUESTS)]
    return [[Grid(1, side, side) for side in choose.choices(sides, SIZES.values(), k=n)] for n in count]


class GreedyPlanner(Planner):
    """Ascending greedy packing into the smallest budget that holds each pack; no costs."""

    def find(self, known: Sequence[KnownGrid], eager: bool) -> Searched:
        order = sorted(range(len(known)), key=lambda at: -known[at].patches)
        groups = greedy([known[at].size for at in order], self._prices.largest)
        return self._found([[order[i] for i in group] for group in groups], known, eager)


def time_requests(run: Callable[[torch.Tensor, list[Grid]], object], width: int) -> list[float]:
    """Milliseconds of every request, after one untimed pass over some of them."""
    batches = requests()
    most = max(sum(grid.patches for grid in grids) for grids in batches)
    pixels = torch.randn(most, width, device="cuda", dtype=torch.bfloat16)
    times = []
    for grids in [*batches[:40], *batches]:
        rows = pixels[: sum(grid.patches for grid in grids)]
        torch.cuda.synchronize()
        start = time.perf_counter()
        run(rows, grids)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return times[40:]


def padding_in_time(encoder: VisionEncoder, batches: Sequence[Sequence[Grid]]) -> float:
    """Share of the predicted time of all batches that padding costs."""
    planner = encoder.engine.planner
    taken = exact = 0.0
    for grids in batches:
        for pack in planner.plan(grids, eager=False):
            load = sum(float(grid.patches) ** 2 for grid in pack.grids)
            taken += planner.predicted([pack])
            cost = planner.cost
            # A budget of exactly these rows would lie on the line between its neighbours.
            fixed = float(np.interp(pack.counts["patch"], cost.rows, cost.fixed))
            long = encoder.spec.is_long(pack.counts)
            exact += fixed + cost.replay(pack.budget or 0, load, long) - cost.fixed[pack.budget or 0]
    return 1 - exact / taken


def summary(name: str, times: list[float]) -> dict[str, object]:
    return {
        "way": name,
        "total_s": sum(times) / 1e3,
        "median_ms": statistics.median(times),
        "p99_ms": float(np.percentile(times, 99)),
        "most_ms": max(times),
        "times_ms": [round(each, 2) for each in times],
    }


def main() -> None:
    chosen = arguments(__doc__, geometry="qwen3-vl-8b")
    rows = []
    with make_encoder(chosen.geometry) as encoder:
        encoder.capture(progress=False)
        width = encoder.spec.patch_width
        rows.append(summary("vitgraph", time_requests(encoder.encode_patches, width)))
        rows[0]["padding_in_time"] = padding_in_time(encoder, requests())
        rows[0]["padding_in_time_mixed"] = padding_in_time(encoder, [parse_workload(MIXED).grids])
        peer = reference_model(encoder.tower)
        rows.append(summary("transformers", time_requests(partial(reference_forward, peer), width)))
    with make_encoder(chosen.geometry, budgets=POWERS_OF_TWO, measure=False) as encoder:
        encoder.capture(progress=False)
        encoder.engine.planner = GreedyPlanner(encoder.spec, encoder.budgets)
        rows.append(summary("powers of two, greedy", time_requests(encoder.encode_patches, width)))
    for row in rows:
        ratio = row["total_s"] / rows[0]["total_s"]  # type: ignore[operator]
        print(
            f"{row['way']:24} total {row['total_s']:7.3f} s  median {row['median_ms']:7.2f} ms  "
            f"P99 {row['p99_ms']:7.2f} ms  most {row['most_ms']:7.2f} ms  {ratio:5.2f}x"
        )
    print(f"padding in time, predicted: {rows[0]['padding_in_time']:.1%}", end="")
    print(f", of 32 images of mixed sizes in one call: {rows[0]['padding_in_time_mixed']:.1%}")
    write_report(chosen.json, rows, geometry=chosen.geometry, requests=REQUESTS)


if __name__ == "__main__":
    main()
