"""Trial runs of cuBLASLt's algorithms: which is the fastest for a product."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from vitgraph.attention.trial import spin
from vitgraph.engine.cublaslt import CublasLt, Problem

logger = logging.getLogger("vitgraph")

TORCH = b""
"""Stands for the algorithm that torch takes."""

LEAD_US, HOST_MARGIN, TRIES = 100.0, 1.5, 3
"""While the host queues runs the GPU spins: so long, and what the host needs beyond the runs' own time if each takes it
HOST_MARGIN times what it took the last time. If the host was late all are timed again, up to so many times."""

FLOPS_PER_US = 500e6
"""How long a product takes is guessed from what an H100 does."""

FIRST_US, MOST_FIRST_RUNS = 100.0, 4
"""For its first time an algorithm runs for about so long, so often at most."""

FINALISTS, NEAR, FINALS, FINAL_US, MOST_FINAL_RUNS = 3, 1.1, 2, 200.0, 8
"""After these times, so many of the fastest and torch's own meet again so often, each for about so long, but for those
that took more than NEAR times the least; their first times no longer count, as they were chosen by them."""

WORTH = 0.985
"""An algorithm must take less than this share of the time of torch's own."""


class Trial:
    """Trial runs on memory of their own.

    Args:
        library: runs them.
        problems: all that will run.
    """

    def __init__(self, library: CublasLt, problems: Sequence[Problem]) -> None:
        device, dtype = library.device, problems[0].dtype
        self._library = library
        self._host_us = 0.0
        self._events: list[torch.cuda.Event] = []
        self._turn = 0
        self._x = torch.randn(max(p.rows * p.inner for p in problems), device=device, dtype=dtype)
        self._out = torch.zeros(max(p.rows * p.columns for p in problems), device=device, dtype=dtype)
        self._bias = torch.randn(max(p.columns for p in problems), device=device, dtype=dtype)

    def fastest(self, problem: Problem, candidates: Sequence[bytes], weights: Sequence[Tensor]) -> bytes:
        """The candidate that takes least time, or TORCH.

        Args:
            problem: to run.
            candidates: algorithms.
            weights: `[columns, inner]`, at least one.
        """
        every = [TORCH, *(algorithm for algorithm in candidates if self._runs(problem, algorithm, weights[0]))]
        if len(every) == 1:
            return TORCH
        self._run(problem, TORCH, weights[0])
        times = self.times(problem, every, weights, _runs_in(FIRST_US, MOST_FIRST_RUNS, problem))
        self._tell(problem, every, times)
        finalists = {0, *sorted(range(len(every)), key=times.__getitem__)[:FINALISTS]}
        again = [every[at] for at in sorted(finalists) if times[at] <= NEAR * min(times)]
        if len(again) == 1:
            return again[0]
        runs = _runs_in(FINAL_US, MOST_FINAL_RUNS, problem)
        finals = [self.times(problem, again, weights, runs) for _ in range(FINALS)]
        least = dict(zip(again, (min(own) for own in zip(*finals, strict=True)), strict=True))
        self._tell(problem, again, list(least.values()))
        best = min(again, key=least.__getitem__)
        return best if TORCH not in least or least[best] < WORTH * least[TORCH] else TORCH

    def _runs(self, problem: Problem, algorithm: bytes, weight: Tensor) -> bool:
        """Whether it runs. The driver loads a kernel when it runs first, which should not be timed; and which kernel an
        algorithm is depends on the problem, too."""
        try:
            self._run(problem, algorithm, weight)
        except RuntimeError as error:
            logger.debug("an algorithm for %s does not run: %s", problem.name, error)
            return False
        return True

    def times(self, problem: Problem, algorithms: Sequence[bytes], weights: Sequence[Tensor], runs: int) -> list[float]:
        """Milliseconds of a run of each algorithm, the mean of so many, one after another on the GPU.

        Args:
            problem: to run.
            algorithms: that run; TORCH may be among them.
            weights: `[columns, inner]`, which all runs take in turn: none finds its own in the cache if they are larger
                than that.
            runs: of each algorithm.
        """
        marks, count = self._marks(len(algorithms) + 1), runs * len(algorithms)
        lead = LEAD_US + count * max(0.0, HOST_MARGIN * self._host_us - _guess(problem))
        for _ in range(TRIES):
            start, late = time.perf_counter(), False
            spin(lead)
            self._run(problem, algorithms[-1], weights[0])  # the first run after a pause takes longer
            marks[0].record()
            for algorithm, before, mark in zip(algorithms, marks[:-1], marks[1:], strict=True):
                for _ in range(runs):
                    self._turn += 1
                    self._run(problem, algorithm, weights[self._turn % len(weights)])
                late = late or before.query()
                mark.record()
            queued_us = (time.perf_counter() - start) * 1e6
            self._host_us = queued_us / count
            marks[-1].synchronize()
            if not late:
                break
            lead += queued_us
        return [before.elapsed_time(after) / runs for before, after in pairwise(marks)]

    def _tell(self, problem: Problem, algorithms: Sequence[bytes], times: Sequence[float]) -> None:
        if logger.isEnabledFor(logging.DEBUG):
            names = ["torch" if own == TORCH else "/".join(map(str, self._library.setting(own))) for own in algorithms]
            told = (f"{name} {time * 1e3:.2f}" for name, time in zip(names, times, strict=True))
            logger.debug("%s, tile/cluster/schedule us: %s", problem.name, ", ".join(told))

    def _marks(self, count: int) -> list[torch.cuda.Event]:
        """Events, kept for the next time: they take longer to make than to record."""
        self._events += [torch.cuda.Event(enable_timing=True) for _ in range(count - len(self._events))]
        return self._events[:count]

    def _run(self, problem: Problem, algorithm: bytes, weight: Tensor) -> None:
        rows, columns, inner, kind, _ = problem
        x, out = self._x[: rows * inner].view(rows, inner), self._out[: rows * columns].view(rows, columns)
        bias = self._bias[:columns]
        if algorithm != TORCH:
            self._library.run(problem, algorithm, x, weight, bias if kind in ("bias", "gelu") else None, out)
        elif kind == "plain":
            torch.mm(x, weight.t(), out=out)
        elif kind == "add":
            out.addmm_(x, weight.t())
        elif kind == "bias":
            torch.addmm(bias, x, weight.t(), out=out)
        else:
            torch._addmm_activation(bias, x, weight.t(), use_gelu=True, out=out)


def _runs_in(microseconds: float, most: int, problem: Problem) -> int:
    """How often it runs for one time."""
    return max(1, min(most, int(microseconds / _guess(problem))))


def _guess(problem: Problem) -> float:
    """Microseconds that it will take."""
    return 2 * problem.rows * problem.columns * problem.inner / FLOPS_PER_US
