"""Host time of one `encode_patches` call: our own part before the graph's launch, the launch, and what follows.

    python benchmarks/host_path.py [--geometry qwen3-vl-8b] [--json FILE]

Needs a CUDA device. Medians over calls of one batch that came before (`known`), and of batches of known sizes that come
for the first time (`new`), and what one call in ten takes at most. `before` is plan, request and, for rows on the host,
their staging; `launch` the driver's graph launch; `after` the copies of the results and their split, while the GPU
already works. Then the launch alone, for a few budgets. Random weights.

The GPU is `idle` (each call waits for the one before), `busy` (two calls before it are in flight) or `behind` (the host
never waits, so calls queue up). A host that waits comes back to cold caches: `python` is the time of the same few lines
of Python in each state, started where the call would start.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial

import torch
from measuring import arguments, make_encoder, write_report

from vitgraph import VisionEncoder
from vitgraph.core import Grid
from vitgraph.engine.measure import usual_items

ITEMS = (1, 2, 4, 8, 20, 64)
PLACES = ("device", "pinned", "pageable")
HOST_ITEMS = 8
LAUNCHED_TOKENS = (64, 256, 1024, 4096)
MOST_PATCHES = 8192
RUNS, WARMUP = 60, 5
IN_FLIGHT = {"idle": 0, "busy": 2, "behind": RUNS + WARMUP}
"""State of the GPU -> calls that may be in flight when another one starts."""

Call = tuple[torch.Tensor, list[Grid]]
Launches = list[tuple[float, float]]


class Watched:
    """A graph of the driver's that notes when its launch starts and ends."""

    def __init__(self, graph: torch.cuda.CUDAGraph, launches: Launches) -> None:
        self._graph, self._launches = graph, launches

    def replay(self) -> None:
        start = time.perf_counter()
        self._graph.replay()
        self._launches.append((start, time.perf_counter()))


def paced(calls: Iterable[Callable[[], object]], gpu: str) -> Iterator[tuple[float, float]]:
    """Start and end of each call, seconds, the GPU in one of the states of IN_FLIGHT."""
    in_flight: deque[torch.cuda.Event] = deque()
    torch.cuda.synchronize()
    for call in calls:
        while len(in_flight) > IN_FLIGHT[gpu]:
            _wait(in_flight.popleft())
        start = time.perf_counter()
        call()
        end = time.perf_counter()
        in_flight.append(torch.cuda.Event())
        in_flight[-1].record()
        yield start, end


def some_python() -> list[tuple[int, int]]:
    """Work that touches nothing of vitgraph, torch or the driver; about 10 us where the caches are warm."""
    return [(number, number + 1) for number in range(200)]


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
    encoder.engine.planner.cost = replace(encoder.engine.planner.cost)  # and with it the plans
    encoder.engine._prepared.clear()
    for grids in batches:
        encoder.engine.warm_metadata(grids)
    return [(pixels[: sum(grid.patches for grid in grids)], grids) for grids in batches]


def line(
    encoder: VisionEncoder, launches: Launches, items: int, place: str, fresh: bool, gpu: str
) -> dict[str, object]:
    """One line of the table. Where a batch needs several packs, `launch` is that of the first."""
    calls = make_calls(encoder, items, place, fresh)
    times = []
    launches.clear()
    for start, end in paced([partial(encoder.encode_patches, *call) for call in calls], gpu):
        launched, done = launches[0]
        times.append((launched - start, done - launched, end - done))
        launches.clear()
    before, launch, after = (statistics.median(t[k] for t in times[WARMUP:]) * 1e6 for k in range(3))
    return {
        "items": items, "pixels": place, "batch": "new" if fresh else "known", "gpu": gpu,
        "before_us": before, "launch_us": launch, "after_us": after, "before_and_launch_us": before + launch,
        "least_before_us": tenth([t[0] for t in times[WARMUP:]]) * 1e6,
    }  # fmt: skip


def tenth(times: list[float]) -> float:
    """What one call in ten takes at most: what a shared machine does meanwhile is not in it."""
    return statistics.quantiles(times, n=10)[0]


def python_line(encoder: VisionEncoder, items: int, gpu: str) -> float:
    """Microseconds of `some_python` where a call of so many items would start."""
    times = []

    def call(pixels: torch.Tensor, grids: list[Grid]) -> None:
        start = time.perf_counter()
        some_python()
        times.append(time.perf_counter() - start)
        encoder.encode_patches(pixels, grids)

    for _ in paced([partial(call, *one) for one in make_calls(encoder, items, "device", False)], gpu):
        pass
    return statistics.median(times[WARMUP:]) * 1e6


def launch_line(encoder: VisionEncoder, tokens: int, gpu: str) -> dict[str, object]:
    """Host time of a graph's launch alone, for the smallest budget of at least so many tokens."""
    index = next(
        i for i, budget in enumerate(encoder.budgets) if budget.tokens >= tokens or budget is encoder.budgets[-1]
    )
    encoder.engine.stage(index, usual_items(encoder.spec, encoder.budgets[index]))
    replay = encoder.engine.captured(index).replay
    times = [end - start for start, end in paced([replay] * (WARMUP + RUNS), gpu)]
    return {
        "tokens": encoder.budgets[index].tokens, "gpu": gpu,
        "launch_us": statistics.median(times[WARMUP:]) * 1e6,
    }  # fmt: skip


def main() -> None:
    chosen = arguments(__doc__, geometry="qwen3-vl-8b")
    # Strict: every call replays graphs.
    with make_encoder(chosen.geometry, strict=True) as encoder:
        encoder.capture(progress=False)
        alone = [launch_line(encoder, tokens, gpu) for tokens in LAUNCHED_TOKENS for gpu in IN_FLIGHT]
        python = {items: {gpu: python_line(encoder, items, gpu) for gpu in IN_FLIGHT} for items in ITEMS}
        launches: Launches = []
        for graphs in (encoder.engine.ladder.graphs, encoder.engine.ladder.long):
            for index, graph in list(graphs.items()):
                graphs[index] = replace(graph, graph=Watched(graph.graph, launches))  # type: ignore[arg-type]
        kinds = [(n, "device", fresh) for fresh in (False, True) for n in ITEMS]
        lines = [line(encoder, launches, *kind, gpu) for kind in kinds for gpu in IN_FLIGHT]
        # What is staged waits for its slot: two calls may be in flight, no more.
        staged = [(HOST_ITEMS, place, False) for place in PLACES[1:]]
        lines += [line(encoder, launches, *kind, gpu) for kind in staged for gpu in ("idle", "busy")]
    for r in lines:
        print(
            f"{r['items']:3} items, {r['batch']:5} batch, pixels {r['pixels']:8} gpu {r['gpu']:6}  "
            f"before {r['before_us']:7.1f} us (one in ten {r['least_before_us']:6.1f})  "
            f"launch {r['launch_us']:6.1f} us  after {r['after_us']:7.1f} us  "
            f"before + launch {r['before_and_launch_us']:7.1f} us"
        )
    for r in alone:
        print(f"launch alone, {r['tokens']:5} tokens, gpu {r['gpu']:6}  {r['launch_us']:6.1f} us")
    for items, times in python.items():
        print(f"python, {items:3} items  " + "  ".join(f"gpu {gpu} {us:5.1f} us" for gpu, us in times.items()))
    results = {"calls": lines, "launches": alone, "python_us": python}
    write_report(chosen.json, results, geometry=chosen.geometry)


if __name__ == "__main__":
    main()
