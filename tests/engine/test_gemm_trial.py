"""Which algorithm a trial takes, by made-up times; real ones are measured in tests/gpu."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from vitgraph.engine import gemm_trial
from vitgraph.engine.cublaslt import Problem, Setting
from vitgraph.engine.gemm_trial import (
    FINALISTS,
    FINALS,
    HOST_MARGIN,
    LEAD_US,
    MOST_FINAL_RUNS,
    MOST_FIRST_RUNS,
    NEAR,
    TORCH,
    WORTH,
    Trial,
    _guess,
)

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
    first = {TORCH: 0.76, ONE: 0.77, TWO: 0.73, THREE: 0.7, FOUR: 0.75}
    # THREE was lucky, and TWO is not unlucky twice.
    last = {TORCH: 1.0, TWO: 0.8, THREE: 0.9, FOUR: 0.95}
    trial = Timed(first, last, last | {TWO: 1.1})
    assert fastest(trial, [ONE, TWO, THREE, FOUR]) == TWO
    finalists = [TORCH, TWO, THREE, FOUR]
    assert len(finalists) == FINALISTS + 1
    assert trial.asked == [([TORCH, ONE, TWO, THREE, FOUR], MOST_FIRST_RUNS)] + [(finalists, MOST_FINAL_RUNS)] * FINALS


def test_what_is_far_behind_does_not_meet_again() -> None:
    first = {TORCH: 0.5 * NEAR + 0.01, ONE: 0.5, TWO: 0.5 * NEAR - 0.01, THREE: 0.5 * NEAR + 0.02}
    trial = Timed(first, *[{ONE: 0.5, TWO: 0.49}] * FINALS)
    assert fastest(trial, [ONE, TWO, THREE]) == TWO, "of two that are near each other none must be WORTH it"
    assert [algorithms for algorithms, _ in trial.asked[1:]] == [[ONE, TWO]] * FINALS


@pytest.mark.parametrize("best, other", [(ONE, TORCH), (TORCH, ONE)])
def test_one_that_leads_by_far_needs_no_finals(best: bytes, other: bytes) -> None:
    trial = Timed({best: 0.5, other: 0.5 * NEAR + 0.01})
    assert fastest(trial, [ONE]) == best


def test_a_debug_log_tells_all_times(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", "vitgraph"):
        fastest(Timed({TORCH: 0.5, ONE: 0.5}, {TORCH: 0.9, ONE: 0.4}, {TORCH: 0.8, ONE: 0.6}), [ONE])
    first, finals = caplog.messages
    assert first == "256 x 1152 x 1152 plain bfloat16, tile/cluster/schedule us: torch 500.00, 1/2/5 500.00"
    assert finals.endswith(" us: torch 800.00, 1/2/5 400.00")


class Clocks:
    """A host that queues work and a GPU that does it, microseconds.

    Args:
        host_us: takes the host for a run.
        gpu_us: takes each algorithm.
        stalls: more that a run takes the host, by its number.
    """

    device = torch.device("cpu")

    def __init__(self, host_us: float, gpu_us: dict[bytes, float], stalls: dict[int, float]) -> None:
        self.host_us, self.gpu_us, self.stalls = host_us, gpu_us, stalls
        self.host = self.gpu = 0.0
        self.runs = 0
        self.leads: list[float] = []
        self.weights: list[Tensor] = []

    def perf_counter(self) -> float:
        return self.host / 1e6

    def spin(self, microseconds: float) -> None:
        self.leads.append(microseconds)
        self.gpu = max(self.gpu, self.host) + microseconds

    def run(self, problem: Problem, algorithm: bytes, x: Tensor, weight: Tensor, *others: Tensor | None) -> None:
        self.weights.append(weight)
        self.host += self.host_us + self.stalls.get(self.runs, 0.0)
        self.gpu = max(self.gpu, self.host) + self.gpu_us[algorithm]
        self.runs += 1


class ClockMark:
    """An event of these clocks."""

    def __init__(self, clocks: Clocks) -> None:
        self.clocks, self.at = clocks, 0.0

    def record(self) -> None:
        self.at = max(self.clocks.gpu, self.clocks.host)

    def synchronize(self) -> None:
        self.clocks.host = max(self.clocks.host, self.at)

    def query(self) -> bool:
        return self.at <= self.clocks.host

    def elapsed_time(self, after: ClockMark) -> float:
        return (after.at - self.at) / 1e3


GPU_US = {ONE: 8.0, TWO: 9.0, THREE: 40.0}
LARGER = Problem(2048, 2048, 2048, "plain", torch.bfloat16)
"""Takes an H100 longer than the host below."""


@pytest.fixture
def timed_by(monkeypatch: pytest.MonkeyPatch):
    """A trial by such clocks."""

    def make(host_us: float, stalls: dict[int, float]) -> tuple[Trial, Clocks]:
        clocks = Clocks(host_us, GPU_US, stalls)
        monkeypatch.setattr(gemm_trial, "spin", clocks.spin)
        monkeypatch.setattr(gemm_trial, "time", clocks)
        monkeypatch.setattr(Trial, "_marks", lambda self, count: [ClockMark(clocks) for _ in range(count)])
        return Trial(clocks, [SHORT, LARGER]), clocks  # type: ignore[arg-type]

    return make


def test_no_run_takes_the_weights_that_the_runs_before_it_took(timed_by) -> None:
    trial, clocks = timed_by(2.0, {})
    weights = [torch.full((1,), float(number)) for number in range(5)]
    timed: list[float] = []
    for _ in range(2):
        clocks.weights.clear()
        times = trial.times(SHORT, [ONE, TWO, THREE], weights, 3)
        assert [time * 1e3 for time in times] == pytest.approx([GPU_US[own] for own in (ONE, TWO, THREE)])
        timed += [weight.item() for weight in clocks.weights[1:]]  # the first run of each time is not timed
    assert len(timed) == 2 * 3 * 3
    assert all((before + 1) % len(weights) == after for before, after in pairwise(timed))


def test_long_products_run_once_for_a_time() -> None:
    times = {TORCH: 1.0, ONE: 0.95}
    trial = Timed(times, times, times)
    assert fastest(trial, [ONE], LONG) == ONE
    assert [runs for _, runs in trial.asked] == [1, 1, 1]


@pytest.mark.parametrize("share, taken", [(WORTH - 0.001, ONE), (WORTH + 0.001, TORCH)])
def test_torch_s_own_stays_unless_another_is_worth_it(share: float, taken: bytes) -> None:
    times = {TORCH: 1.0, ONE: share}
    assert fastest(Timed(times, times, times), [ONE]) == taken


def test_what_does_not_run_is_not_timed() -> None:
    assert fastest(Timed(), [BROKEN]) == TORCH
    trial = Timed({TORCH: 1.0, ONE: 0.5})
    assert fastest(trial, [BROKEN, ONE]) == ONE
    assert trial.asked[0][0] == [TORCH, ONE]


def test_all_run_once_for_each_product_before_they_are_timed() -> None:
    # An algorithm is another kernel for another product, perhaps, and kernels are loaded when they run first.
    trial = Timed(*[{TORCH: 1.0, ONE: 0.5}] * 3)
    for count, problem in enumerate((SHORT, SHORT._replace(rows=512), LONG), 1):
        assert fastest(trial, [ONE], problem) == ONE
        assert trial.ran == [ONE, TORCH] * count


@pytest.mark.parametrize("host_us", [2.0, 20.0, 60.0])
@pytest.mark.parametrize("stalls", [{}, {6: 3000.0}, {0: 3000.0}, {9: 500.0}])
def test_times_are_the_gpu_s_however_slow_the_host_is(timed_by, host_us: float, stalls: dict[int, float]) -> None:
    trial, _ = timed_by(host_us, stalls)
    for _ in range(2):
        times = trial.times(SHORT, [ONE, TWO, THREE], [torch.zeros(1)], 4)
        assert [time * 1e3 for time in times] == pytest.approx([8.0, 9.0, 40.0])


def test_the_gpu_waits_no_longer_than_the_host_needs(timed_by) -> None:
    trial, clocks = timed_by(20.0, {})
    leads = []
    for problem in (SHORT, SHORT, LARGER):
        clocks.leads.clear()
        trial.times(problem, [ONE, TWO, THREE], [torch.zeros(1)], 4)
        leads.append([*clocks.leads])
    each = 20.0 * 13 / 12  # one run more than are timed
    assert leads[0][0] == LEAD_US, "nothing is known of the host yet"
    assert leads[1] == pytest.approx([LEAD_US + 12 * (HOST_MARGIN * each - _guess(SHORT))]), "in time at once"
    assert leads[2][0] == LEAD_US
