"""The scripts under benchmarks/ need a GPU to run; here: that they load, and what they compute without one."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from vitgraph import EncoderConfig, VisionEncoder
from vitgraph.core import Grid
from vitgraph.engine.cublaslt import Problem

FOLDER = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if "def main(" in path.read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    # A kernel's module decides at its import whether Triton interprets it.
    pytest.importorskip("triton")


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_explain_themselves(name: str, monkeypatch, capsys) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert stop.value.code == 0
    assert f"python benchmarks/{name}.py" in capsys.readouterr().out


def test_a_tower_without_its_techniques_computes_the_same() -> None:
    techniques = importlib.import_module("techniques")
    assert {*techniques.PATCHES, *techniques.SETTINGS, techniques.PREPARED} == set(techniques.ORDER)

    def make(**settings) -> VisionEncoder:
        settings.pop("attention", None)
        return VisionEncoder.from_config("qwen3_vl", device="cpu", config=EncoderConfig(**settings))

    grids = [(1, 8, 8), (1, 4, 6)]
    with make() as whole:
        x = torch.randn(88, whole.spec.patch_width)
        want = whole.encode_patches(x, grids)
    with techniques.encoder_without(techniques.ORDER, make) as plain:
        got = plain.encode_patches(x, grids)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.tokens, b.tokens, rtol=1e-4, atol=1e-5)


def test_online_requests_are_the_stated_mix() -> None:
    online = importlib.import_module("online")
    batches = online.requests()
    assert len(batches) == 400
    assert {len(grids) for grids in batches} == {1, 2, 3, 4}
    sides = [grid.h for grids in batches for grid in grids]
    assert set(sides) == {14, 20, 28, 42, 64}
    assert sides.count(20) / len(sides) == pytest.approx(0.3, abs=0.05)
    encoder = VisionEncoder.from_config("qwen3_vl", device="cpu", config=EncoderConfig(budgets=(256, 1024)))
    grids = [Grid(1, 42, 42), Grid(1, 14, 14)] * 3
    packs = online.GreedyPlanner(encoder.spec, encoder.budgets).plan(grids)
    # The smallest first: of six items those that one budget holds, then the others.
    assert [[piece.item for piece in pack.pieces] for pack in packs] == [[0, 2], [1, 3, 4, 5]]
    assert all(pack.budget is not None for pack in packs)
    x = torch.randn(sum(grid.patches for grid in grids), encoder.spec.patch_width)
    want = encoder.encode_patches(x, grids)
    encoder.engine.planner = online.GreedyPlanner(encoder.spec, encoder.budgets)
    for _ in range(2):
        # Several packs of several items each, which lie apart in the rows, and one pack.
        for many in (len(grids), 2, 1):
            own = encoder.encode_patches(x[: sum(grid.patches for grid in grids[:many])], grids[:many])
            for a, b in zip(own, want, strict=False):
                torch.testing.assert_close(a.tokens, b.tokens, rtol=1e-4, atol=1e-5)
    assert len(packs) > 1


def test_flops_of_the_tower_as_counted_by_hand() -> None:
    measuring = importlib.import_module("measuring")
    encoder = VisionEncoder.from_config("qwen3_vl", device="cpu")
    linear, attention = measuring.tower_flops(encoder, [Grid(1, 8, 8)])
    dim, mlp, out, layers, taps = 64, 112, 48, 3, 2
    per_row = encoder.spec.patch_width * dim + layers * (4 * dim * dim + 2 * dim * mlp)
    per_token = (1 + taps) * (4 * dim * 4 * dim + 4 * dim * out)
    assert linear == 2 * (64 * per_row + 16 * per_token)
    assert attention == layers * 4 * 64**2 * dim


def test_new_batches_of_the_host_path_differ_and_fit() -> None:
    host_path = importlib.import_module("host_path")
    for items in host_path.ITEMS:
        batches = host_path.fresh_batches(items, host_path.side_of(items))
        assert len({tuple(grids) for grids in batches}) == len(batches) == host_path.CALLS
        assert {len(grids) for grids in batches} == {items}
        assert max(sum(grid.patches for grid in grids) for grids in batches) <= host_path.MOST_PATCHES


def test_the_calls_that_the_host_path_times_do_not_follow_its_reference() -> None:
    host_path = importlib.import_module("host_path")
    python: list[float] = []
    seen = []
    calls = [lambda number=number: seen.append((number, len(python))) for number in range(host_path.CALLS)]
    for call in host_path.every_second_after_python(calls, python):
        call()
    timed = seen[host_path.WARMUP :: 2]
    assert len(timed) == host_path.RUNS == len(python[host_path.WARMUP // 2 :])
    assert all(before == number // 2 for number, before in timed), "none of them just ran the reference"
    assert all(before == number // 2 + 1 for number, before in seen[1::2])


def test_the_host_path_shows_the_round_in_which_plain_python_took_least() -> None:
    host_path = importlib.import_module("host_path")
    rounds = [{"python_us": 9.0, "before_us": 20.0}, {"python_us": 8.0, "before_us": 30.0}]
    assert host_path.quietest(rounds) is rounds[1]


def test_plans_are_compared_up_to_one_factor() -> None:
    plans = importlib.import_module("plans")
    found = plans.beside([11.0, 22.0, 33.0, 50.0, 55.0], [10.0, 20.0, 30.0, 40.0, 50.0])
    assert found["clock"] == pytest.approx(1.1)
    assert found["shares"] == pytest.approx([0, 0, 0, 50 / 44 - 1, 0])
    assert found["off"] == 1 and found["most"] == pytest.approx(50 / 44 - 1)


def test_products_are_timed_both_ways_with_many_weights() -> None:
    gemms = importlib.import_module("gemms")
    problem, algorithm, asked = Problem(8, 6, 4, "bias", torch.bfloat16), b"\x01", []

    class Trial:
        def times(self, *given):
            asked.append(given)
            return [0.003, 0.001 * len(asked)]

    found = gemms.line(Trial(), problem, algorithm, torch.device("cpu"))
    assert found["torch_us"] == pytest.approx(3.0) and found["chosen_us"] == pytest.approx((gemms.ROUNDS + 1) / 2)
    assert (found["rows"], found["columns"], found["inner"], found["kind"]) == (8, 6, 4, "bias")
    assert not found["is_torch"]
    for one, algorithms, weights, runs in asked:
        assert (one, algorithms) == (problem, [gemms.TORCH, algorithm])
        assert {(weight.shape, weight.dtype) for weight in weights} == {((6, 4), torch.bfloat16)}
        assert len({weight.data_ptr() for weight in weights}) == gemms.MOST_WEIGHTS <= runs
    assert gemms.line(Trial(), problem, gemms.TORCH, torch.device("cpu"))["is_torch"]
