"""Which algorithm a trial takes, by made-up times; real ones are measured in tests/gpu."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from vitgraph.engine.cublaslt import Problem
from vitgraph.engine.gemm_trial import FINALS, MOST_FINAL_RUNS, MOST_RUNS, TORCH, WORTH, Trial

ONE, TWO, THREE, BROKEN = b"\x01", b"\x02", b"\x03", b"\x04"
SHORT, LONG = (Problem(rows, 1152, 1152, "plain", torch.bfloat16) for rows in (256, 65536))


class Library:
    """Runs nothing; BROKEN fails."""

    device = torch.device("cpu")

    def run(self, problem: Problem, algorithm: bytes, *tensors: Tensor | None) -> None:
        if algorithm == BROKEN:
            raise RuntimeError("does not run")


class Timed(Trial):
    """Takes its times from a script: per round, milliseconds of each algorithm."""

    def __init__(self, *script: dict[bytes, float]) -> None:
        small = Problem(8, 8, 8, "plain", torch.bfloat16)
        super().__init__(Library(), [small])  # type: ignore[arg-type]
        self.script, self.asked = iter(script), list[tuple[list[bytes], int]]()

    def _run(self, problem: Problem, algorithm: bytes, weight: Tensor) -> None:
        self._library.run(problem, algorithm, weight, weight, None, weight)

    def times(self, problem: Problem, algorithms: Sequence[bytes], weights: Sequence[Tensor], runs: int):
        self.asked.append((list(algorithms), runs))
        times = next(self.script)
        return [times[algorithm] for algorithm in algorithms]


def fastest(trial: Timed, candidates: Sequence[bytes], problem: Problem = SHORT) -> bytes:
    return trial.fastest(problem, candidates, [torch.zeros(1)])


def test_the_finals_decide_among_the_fastest() -> None:
    first = {TORCH: 1.0, ONE: 0.9, TWO: 0.8, THREE: 0.7}
    # THREE was lucky, and TWO is not unlucky twice.
    trial = Timed(first, {TORCH: 1.0, TWO: 0.8, THREE: 0.9}, {TORCH: 1.0, TWO: 1.1, THREE: 0.9})
    assert fastest(trial, [ONE, TWO, THREE]) == TWO
    assert trial.asked == [([TORCH, ONE, TWO, THREE], MOST_RUNS)] + [([TORCH, TWO, THREE], MOST_FINAL_RUNS)] * FINALS


def test_long_products_run_once_for_a_time() -> None:
    times = {TORCH: 1.0, ONE: 0.5}
    trial = Timed(times, times, times)
    assert fastest(trial, [ONE], LONG) == ONE
    assert [runs for _, runs in trial.asked] == [1, 1, 1]


@pytest.mark.parametrize("share, taken", [(WORTH - 0.001, ONE), (WORTH + 0.001, TORCH)])
def test_torch_s_own_stays_unless_another_is_worth_it(share: float, taken: bytes) -> None:
    times = {TORCH: 1.0, ONE: share}
    assert fastest(Timed(times, times, times), [ONE]) == taken


def test_what_does_not_run_is_not_timed() -> None:
    assert fastest(Timed(), [BROKEN]) == TORCH
    times = {TORCH: 1.0, ONE: 0.5}
    trial = Timed(times, times, times)
    assert fastest(trial, [BROKEN, ONE]) == ONE
    assert all(BROKEN not in algorithms for algorithms, _ in trial.asked)
