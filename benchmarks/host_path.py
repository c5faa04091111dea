"""Host time of one `encode_patches` call: our own part before the graph's launch, the launch, and what follows.

    python benchmarks/host_path.py [--geometry qwen3-vl-8b] [--json FILE]

Needs a CUDA device. Medians over calls of one batch that came before (`known`), and of batches of known sizes that come
for the first time (`new`), with the GPU idle (each call waits for the one before) and busy (a few calls in flight).
`before` is plan, metadata, staging, pixel copy and event guard; `launch` the driver's graph launch; `after` the copies
of the results and their split, while the GPU already works. Then the launch alone, for a few budgets. Random weights.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from measuring import arguments, make_encoder, write_report

from vitgraph import VisionEncoder
from vitgraph.core import Grid
from vitgraph.engine.graph import CapturedGraph
from vitgraph.engine.measure import usual_items

ITEMS = (1, 2, 4, 8, 20, 64)
PLACES = ("device", "pinned", "pageable")
HOST_ITEMS = 8
LAUNCHED_TOKENS = (64, 256, 1024, 4096)
MOST_PATCHES = 8192
RUNS, WARMUP, IN_FLIGHT = 60, 5, 3

Call = tuple[torch.Tensor, list[Grid]]
Launches = list[tuple[float, float]]


class Watched:
    """A captured graph that notes when its launch starts and ends."""

    def __init__(self, graph: CapturedGraph, launches: Launches) -> None:
        self._graph, self._launches = graph, launches

    def replay(self) -> tuple[torch.Tensor, ...]:
        start = time.perf_counter()
        outputs = self._graph.replay()
        self._launches.append((start, time.perf_counter()))
        return outputs


def paced(calls: Iterable[Callable[[], object]], busy: bool) -> Iterator[tuple[float, float]]:
    """Start and end of each call, seconds, on an idle GPU or with a few calls before it in flight."""
    in_flight: deque[torch.cuda.Event] = deque()
    for call in calls:
        while len(in_flight) > (IN_FLIGHT - 1 if busy else 0):
            _wait(in_flight.popleft())
        start = time.perf_counter()
        call()
        end = time.perf_counter()
        in_flight.append(torch.cuda.Event())
        in_flight[-1].record()
        yield start, end


def _wait(event: torch.cuda.Event) -> None:
    """Until the event has come. A blocked thread would find cold caches, and be timed on them."""
    while not event.query():
        pass


def side_of(items: int) -> int:
    """Side of an image in patches, so that the items fill at most MOST_PATCHES."""
    return min(20, int((MOST_PATCHES / items) ** 0.5) // 2 * 2)


def fresh_batches(items: int) -> list[list[Grid]]:
    """Images of many sizes, each batch another one."""
    choose, sides = random.Random(0), range(2, side_of(items) + 1, 2)
    batches: dict[tuple[Grid, ...], None] = {}
    while len(batches) < WARMUP + RUNS:
        batches[tuple(Grid(1, choose.choice(sides), choose.choice(sides)) for _ in range(items))] = None
    return [list(batch) for batch in batches]


def make_calls(encoder: VisionEncoder, items: int, place: str, fresh: bool) -> list[Call]:
    """The inputs of one line, made ahead: all calls share their pixels."""
    side = side_of(items)
    shape = items * side * side, encoder.spec.patch_width
    at = encoder.device if place == "device" else torch.device("cpu")
    pixels = torch.zeros(shape, dtype=encoder.dtype, device=at, pin_memory=place == "pinned").fill_(0.5)
    if not fresh:
        return [(pixels, [Grid(1, side, side)] * items)] * (WARMUP + RUNS)
    batches = fresh_batches(items)
    # The sizes are known, the combination is not: forget what an earlier line left.
    encoder.engine.staging.blocks.clear()
    encoder.engine.planner.cost = encoder.engine.planner.cost
    for grids in batches:
        encoder.engine.warm_metadata(grids)
    return [(pixels[: sum(grid.patches for grid in grids)], grids) for grids in batches]


def line(
    encoder: VisionEncoder, launches: Launches, items: int, place: str, fresh: bool, busy: bool
) -> dict[str, object]:
    """One line of the table. Where a batch needs several packs, `launch` is that of the first."""
    calls = make_calls(encoder, items, place, fresh)
    times = []
    launches.clear()
    for start, end in paced([partial(encoder.encode_patches, *call) for call in calls], busy):
        launched, done = launches[0]
        times.append((launched - start, done - launched, end - done))
        launches.clear()
    before, launch, after = (statistics.median(t[k] for t in times[WARMUP:]) * 1e6 for k in range(3))
    return {
        "items": items, "pixels": place, "batch": "new" if fresh else "known", "gpu": "busy" if busy else "idle",
        "before_us": before, "launch_us": launch, "after_us": after, "before_and_launch_us": before + launch,
    }  # fmt: skip


def launch_line(encoder: VisionEncoder, tokens: int, busy: bool) -> dict[str, object]:
    """Host time of a graph's launch alone, for the smallest budget of at least so many tokens."""
    index = next(
        i for i, budget in enumerate(encoder.budgets) if budget.tokens >= tokens or budget is encoder.budgets[-1]
    )
    encoder.engine.stage(index, usual_items(encoder.spec, encoder.budgets[index]))
    replay = encoder.engine.captured(index).replay
    times = [end - start for start, end in paced([replay] * (WARMUP + RUNS), busy)]
    return {
        "tokens": encoder.budgets[index].tokens, "gpu": "busy" if busy else "idle",
        "launch_us": statistics.median(times[WARMUP:]) * 1e6,
    }  # fmt: skip


def main() -> None:
    chosen = arguments(__doc__, geometry="qwen3-vl-8b")
    # Strict: every call replays graphs.
    with make_encoder(chosen.geometry, strict=True) as encoder:
        encoder.capture(progress=False)
        alone = [launch_line(encoder, tokens, busy) for tokens in LAUNCHED_TOKENS for busy in (False, True)]
        launches: Launches = []
        for graphs in (encoder.engine.ladder.graphs, encoder.engine.ladder.long):
            for index, graph in list(graphs.items()):
                graphs[index] = Watched(graph, launches)  # type: ignore[assignment]
        kinds = [(n, "device", fresh) for n in ITEMS for fresh in (False, True)]
        kinds += [(HOST_ITEMS, place, False) for place in PLACES[1:]]
        lines = [line(encoder, launches, *kind, busy) for kind in kinds for busy in (False, True)]
    for r in lines:
        print(
            f"{r['items']:3} items, {r['batch']:5} batch, pixels {r['pixels']:8} gpu {r['gpu']}  "
            f"before {r['before_us']:7.1f} us  launch {r['launch_us']:6.1f} us  after {r['after_us']:7.1f} us  "
            f"before + launch {r['before_and_launch_us']:7.1f} us"
        )
    for r in alone:
        print(f"launch alone, {r['tokens']:5} tokens, gpu {r['gpu']}  {r['launch_us']:6.1f} us")
    write_report(chosen.json, {"calls": lines, "launches": alone}, geometry=chosen.geometry)


if __name__ == "__main__":
    main()
