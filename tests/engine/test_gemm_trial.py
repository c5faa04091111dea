"""Which algorithm a trial takes, by made-up times; real ones are measured in tests/gpu."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from vitgraph.engine import gemm_trial
from vitgraph.engine.cublaslt import Problem, Setting
from vitgraph.engine.gemm_trial import FINALISTS, FINALS, MOST_FINAL_RUNS, MOST_FIRST_RUNS, TORCH, WORTH, Trial

ONE, TWO, THREE, FOUR, BROKEN = (bytes([number]) for number in range(1, 6))
SHORT, LONG = (Problem(rows, 1152, 1152, "plain", torch.bfloat16) for rows in (256, 65536))


class Library:
    """Runs nothing; BROKEN fails."""

    device = torch.device("cpu")

    def setting(self, algorithm: bytes) -> Setting:
        return Setting(algorithm[0], 2, 5)

    def run(self, problem: Problem, algorithm: bytes, *tensors: Tensor | None) -> None:
        if algorithm == BROKEN:
            raise RuntimeError("does not run")


class Timed(Trial):
    """Takes its times from a script: per round, milliseconds of each algorithm."""

    def __init__(self, *script: dict[bytes, float]) -> None:
        small = Problem(8, 8, 8, "plain", torch.bfloat16)
        super().__init__(Library(), [small])  # type: ignore[arg-type]
        self.script, self.asked = iter(script), list[tuple[list[bytes], int]]()
        self.ran: list[bytes] = []

    def _run(self, problem: Problem, algorithm: bytes, weight: Tensor) -> None:
        self.ran.append(algorithm)
        self._library.run(problem, algorithm, weight, weight, None, weight)

    def times(self, problem: Problem, algorithms: Sequence[bytes], weights: Sequence[Tensor], runs: int):
        self.asked.append((list(algorithms), runs))
        times = next(self.script)
        return [times[algorithm] for algorithm in algorithms]


def fastest(trial: Timed, candidates: Sequence[bytes], problem: Problem = SHORT) -> bytes:
    return trial.fastest(problem, candidates, [torch.zeros(1)])


def test_the_finals_decide_among_the_fastest() -> None:
    first = {TORCH: 1.0, ONE: 0.9, TWO: 0.8, THREE: 0.7, FOUR: 0.85}
    # THREE was lucky, and TWO is not unlucky twice.
    last = {TORCH: 1.0, TWO: 0.8, THREE: 0.9, FOUR: 0.95}
    trial = Timed(first, last, last | {TWO: 1.1})
    assert fastest(trial, [ONE, TWO, THREE, FOUR]) == TWO
    finalists = [TORCH, TWO, THREE, FOUR]
    assert len(finalists) == FINALISTS + 1
    assert trial.asked == [([TORCH, ONE, TWO, THREE, FOUR], MOST_FIRST_RUNS)] + [(finalists, MOST_FINAL_RUNS)] * FINALS


def test_a_debug_log_tells_all_times(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", "vitgraph"):
        fastest(Timed({TORCH: 1.0, ONE: 0.5}, {TORCH: 0.9, ONE: 0.4}, {TORCH: 0.8, ONE: 0.6}), [ONE])
    first, finals = caplog.messages
    assert first == "256 x 1152 x 1152 plain bfloat16, tile/cluster/schedule us: torch 1000.00, 1/2/5 500.00"
    assert finals.endswith(" us: torch 800.00, 1/2/5 400.00")


class Mark:
    """An event that the GPU never has yet, a millisecond after the one before."""

    def record(self) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return False

    def elapsed_time(self, after: Mark) -> float:
        return 1.0


def test_no_run_takes_the_weights_that_the_runs_before_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm_trial, "spin", lambda microseconds: None)
    monkeypatch.setattr(Trial, "_marks", lambda self, count: [Mark() for _ in range(count)])
    weights, taken = [torch.full((1,), float(number)) for number in range(5)], list[float]()

    class Watched(Library):
        def run(self, problem: Problem, algorithm: bytes, *tensors: Tensor | None) -> None:
            _, weight, *_ = tensors
            assert weight is not None
            taken.append(weight.item())

    trial = Trial(Watched(), [SHORT])  # type: ignore[arg-type]
    timed: list[float] = []
    for _ in range(2):
        taken.clear()
        assert trial.times(SHORT, [ONE, TWO, THREE], weights, 3) == [1 / 3] * 3
        timed += taken[1:]  # the first run of each time is not timed
    assert len(timed) == 2 * 3 * 3
    assert all((before + 1) % len(weights) == after for before, after in pairwise(timed))


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
    assert trial.ran == [BROKEN, ONE], "each once before the times, in which nothing should be loaded"
    assert all(BROKEN not in algorithms for algorithms, _ in trial.asked)


def test_a_kernel_is_loaded_once_for_all_products_of_its_kind() -> None:
    times = {TORCH: 1.0, ONE: 0.5}
    trial = Timed(*[times] * 9)
    for problem in (SHORT, LONG, SHORT._replace(kind="bias")):
        assert fastest(trial, [ONE], problem) == ONE
    assert trial.ran == [ONE, ONE]
