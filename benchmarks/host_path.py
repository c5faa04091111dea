"""Host time of one `encode_patches` call: our own part before the graph's launch, the launch, and what follows.

    python benchmarks/host_path.py [--geometry qwen3-vl-8b] [--json FILE]

Needs a CUDA device. Medians over calls of one batch that came before (its metadata lies on the device), and of batches
that come for the first time. `before` is plan, metadata, staging, pixel copy and event guard; `launch` the driver's
graph launch; `after` the copies of the results and their split, while the GPU already works. Random weights.
"""

from __future__ import annotations

import random
import statistics
import time

import torch
from measuring import arguments, make_encoder, write_report

from vitgraph import VisionEncoder
from vitgraph.core import Grid
from vitgraph.engine.graph import CapturedGraph

ITEMS = (1, 2, 4, 8, 20, 64)
PLACES = ("device", "pinned", "pageable")
MOST_PATCHES = 16384
RUNS, WARMUP = 60, 5


class Watched:
    """A captured graph that notes when its launch starts and ends."""

    def __init__(self, graph: CapturedGraph, launches: list[tuple[float, float]]) -> None:
        self._graph, self._launches = graph, launches

    def replay(self) -> tuple[torch.Tensor, ...]:
        start = time.perf_counter()
        outputs = self._graph.replay()
        self._launches.append((start, time.perf_counter()))
        return outputs


def spent(
    encoder: VisionEncoder, launches: list[tuple[float, float]], pixels: torch.Tensor, grids: list[Grid]
) -> tuple[float, float, float]:
    """Microseconds before, in and after the launch of a call that needs one pack."""
    torch.cuda.synchronize()
    launches.clear()
    start = time.perf_counter()
    encoder.encode_patches(pixels, grids)
    end = time.perf_counter()
    ((launched, done),) = launches
    return (launched - start) * 1e6, (done - launched) * 1e6, (end - done) * 1e6


def side_of(items: int) -> int:
    """Side of an image in patches, so that the items fill at most MOST_PATCHES."""
    return min(20, int((MOST_PATCHES / items) ** 0.5) // 2 * 2)


def fresh_batch(items: int, seed: int) -> list[Grid]:
    """Images of many sizes, in an order that hardly comes again."""
    choose, side = random.Random(seed), side_of(items)
    return [Grid(1, choose.randrange(2, side + 1, 2), choose.randrange(2, side + 1, 2)) for _ in range(items)]


def row(
    encoder: VisionEncoder, launches: list[tuple[float, float]], items: int, place: str, fresh: bool
) -> dict[str, object]:
    """One line of the table."""
    times = []
    for run in range(WARMUP + RUNS):
        grids = fresh_batch(items, run) if fresh else [Grid(1, side_of(items), side_of(items))] * items
        if fresh:
            # The sizes are known, the combination is not.
            encoder.engine.warm_metadata(grids)
        pixels = torch.zeros(sum(g.patches for g in grids), encoder.spec.patch_width, dtype=encoder.dtype)
        pixels = pixels.to(encoder.device) if place == "device" else pixels
        taken = spent(encoder, launches, pixels.pin_memory() if place == "pinned" else pixels, grids)
        if run >= WARMUP:
            times.append(taken)
    before, launch, after = (statistics.median(t[k] for t in times) for k in range(3))
    return {
        "items": items, "pixels": place, "batch": "new" if fresh else "known",
        "before_us": before, "launch_us": launch, "after_us": after,
    }  # fmt: skip


def main() -> None:
    chosen = arguments(__doc__, geometry="qwen3-vl-8b")
    # Strict: every call replays graphs.
    with make_encoder(chosen.geometry, strict=True) as encoder:
        encoder.capture(progress=False)
        launches: list[tuple[float, float]] = []
        for graphs in (encoder.engine.ladder.graphs, encoder.engine.ladder.alone):
            for index, graph in list(graphs.items()):
                graphs[index] = Watched(graph, launches)  # type: ignore[assignment]
        rows = [row(encoder, launches, n, "device", fresh) for n in ITEMS for fresh in (False, True)]
        rows += [row(encoder, launches, 8, place, False) for place in PLACES[1:]]
    for r in rows:
        print(
            f"{r['items']:3} items, {r['batch']:5} batch, pixels {r['pixels']:8}  before {r['before_us']:7.1f} us  "
            f"launch {r['launch_us']:6.1f} us  after {r['after_us']:7.1f} us"
        )
    write_report(chosen.json, rows, geometry=chosen.geometry)


if __name__ == "__main__":
    main()
