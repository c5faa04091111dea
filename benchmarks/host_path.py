"""Host time of one `encode_patches` call: our own part before the graph's launch, the launch, and what follows.

    python benchmarks/host_path.py [--geometry qwen3-vl-8b] [--several] [--requests] [--json FILE]

Needs a CUDA device. Medians over calls of one batch that came before, of equal images (`known`) or of many sizes
(`mixed`), and of batches of known sizes that come for the first time (`new`), and what one call in ten takes at most.
`before` is plan, request and, for rows on the host, their staging; `launch` the driver's graph launch; `after` the
copies of the results and their split, while the GPU already works. Some batches take several packs; for them, `before`
ends at the first launch, and the others follow while the GPU works: `own` is all time until the last launch but what
the launches take, per launch. With `--several`, only they are measured. Then the launch alone, for a few budgets,
beside what one small kernel's launch takes in its place. Random weights.

The GPU is `idle` (each call waits for the one before), `busy` (two calls before it are in flight) or `behind` (the host
never waits, so calls queue up). Sizes and views of the pixels are made right before each call, as a caller's are.

A host that waits comes back to cold caches, and others who use it make them colder. `python` says by how much: the time
of the same few lines of Python, measured where every second call would start. Every line is measured in several rounds
spread over the run; it shows the round in which `python` took least. With `--requests`, graphs end once they have read
their requests, rows and metadata: plans and all that the host does stay as they are, no wait is long, and what is left
is our own part on a host that others leave alone.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from measuring import arguments, make_encoder, write_report

from vitgraph import VisionEncoder
from vitgraph.core import Grid
from vitgraph.engine.fillings import usual_items
from vitgraph.engine.graph import CapturedGraph, GraphPool

ITEMS = (1, 2, 4, 8, 20, 64)
PLACES = ("device", "pinned", "pageable")
HOST_ITEMS = 8
SEVERAL_PACKS = ((64, 20, "known"), (32, 48, "mixed"), (12, 64, "new"), (32, 48, "new"), (64, 28, "new"))
"""Items, their side in patches, or the longest, and what kind of batch they are."""

LAUNCHED_TOKENS = (64, 256, 1024, 4096)
MOST_PATCHES = 8192
ROUNDS, RUNS, WARMUP = 6, 12, 6
CALLS = WARMUP + 2 * RUNS
"""Of a round: the first ones count for nothing, then every second one is timed, and every other begins with Python."""

IN_FLIGHT = {"idle": 0, "busy": 2, "behind": CALLS}
"""State of the GPU -> calls that may be in flight when another one starts."""

Call = tuple[torch.Tensor, list[Grid]]
Launches = list[tuple[float, float]]
Kind = tuple[int, int, str, str, str]
"""Of a line: items, their side in patches, or the longest; where the pixels lie, the kind of batch, the GPU's state."""


class Watched:
    """A graph of the driver's that notes when its launch starts and ends."""

    def __init__(self, graph: torch.cuda.CUDAGraph, launches: Launches) -> None:
        self._graph, self._launches = graph, launches

    def replay(self) -> None:
        start = time.perf_counter()
        self._graph.replay()
        self._launches.append((start, time.perf_counter()))


def ends_after_request(encoder: VisionEncoder, index: int, graph: CapturedGraph) -> CapturedGraph:
    """A budget's graph without the forward."""
    buffers = encoder.engine.ladder.static(index)
    intake = buffers.arena.intake
    assert intake is not None, "graphs on CUDA read requests"
    begin = partial(intake.launch, buffers)
    pool = GraphPool(encoder.device, graph.mailbox)
    captured = pool.capture(lambda _: graph.outputs, buffers.inputs, graph.outputs, warm_up=False, begin=begin)
    pool.finish()
    return captured


def paced(calls: Iterable[Callable[[], object]], gpu: str) -> Iterator[tuple[float, float]]:
    """Start and end of each call, seconds, the GPU in one of the states of IN_FLIGHT."""
    in_flight: deque[torch.cuda.Event] = deque()
    torch.cuda.synchronize()
    upcoming = iter(calls)
    while True:
        while len(in_flight) > IN_FLIGHT[gpu]:
            _wait(in_flight.popleft())
        # Only now: a generator makes a call's inputs here.
        call = next(upcoming, None)
        if call is None:
            return
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


def fresh_batches(items: int, most_side: int) -> list[list[Grid]]:
    """Images of many sizes, each batch another one."""
    choose, sides = random.Random(0), range(2, most_side + 1, 2)
    batches: dict[tuple[Grid, ...], None] = {}
    while len(batches) < CALLS:
        batches[tuple(Grid(1, choose.choice(sides), choose.choice(sides)) for _ in range(items))] = None
    return [list(batch) for batch in batches]


def make_calls(encoder: VisionEncoder, items: int, side: int, place: str, batch: str) -> Iterator[Call]:
    """The inputs of one line, each made when it is asked for; all calls share their pixels."""
    shape = items * side * side, encoder.spec.patch_width
    at = encoder.device if place == "device" else torch.device("cpu")
    pixels = torch.zeros(shape, dtype=encoder.dtype, device=at, pin_memory=place == "pinned").fill_(0.5)
    batches = [[Grid(1, side, side)] * items] * CALLS if batch == "known" else fresh_batches(items, side)
    if batch == "mixed":
        batches = batches[:1] * CALLS
    # The sizes are known, a new combination is not: forget what an earlier line left.
    encoder.engine._prepared.clear()
    for grids in batches:
        encoder.engine.warm_metadata(grids)
    rows = [sum(grid.patches for grid in grids) for grids in batches]
    return ((pixels[:n], [Grid(*grid) for grid in grids]) for n, grids in zip(rows, batches, strict=True))


def one_round(
    encoder: VisionEncoder, launches: Launches, items: int, side: int, place: str, batch: str, gpu: str
) -> dict[str, float]:
    """Microseconds of one round of a line. Where a batch takes several packs, `launch` is that of the first."""
    python: list[float] = []
    calls = (partial(encoder.encode_patches, *call) for call in make_calls(encoder, items, side, place, batch))
    times = []
    launches.clear()
    for start, end in paced(every_second_after_python(calls, python), gpu):
        launched, done = launches[0]
        launching = sum(begun - begin for begin, begun in launches[:-1])
        own = (launches[-1][0] - start - launching) / len(launches)
        times.append((launched - start, done - launched, end - done, own))
        launches.clear()
    timed = times[WARMUP::2]
    before, launch, after, own = (statistics.median(t[k] for t in timed) * 1e6 for k in range(4))
    return {
        "before_us": before, "launch_us": launch, "after_us": after, "before_and_launch_us": before + launch,
        "own_per_launch_us": own,
        "least_before_us": tenth([t[0] for t in timed]) * 1e6,
        "python_us": statistics.median(python[WARMUP // 2 :]) * 1e6,
    }  # fmt: skip


def every_second_after_python(
    calls: Iterable[Callable[[], object]], python: list[float]
) -> Iterator[Callable[[], object]]:
    """The calls; before every second one, `some_python` runs, and how long it took is noted.

    Args:
        calls: an even number of them is not timed, then one is timed and one is not in turn.
        python: receives seconds.
    """

    def after_python(call: Callable[[], object]) -> None:
        start = time.perf_counter()
        some_python()
        python.append(time.perf_counter() - start)
        call()

    for number, call in enumerate(calls):
        yield partial(after_python, call) if number % 2 else call


def quietest(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """The round in which plain Python took least: what it says of the calls has no part in the choice."""
    return min(rounds, key=lambda one: one["python_us"])


def tenth(times: list[float]) -> float:
    """What one call in ten takes at most: what a shared machine does meanwhile is not in it."""
    return statistics.quantiles(times, n=10)[0]


def launch_line(encoder: VisionEncoder, tokens: int, gpu: str) -> dict[str, object]:
    """Host time of a graph's launch alone, for the smallest budget of at least so many tokens; and, each after such a
    graph, of one small kernel's launch and of `some_python`."""
    index = next(
        i for i, budget in enumerate(encoder.budgets) if budget.tokens >= tokens or budget is encoder.budgets[-1]
    )
    encoder.engine.stage(index, usual_items(encoder.spec, encoder.budgets[index]))
    replay = encoder.engine.captured(index).replay
    small = torch.zeros(8, device=encoder.device)

    def after_replays(call: Callable[[], object]) -> float:
        times = [end - start for start, end in paced([replay, call] * (CALLS // 2), gpu)]
        return statistics.median(times[WARMUP + 1 :: 2]) * 1e6

    times = [end - start for start, end in paced([replay] * CALLS, gpu)]
    return {
        "tokens": encoder.budgets[index].tokens, "gpu": gpu,
        "launch_us": statistics.median(times[WARMUP:]) * 1e6,
        "kernel_us": after_replays(lambda: small.add_(1)),
        "python_us": after_replays(some_python),
    }  # fmt: skip


def one_pack() -> Iterator[Kind]:
    """Lines whose batches take one pack."""
    sizes = [(items, side_of(items)) for items in ITEMS]
    yield from ((*size, "device", batch, gpu) for batch in ("known", "new") for size in sizes for gpu in IN_FLIGHT)
    # What is staged waits for its slot: two calls may be in flight, no more.
    for place in PLACES[1:]:
        yield from ((HOST_ITEMS, side_of(HOST_ITEMS), place, "known", gpu) for gpu in ("idle", "busy"))


def several_packs() -> list[Kind]:
    """Lines whose batches take several."""
    return [(items, side, "device", batch, gpu) for items, side, batch in SEVERAL_PACKS for gpu in ("idle", "behind")]


def main() -> None:
    chosen = arguments(__doc__, flags=["several", "requests"], geometry="qwen3-vl-8b")
    # Strict: every call replays graphs.
    with make_encoder(chosen.geometry, strict=True) as encoder:
        encoder.capture(progress=False)
        alone = [launch_line(encoder, tokens, gpu) for tokens in LAUNCHED_TOKENS for gpu in IN_FLIGHT]
        launches: Launches = []
        for graphs in (encoder.engine.ladder.graphs, encoder.engine.ladder.long):
            for index, whole in list(graphs.items()):
                graph = ends_after_request(encoder, index, whole) if chosen.requests else whole
                graphs[index] = replace(graph, graph=Watched(graph.graph, launches))  # type: ignore[arg-type]
        kinds = several_packs() if chosen.several else [*one_pack(), *several_packs()]
        rounds = [[one_round(encoder, launches, *kind) for kind in kinds] for _ in range(ROUNDS)]
    lines = []
    for (items, side, place, batch, gpu), *own in zip(kinds, *rounds, strict=True):
        found = quietest(own)
        lines.append(
            {"items": items, "side": side, "pixels": place, "batch": batch, "gpu": gpu, **found, "rounds": own}
        )
        print(
            f"{items:3} items, side {side:2}, {batch:5} batch, pixels {place:8} gpu {gpu:6}  "
            f"before {found['before_us']:6.1f} us (one in ten {found['least_before_us']:6.1f})  "
            f"launch {found['launch_us']:5.1f} us  both {found['before_and_launch_us']:6.1f} us  "
            f"after {found['after_us']:6.1f} us  own {found['own_per_launch_us']:6.1f} us  "
            f"python {found['python_us']:5.1f} us"
        )
    for r in alone:
        print(
            f"launch alone, {r['tokens']:5} tokens, gpu {r['gpu']:6}  {r['launch_us']:6.1f} us  "
            f"one kernel's instead {r['kernel_us']:6.1f} us  python {r['python_us']:6.1f} us"
        )
    results = {"calls": lines, "launches": alone}
    write_report(chosen.json, results, geometry=chosen.geometry, requests_only=chosen.requests)


if __name__ == "__main__":
    main()
