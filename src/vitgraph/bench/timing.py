"""Timing of one call: wall clock and, on CUDA, device time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call over many runs.

    Attributes:
        median, p99, best: wall clock around the call and a device synchronisation.
        device_median: between two CUDA events on the current stream, or None without CUDA.
        runs: timed runs; warm-up not counted.
    """

    median: float
    p99: float
    best: float
    device_median: float | None
    runs: int


def time_call(call: Callable[[], object], device: torch.device, runs: int, warmup: int) -> Timing:
    """Times `call` after `warmup` untimed runs."""
    for _ in range(warmup):
        call()
    _synchronize(device)
    wall: list[float] = []
    on_device: list[float] = []
    for _ in range(runs):
        events = _events(device)
        start = time.perf_counter()
        if events:
            events[0].record()
        call()
        if events:
            events[1].record()
        _synchronize(device)
        wall.append((time.perf_counter() - start) * 1e3)
        if events:
            on_device.append(events[0].elapsed_time(events[1]))
    return Timing(
        median=float(np.median(wall)),
        p99=float(np.percentile(wall, 99)),
        best=min(wall),
        device_median=float(np.median(on_device)) if on_device else None,
        runs=runs,
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _events(device: torch.device) -> tuple[torch.cuda.Event, torch.cuda.Event] | None:
    if device.type != "cuda":
        return None
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
