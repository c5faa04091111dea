"""Algorithms of GEMMs: what is offered, what is measured and kept, and that a tower's products run by what was chosen.

A made-up library stands for cuBLASLt here; the real one runs in tests/gpu.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitgraph import EncoderConfig, VisionEncoder
from vitgraph.core import Grid
from vitgraph.engine import gemms as module
from vitgraph.engine.cublaslt import Problem, Setting
from vitgraph.engine.gemm_candidates import (
    ALONE,
    BEST,
    CLUSTERS,
    COOPERATIVE,
    MOST_PINGPONG,
    PINGPONG,
    TILES,
    WORTH_A_TRIAL,
    by_predicted_time,
    candidates,
)
from vitgraph.engine.gemm_trial import TORCH
from vitgraph.engine.gemms import FEW_USES, FINE_ROWS, GENERATION, MOST_ROWS, Gemms, make_gemms, problem_of
from vitgraph.layers.gemm import Product, add_product, linear, linear_gelu_tanh, products_by
from vitgraph.layers.merger import PatchMerger
from vitgraph.layers.mlp import Mlp

ONE, TWO = b"\x01", b"\x02"
BF16 = torch.bfloat16


class Library:
    """Runs products as torch does, by algorithms named ONE and TWO."""

    device, gpu, version, is_hopper, multiprocessors = torch.device("cpu"), "a GPU", 7, False, 132

    def __init__(self) -> None:
        self.ran: list[tuple[Problem, bytes]] = []
        self.refused: set[bytes] = set()

    def named(self, problem: Problem) -> list[bytes]:
        return [ONE, TWO]

    def accepts(self, problem: Problem, algorithm: bytes) -> bool:
        return algorithm in (ONE, TWO) and algorithm not in self.refused

    def run(self, problem: Problem, algorithm: bytes, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor):
        assert (x.shape, weight.shape) == ((problem.rows, problem.inner), (problem.columns, problem.inner))
        self.ran.append((problem, algorithm))
        found = F.linear(x, weight, bias)
        if problem.kind == "gelu":
            found = F.gelu(found, approximate="tanh")
        out.copy_(out + found if problem.kind == "add" else found)


class Trial:
    """Finds TWO faster wherever it is tried, and notes what was tried."""

    tried: ClassVar[list[tuple[Problem, list[bytes], int]]] = []

    def __init__(self, library: Library, problems: list[Problem]) -> None:
        self.tried.clear()

    def fastest(self, problem: Problem, algorithms: list[bytes], weights: list[Tensor]) -> bytes:
        self.tried.append((problem, list(algorithms), len(weights)))
        return algorithms[-1] if algorithms else TORCH


@pytest.fixture(autouse=True)
def _made_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VITGRAPH_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "Trial", Trial)
    # What torch allocates on the CPU begins at multiples of 64.
    monkeypatch.setattr(module, "ALIGNMENT", 1)
    Trial.tried.clear()


def make() -> tuple[Gemms, Library]:
    library = Library()
    return Gemms(library), library  # type: ignore[arg-type]


def weights_of(*shapes: tuple[int, int]) -> list[Tensor]:
    return [torch.randn(*shape).to(BF16) for shape in shapes]


def test_products_of_layers_are_offered_with_what_becomes_of_them() -> None:
    offered: list[Product] = []
    x = torch.randn(8, 16)
    with products_by(lambda product: offered.append(product)):
        mlp = Mlp(16, 32)
        mlp(x)
        linear(x, mlp.fc1.weight)
        add_product(x.clone(), torch.randn(8, 32), mlp.fc2.weight.detach())
        linear(x, mlp.fc1.weight.detach(), mlp.fc1.bias.detach(), torch.empty(8, 32))
    assert [product.kind for product in offered] == ["gelu", "bias", "plain", "add", "bias"]
    assert [product.out is None for product in offered] == [True, True, True, False, False]
    linear(x, mlp.fc1.weight)
    assert len(offered) == 5, "outside of the block nothing is"


def test_what_the_handler_makes_is_taken_and_nothing_it_leaves_is_lost() -> None:
    x, (weight,) = torch.randn(4, 8), [torch.randn(6, 8)]
    bias, made = torch.randn(6), torch.full((4, 6), 3.0)
    with products_by(lambda product: made):
        assert linear(x, weight, bias) is made
        assert linear_gelu_tanh(x, weight, bias) is made
        assert add_product(torch.zeros(4, 6), x, weight) is made
        with products_by(lambda product: None):
            assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
            out = torch.empty(4, 6)
            assert linear(x, weight, None, out) is out and torch.equal(out, x @ weight.t())
            assert torch.equal(linear(x, weight, bias, out), F.linear(x, weight, bias))
            assert torch.equal(linear_gelu_tanh(x, weight, bias), F.gelu(F.linear(x, weight, bias), approximate="tanh"))
            torch.testing.assert_close(add_product(made.clone(), x, weight), made + x @ weight.t())
        assert linear(x, weight) is made, "the block outside goes on"


def test_a_handler_is_of_its_thread_and_gone_after_an_error() -> None:
    x, weight = torch.randn(2, 4), torch.randn(3, 4)
    found: list[Tensor] = []
    with pytest.raises(ZeroDivisionError), products_by(lambda product: x):
        thread = threading.Thread(target=lambda: found.append(linear(x, weight)))
        thread.start()
        thread.join()
        raise ZeroDivisionError
    assert torch.equal(found[0], F.linear(x, weight))
    assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_torch_compile_sees_no_handler() -> None:
    x, weight, bias = torch.randn(2, 4), torch.randn(3, 4), torch.randn(3)
    compiled = torch.compile(lambda: (linear(x, weight, bias), linear_gelu_tanh(x, weight, bias)), backend="eager")
    with products_by(lambda product: torch.zeros(2, 3)):
        plain, gelu = compiled()
    torch.testing.assert_close(plain, F.linear(x, weight, bias))
    torch.testing.assert_close(gelu, F.gelu(F.linear(x, weight, bias), approximate="tanh"))


def test_problems_are_told_from_what_the_library_cannot_take(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(8, 16).to(BF16), torch.randn(4, 16).to(BF16)
    bias, out = torch.randn(4).to(BF16), torch.zeros(8, 4).to(BF16)
    assert problem_of(Product("bias", x, weight, bias)) == Problem(8, 4, 16, "bias", BF16)
    assert problem_of(Product("add", x, weight, None, out)) == Problem(8, 4, 16, "add", BF16)
    bad = [
        Product("plain", x.float(), weight.float()),
        Product("plain", x.half(), weight),
        Product("plain", x.t().contiguous().t(), weight),
        Product("plain", x, weight.t().contiguous().t()),
        Product("plain", x[:0], weight),
        Product("plain", x[0], weight),
        Product("bias", x, weight, bias.float()),
        Product("bias", x, weight, bias.repeat(2)[::2]),
        Product("add", x, weight, None, torch.zeros(8, 8).to(BF16)[:, :4]),
    ]
    assert [problem_of(product) for product in bad] == [None] * len(bad)
    monkeypatch.setattr(module, "ALIGNMENT", 256)
    block = torch.zeros(4096, dtype=BF16)
    first = -block.data_ptr() % 256 // 2
    aligned = block[first : first + 128].view(8, 16)
    assert problem_of(Product("plain", aligned, block[first + 128 : first + 256].view(8, 16))) is not None
    assert problem_of(Product("plain", block[first + 8 : first + 136].view(8, 16), aligned)) is None


def test_what_a_forward_does_is_seen_and_runs_as_ever() -> None:
    gemms, library = make()
    x, (first, second, once) = torch.randn(8, 16).to(BF16), weights_of((4, 16), (4, 16), (32, 16))
    with gemms.seeing() as seen, gemms.applied():
        results = [linear(x, first), linear(x, second), linear(x, once)]
    assert not library.ran and torch.equal(results[1], F.linear(x, second))
    assert list(seen) == [Problem(8, 4, 16, "plain", BF16), Problem(8, 32, 16, "plain", BF16)]
    assert [weight.data_ptr() for weight in seen[Problem(8, 4, 16, "plain", BF16)]] == [
        first.data_ptr(),
        second.data_ptr(),
    ]


SEEN = {
    Problem(64, 4, 16, "plain", BF16): weights_of((4, 16), (4, 16)),
    Problem(16, 8, 32, "gelu", BF16): weights_of((8, 32), (8, 32), (8, 32)),
    Problem(65, 4, 16, "bias", BF16): weights_of((4, 16), (4, 16)),
    Problem(64, 9, 16, "add", BF16): weights_of((9, 16)),
}
"""Of a forward of 64 rows: one whose rows are those, one with a quarter of them, one with a row more, and one alone."""


def test_algorithms_are_chosen_for_all_budgets_and_kept(tmp_path: Path) -> None:
    gemms, library = make()
    told: list[bool] = []
    gemms.choose(SEEN, 64, [128, 64, 66, MOST_ROWS + 64], lambda: told.append(True))
    wanted = [Problem(rows, 4, 16, "plain", BF16) for rows in (64, 66, 128)]
    wanted += [Problem(rows, 8, 32, "gelu", BF16) for rows in (16, 32)] + [
        Problem(rows, 4, 16, "bias", BF16) for rows in (65, 130)
    ]
    assert {problem for problem, *_ in Trial.tried} == set(wanted)
    assert [count for problem, _, count in Trial.tried if problem.kind == "gelu"] == [3, 3]
    assert told == [True]
    (kept,) = json.loads((tmp_path / "gemms.json").read_text()).items()
    assert kept == (f"a GPU | cuBLASLt 7 | {GENERATION}", {problem.name: TWO.hex() for problem in wanted})

    x, (weight, _) = torch.randn(66, 16).to(BF16), SEEN[Problem(64, 4, 16, "plain", BF16)]
    with gemms.applied():
        assert torch.equal(linear(x, weight), F.linear(x, weight))
        linear(torch.cat([x, x]), weight)
    assert library.ran == [(Problem(66, 4, 16, "plain", BF16), TWO)] and gemms.runs == 1


def test_what_was_kept_is_not_measured_again(tmp_path: Path) -> None:
    make()[0].choose(SEEN, 64, [64])
    again, library = make()
    again.choose(SEEN, 64, [64], lambda: pytest.fail("nothing is measured"))
    with again.applied():
        linear(torch.randn(64, 16).to(BF16), SEEN[Problem(64, 4, 16, "plain", BF16)][0])
    assert [algorithm for _, algorithm in library.ran] == [TWO]
    # Another budget later adds to the file, and takes nothing from it.
    again.choose(SEEN, 64, [128])
    (entry,) = json.loads((tmp_path / "gemms.json").read_text()).values()
    assert len(entry) == 6


@pytest.mark.parametrize("spoil", ["refused", "not hexadecimal", "a number", "not JSON", "a list", "another GPU"])
def test_what_was_kept_and_is_of_no_use_is_measured_again(spoil: str, tmp_path: Path) -> None:
    make()[0].choose(SEEN, 64, [64])
    path = tmp_path / "gemms.json"
    ((key, entry),) = json.loads(path.read_text()).items()
    again, library = make()
    if spoil == "refused":
        library.refused.add(TWO)
    elif spoil == "another GPU":
        library.gpu = "another one"
    else:
        value = {"not hexadecimal": "zz", "a number": 5}.get(spoil, "")
        text = json.dumps({key: dict.fromkeys(entry, value)})
        path.write_text({"not JSON": "{", "a list": json.dumps({key: [1]})}.get(spoil, text))
    again.choose(SEEN, 64, [64])
    assert len(Trial.tried) == 3
    if spoil == "another GPU":
        assert len(json.loads(path.read_text())) == 2


def test_torch_s_own_algorithm_is_kept_as_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trial, "fastest", lambda *_: TORCH)
    make()[0].choose(SEEN, 64, [64])
    again, library = make()
    again.choose(SEEN, 64, [64], lambda: pytest.fail("nothing is measured"))
    with again.applied():
        linear(torch.randn(64, 16).to(BF16), SEEN[Problem(64, 4, 16, "plain", BF16)][0])
    assert not library.ran and not again.runs


def test_what_cannot_be_measured_is_left_to_torch(monkeypatch: pytest.MonkeyPatch, caplog, tmp_path: Path) -> None:
    def fastest(self: Trial, problem: Problem, algorithms: list[bytes], weights: list[Tensor]) -> bytes:
        if problem.kind == "gelu":
            return TWO
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(Trial, "fastest", fastest)
    gemms, library = make()
    gemms.choose(SEEN, 64, [64])
    assert "no memory left" in caplog.text
    (entry,) = json.loads((tmp_path / "gemms.json").read_text()).values()
    assert entry == {Problem(16, 8, 32, "gelu", BF16).name: TWO.hex()}
    with gemms.applied():
        linear(torch.randn(64, 16).to(BF16), SEEN[Problem(64, 4, 16, "plain", BF16)][0])
    assert not library.ran


@pytest.mark.parametrize("uses", [FEW_USES, FEW_USES - 1])
def test_of_many_rows_or_few_uses_every_other_problem_is_searched_and_the_next_takes_after_it(uses: int) -> None:
    gemms, library = make()
    rows = [FINE_ROWS - 64, FINE_ROWS, *range(FINE_ROWS + 64, FINE_ROWS + 64 * 6, 64)]
    problem = Problem(64, 4, 16, "plain", BF16)
    gemms.choose({problem: SEEN[problem] * (uses // 2) + SEEN[problem][: uses % 2]}, 64, reversed(rows))
    assert [problem.rows for problem, *_ in Trial.tried] == rows
    both, after = [ONE, TWO], [TWO]
    fine = 1 if uses == FEW_USES else 0
    assert [tried for _, tried, _ in Trial.tried] == [both] * fine + ([both, after] * 4)[: len(rows) - fine]
    library.refused.add(TWO)
    assert not gemms._acceptable(Problem(1, 1, 1, "plain", BF16), TWO)


def test_a_tower_runs_by_the_chosen_algorithms_on_static_buffers_alone() -> None:
    encoder = VisionEncoder.from_config(
        "qwen3_vl", device="cpu", dtype="bfloat16", config=EncoderConfig(budgets=(16, 32))
    )
    grids = [Grid(1, 8, 8)]
    x = torch.randn(64, encoder.spec.patch_width)
    want = encoder.encode_patches(x, grids)[0].tokens
    gemms, library = make()
    encoder.engine.gemms = encoder.engine.ladder._gemms = gemms
    encoder.engine.ladder._choose_algorithms([1, 0])
    assert {problem.kind for problem, *_ in Trial.tried} >= {"bias", "gelu"}
    assert {problem.rows for problem, *_ in Trial.tried} >= {64, 128}
    assert not library.ran
    got = encoder.encode_patches(x, grids)[0].tokens
    runs = gemms.runs
    assert runs == len(library.ran) > 0
    assert torch.equal(got, encoder.encode_patches(x, grids, mode="padded")[0].tokens)
    assert gemms.runs == 2 * runs
    encoder.encode_patches(x, grids, mode="eager")
    assert gemms.runs == 2 * runs
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


def test_a_padded_run_before_any_capture_runs_what_graphs_will(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = VisionEncoder.from_config(
        "qwen3_vl", device="cpu", dtype="bfloat16", config=EncoderConfig(budgets=(16, 32))
    )
    gemms, _ = make()
    encoder.engine.gemms = encoder.engine.ladder._gemms = gemms
    encoder.engine.ladder._settled.clear()
    choose, asked = gemms.choose, []
    monkeypatch.setattr(gemms, "choose", lambda seen, rows, *rest: (asked.append(rows), choose(seen, rows, *rest)))
    for grids in ([Grid(1, 8, 8)], [Grid(1, 8, 12)]):
        x = torch.randn(sum(grid.patches for grid in grids), encoder.spec.patch_width)
        before = gemms.runs
        first = encoder.encode_patches(x, grids, mode="padded")[0].tokens
        assert gemms.runs > before
        encoder.engine.ladder._settle([0, 1])  # as a capture does
        assert torch.equal(encoder.encode_patches(x, grids, mode="padded")[0].tokens, first)
        assert torch.equal(encoder.encode_patches(x, grids)[0].tokens, first)
    assert asked == [64, 64, 64], "once for the first budget, and in the two captures"


def test_algorithms_are_chosen_where_that_is_of_use() -> None:
    assert make_gemms(torch.device("cpu"), BF16) is None
    assert make_gemms(torch.device("cuda", 0), torch.float32) is None
    assert VisionEncoder.from_config("qwen3_vl", device="cpu").engine.gemms is None


class Hopper(Library):
    is_hopper = True
    settings: ClassVar = {ONE: Setting(20, 3, 1), TWO: Setting(20, 3, 2)}

    def setting(self, algorithm: bytes) -> Setting:
        return self.settings[algorithm]

    def hopper(self, problem: Problem, setting: Setting) -> bytes | None:
        return None if setting.schedule == 5 else repr(setting).encode()


def test_on_hopper_few_are_tried() -> None:
    assert Hopper.settings[ONE] in WORTH_A_TRIAL and Hopper.settings[TWO] not in WORTH_A_TRIAL
    for rows in (400, 1600, MOST_ROWS):
        problem = Problem(rows, 1152, 4352, "add", BF16)
        ranked = by_predicted_time(problem, 132)[0]
        assert len(ranked) == len(set(ranked)) == len(TILES) * len(CLUSTERS)
        there = [repr(setting).encode() for setting in ranked if setting.schedule != 5]
        assert candidates(Hopper(), problem) == [ONE, *there[:BEST]]  # type: ignore[arg-type]
    assert candidates(Library(), problem) == [ONE, TWO]  # type: ignore[arg-type]


class Cooperative(Hopper):
    """Has every kernel but the cooperative one of 64 x 64."""

    def hopper(self, problem: Problem, setting: Setting) -> bytes | None:
        return None if setting == Setting(TILES[64, 64], ALONE, COOPERATIVE) else repr(setting).encode()


@pytest.mark.parametrize("rows, columns, tiles", [
    (256, 3456, [(128, 64), (64, 128)]),
    (400, 1152, [(64, 80)]),  # 64 x 64 leads
    (4096, 3456, []),  # many rounds
    (1764, 2304, []),  # one round of large tiles, which are cooperative anyhow
    (576, 3456, [(128, 144), (128, 160)]),  # not 192 x 96, which stands between them
])  # fmt: skip
def test_where_one_round_makes_the_output_small_tiles_are_cooperative_too(
    rows: int, columns: int, tiles: list[tuple[int, int]]
) -> None:
    problem = Problem(rows, columns, 1152, "bias", BF16)
    tried = candidates(Cooperative(), problem)  # type: ignore[arg-type]
    best = [repr(setting).encode() for setting in by_predicted_time(problem, 132)[0]][:BEST]
    assert tried == [ONE, *best, *(repr(Setting(TILES[tile], ALONE, COOPERATIVE)).encode() for tile in tiles)]


def sides(setting: Setting) -> tuple[int, int]:
    """Columns and rows of a setting's tiles."""
    return next(tile for tile, number in TILES.items() if number == setting.tile)


def blocks(setting: Setting, rows: int, columns: int) -> int:
    """Of the whole clusters that cover an output."""
    (wide, high), (across, down) = sides(setting), CLUSTERS[setting.cluster]
    return -(-columns // (wide * across)) * across * -(-rows // (high * down)) * down


def rounds(setting: Setting, rows: int, columns: int) -> int:
    """On 132 multiprocessors, 120 of which hold large clusters."""
    return -(-blocks(setting, rows, columns) // (120 if setting.cluster in (4, 9) else 132))


@pytest.mark.parametrize(
    "rows, columns, first", [(1600, 1152, BEST), (576, 3456, BEST), (400, 1152, BEST), (784, 3456, 2)]
)
def test_the_best_tiles_need_one_round_where_that_is_possible(rows: int, columns: int, first: int) -> None:
    """132 multiprocessors make tiles of at most 192 x 256."""
    assert rows * columns <= 132 * 192 * 256
    best = by_predicted_time(Problem(rows, columns, 1152, "bias", BF16), 132)[0][:first]
    assert [rounds(setting, rows, columns) for setting in best] == [1] * first
    # The smallest such tile is nearly as small as one of them: it computes least beside the output.
    smallest = min(w * h for w, h in TILES if -(-columns // w) * -(-rows // h) <= 132)
    assert min(wide * high for wide, high in map(sides, best)) <= 1.1 * smallest


def test_many_rounds_are_few_idle_ones() -> None:
    for setting in by_predicted_time(Problem(8192, 4352, 1152, "gelu", BF16), 132)[0][:BEST]:
        wide, high = sides(setting)
        assert rounds(setting, 8192, 4352) * 132 * wide * high < 1.15 * 8192 * 4352


def test_clusters_share_loads_and_pay_for_it_in_idle_multiprocessors() -> None:
    def order(rows: int) -> list[int]:
        ranked, _ = by_predicted_time(Problem(rows, 1024, 4096, "add", BF16), 132)
        return [setting.cluster for setting in ranked if sides(setting) == (128, 128)]

    # 8 x 12 tiles fit in one round in every cluster, 8 x 15 where 4 of them need not divide the 15; of 8 x 16 those in
    # large clusters take two.
    assert order(1536) == [9, 4, 3, 2]
    assert order(1920)[0] == 4
    assert order(2048)[0] == 3 and set(order(2048)[2:]) == {4, 9}


def test_large_tiles_are_cooperative() -> None:
    ranked, _ = by_predicted_time(Problem(8, 8, 8, "bias", BF16), 132)
    schedules = {sides(setting): setting.schedule for setting in ranked}
    assert {tile for tile, schedule in schedules.items() if schedule == PINGPONG} == {
        (wide, high) for wide, high in TILES if wide * high <= MOST_PINGPONG
    }
    assert schedules[128, 192] == schedules[192, 128] == COOPERATIVE


def test_tiles_have_the_library_s_numbers() -> None:
    # As cublasLt.h has them.
    known = {(64, 64): 15, (64, 80): 318, (64, 240): 335, (128, 128): 20, (128, 144): 406, (128, 240): 416}
    known |= {(192, 80): 456, (192, 96): 458, (192, 144): 463, (192, 192): 209, (192, 256): 210, (128, 160): 29}
    assert {tile: TILES[tile] for tile in known} == known
    assert len(set(TILES.values())) == len(TILES) == 3 * 13


def test_layers_without_bias_or_in_place_give_what_torch_gives() -> None:
    gemms, _ = make()
    merger = PatchMerger(16, 2, 8, 1e-6).to(BF16).requires_grad_(False)
    x, out = torch.randn(16, 16).to(BF16), torch.empty(4, 8, dtype=BF16)
    with gemms.seeing() as seen, gemms.applied():
        want = merger(x)
        merger(x, out)
    assert torch.equal(out, want)
    assert [problem.columns for problem in seen] == [64, 8]
