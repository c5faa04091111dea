"""Choice by measurement: our kernel for any pack, another backend for packs of long segments where that is faster."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from vitgraph.attention.base import LONG, Segments, VarlenAttention, kernel_of, tune, warm_up
from vitgraph.attention.choices import Times, choice_key, load_times, measure_once
from vitgraph.attention.opaque import attend_opaquely, handle_of
from vitgraph.attention.trial import Time, device_time, loaded_time, nearest_class, segments_of
from vitgraph.launch import meanwhile, only_compiles

logger = logging.getLogger("vitgraph")

CLASSES = (512, 1024, 1536, 2048, 2304, 3072, 4096, 6144, 8192, 16384)
"""Rows of one segment that are measured."""

MARGIN = 0.98
"""Another backend must take less than this share of our kernel's time."""

LONG_US, CLOSE = 500.0, 1.05
"""From which time on those within this factor of the fastest are timed again, under load."""


class OptionalBackend(VarlenAttention, Protocol):
    """A backend from a wheel of its own. It may have the method that `warm_up` asks for."""

    @staticmethod
    def version() -> str: ...


class AutoAttention:
    """Our kernel, and others for packs of one segment, or of long ones: `Segments.form`.

    The first call outside a capture that runs its kernels measures, once per GPU, versions, heads, head dim and dtype;
    the result is kept on disk. Segment lengths that were not measured take the choice of the nearest one.

    Args:
        own: runs any pack.
        others: candidates for such packs.
        device, dtype: of the tower.
        time, loaded: microseconds of a call, and under load; for tests.
    """

    name = "auto"

    def __init__(
        self,
        own: VarlenAttention,
        others: Sequence[OptionalBackend],
        device: torch.device,
        dtype: torch.dtype,
        time: Time = device_time,
        loaded: Time = loaded_time,
    ) -> None:
        self.own, self.others = own, others
        self._device, self._dtype = device, dtype
        self._time, self._loaded = time, loaded
        self._chosen: dict[int, VarlenAttention] = {}
        self._prepared = False
        self._handle = handle_of(self)

    def block(self, rows: int, longest: int) -> int:
        return self.own.block(rows, longest)

    def kernel(self, rows: int, longest: int) -> Hashable:
        """Of our kernel, see `kernel_of`."""
        return kernel_of(self.own, rows, longest)

    def tune(self, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> None:
        """Lets our kernel choose its configurations."""
        tune(self.own, heads, head_dim, device, dtype)

    def long(self, rows: int) -> bool:
        """Whether packs of one or of long segments in a buffer of this many rows have a backend of their own."""
        return self._choice(rows) is not self.own

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
        if torch.compiler.is_compiling():
            return attend_opaquely(self._handle, q, k, v, segments, scale, segments.form)
        if only_compiles():
            self._prepare(q.shape[1], q.shape[2])
        elif not self._chosen and not torch.cuda.is_current_stream_capturing():
            self._choose(q.shape[1], q.shape[2])
        backend = self._choice(q.shape[0]) if segments.form == LONG else self.own
        return backend(q, k, v, segments, scale)

    def describe(self) -> str:
        """What was chosen, in a line."""
        chosen = ", ".join(f"{rows} rows {backend.name}" for rows, backend in self._chosen.items())
        return f"{self.own.name}; one or long segments: {chosen or 'not measured yet'}"

    def _choice(self, rows: int) -> VarlenAttention:
        if not self._chosen:
            return self.own
        return self._chosen[nearest_class(rows, list(self._chosen))]

    def _prepare(self, heads: int, head_dim: int) -> None:
        """Has the others compile what they run, too: all that are measured, or those that were chosen before."""
        if self._prepared:
            return
        self._prepared = True
        times = load_times(self._key(heads, head_dim))
        for backend in self.others if times is None else {*self._best(times).values()}:
            meanwhile(partial(warm_up, backend, heads, head_dim, self._device, self._dtype))

    def _choose(self, heads: int, head_dim: int) -> None:
        key = self._key(heads, head_dim)
        self._chosen = self._best(measure_once(key, CLASSES, lambda rows: self._measure(rows, heads, head_dim)))
        # Where the times come from a file, nothing has run yet, and what follows may be a capture.
        for backend in set(self._chosen.values()):
            warm_up(backend, heads, head_dim, self._device, self._dtype)
        logger.info("attention for %s: %s", key, self.describe())

    def _best(self, times: Times) -> dict[int, VarlenAttention]:
        """The choice for each number of rows."""
        candidates = {backend.name: backend for backend in (self.own, *self.others)}
        found: dict[int, VarlenAttention] = {}
        for rows, own in times.items():
            best = min(own, key=lambda name: own[name] * (1 if name == self.own.name else 1 / MARGIN))
            found[rows] = candidates[best]
        return found

    def _measure(self, rows: int, heads: int, head_dim: int) -> dict[str, float]:
        """Microseconds by backend for one segment that fills a buffer."""
        qkv = torch.randn(rows, 3, heads, head_dim, device=self._device, dtype=self._dtype)
        segments = segments_of([rows], self.own.block(rows, rows), self._device)
        q, k, v = qkv.unbind(1)
        calls: dict[str, Callable[[], object]] = {
            backend.name: partial(backend, q, k, v, segments, head_dim**-0.5) for backend in (self.own, *self.others)
        }
        times = self._burst_times(calls, f"{heads} heads of {head_dim}")
        best = min(times.values())
        close = [name for name, time in times.items() if time <= CLOSE * best]
        if best < LONG_US or len(close) == 1:
            return times
        loaded = {name: self._loaded(calls[name]) for name in close}
        slower = min(loaded.values()) / best
        return {name: loaded.get(name, time * slower) for name, time in times.items()}

    def _burst_times(self, calls: dict[str, Callable[[], object]], what: str) -> dict[str, float]:
        """Microseconds by backend, without those that cannot run `what`."""
        times: dict[str, float] = {}
        running = list(calls)
        for _ in range(2):
            for name in [*running]:
                try:
                    time = self._time(calls[name])
                except Exception as error:  # a third-party kernel may refuse a shape in any way
                    if name == self.own.name:
                        raise
                    logger.warning("attention %s cannot run %s: %s", name, what, error)
                    running.remove(name)
                else:
                    times[name] = min(time, times.get(name, time))
            # Backwards: the GPU lowers its clock meanwhile, and who came last should not lose by that.
            running.reverse()
        return times

    def _key(self, heads: int, head_dim: int) -> str:
        gpu = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else str(self._device)
        return choice_key(gpu, [f"{b.name} {b.version()}" for b in self.others], heads, head_dim, self._dtype)
