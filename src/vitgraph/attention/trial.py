"""Trial runs of attention kernels: packs to run, and their time on the device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from vitgraph.attention.base import ANY, LONG, Segments, tile_bound, write_tiles
from vitgraph.capture import capturing

RUNS, ENOUGH_US = 5, 5000.0
CALLS = 4
LOAD_SECONDS = 0.25
"""How long a call is timed under load."""
USUAL, LARGE = 400, 1024
CYCLES_PER_US = 1800

Time = Callable[[Callable[[], object]], float]
"""Microseconds of a call."""


def elapsed(call: Callable[[], object], runs: int = 1, lead: bool = True) -> float:
    """Microseconds on the device of one call: the mean of `runs` in a row on the current stream.

    Args:
        call: to time.
        runs: of it.
        lead: run it once more before. While that one runs, the host gets ahead; else the launch of the first one that
            counts would be in its time.
    """
    if lead:
        call()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(runs):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / runs


def spin(us: float) -> None:
    """Keeps the stream waiting for about so many microseconds, at little power. Meanwhile the host gets ahead."""
    torch.cuda._sleep(int(us * CYCLES_PER_US))


def device_time(call: Callable[[], object]) -> float:
    """Microseconds on the device, as a part of a CUDA graph: the best of a few replays, after one call that compiles.

    Outside a graph a short kernel would be timed by how long the host takes to launch it.

    Raises:
        RuntimeError: when the call cannot be captured.
    """
    return _in_a_graph(call, _best)


def _best(replay: Callable[[], object]) -> float:
    """The least of RUNS replays, of fewer where one takes long: those scatter less."""
    first = elapsed(replay)
    more = max(1, min(RUNS - 1, int(ENOUGH_US / max(first, 1.0))))
    return min(first, *(elapsed(replay) for _ in range(more)))


def loaded_time(call: Callable[[], object]) -> float:
    """As `device_time`, under load."""
    return _in_a_graph(call, under_load)


def _in_a_graph(call: Callable[[], object], time_of: Callable[[Callable[[], object]], float]) -> float:
    call()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        with capturing(graph, torch.device("cuda", torch.cuda.current_device()), torch.cuda.graph_pool_handle()):
            for _ in range(CALLS):
                call()
        found = time_of(graph.replay) / CALLS
    torch.cuda.current_stream().wait_stream(stream)
    return found


def under_load(replay: Callable[[], object], seconds: float = LOAD_SECONDS) -> float:
    """Microseconds on the device after a while of the same: the GPU lowers its clock under load, and not every kernel
    loses as much by that. On an H100 a kernel that led by 1 % at first was 3 % behind a tenth of a second later."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not times:
        times.append(elapsed(replay, lead=False))
    return statistics.median(times[len(times) // 2 :])


def usual_lengths(rows: int) -> list[int]:
    """Segments of usual images that fill a buffer; from 4096 rows on, half of the rows are larger images."""
    large = rows // 2 // LARGE if rows >= 4 * LARGE else 0
    rest = rows - large * LARGE
    return [LARGE] * large + [USUAL] * (rest // USUAL) + ([rest % USUAL] if rest % USUAL else [])


def segments_of(lengths: Sequence[int], block: int, device: torch.device) -> Segments:
    """Segments that fill a buffer, with a tile schedule of this block size unless it is 0."""
    ends = np.zeros(len(lengths) + 1, np.int32)
    ends[1:] = np.cumsum(lengths)
    rows = int(ends[-1])
    tiles = None
    if block:
        schedule = np.zeros((tile_bound(rows, len(lengths), block), 4), np.int32)
        write_tiles(ends, rows, block, schedule)
        tiles = torch.from_numpy(schedule).to(device)
    on_device = torch.from_numpy(ends).to(device)
    return Segments(on_device, max(lengths), tiles=tiles, block=block, form=LONG if len(lengths) == 1 else ANY)


def nearest_class(rows: int, classes: Sequence[int]) -> int:
    """The class that is nearest as a ratio."""
    return min(classes, key=lambda known: max(known, rows) / max(min(known, rows), 1))
