"""On a GPU: products by every algorithm of cuBLASLt that may be chosen are right, and the choice is measured once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitgraph import EncoderConfig, VisionEncoder
from vitgraph.core import Grid
from vitgraph.engine import gemms as module
from vitgraph.engine.cublaslt import MOST_NAMED, CublasLt, Problem, cublaslt
from vitgraph.engine.gemm_candidates import BEST, candidates
from vitgraph.engine.gemm_trial import TORCH, Trial
from vitgraph.engine.gemms import make_gemms
from vitgraph.layers.gemm import Kind

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPES = [(64, 1152, 1152), (784, 3456, 1152), (1600, 1152, 4352), (2304, 4352, 1152), (9216, 1152, 1152), (40, 96, 64)]
"""Rows, columns and inner width."""


@pytest.fixture
def library() -> CublasLt:
    return cublaslt(torch.device("cuda", torch.cuda.current_device()))


def tensors(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").to(problem.dtype)

    rows, columns, inner, *_ = problem
    return draw(rows, inner), draw(columns, inner) * inner**-0.5, draw(columns), draw(rows, columns)


def in_fp32(kind: Kind, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    x, weight, bias, out = (own.float() for own in (x, weight, bias, out))
    found = F.linear(x, weight, bias if kind in ("bias", "gelu") else None)
    if kind == "gelu":
        found = F.gelu(found, approximate="tanh")
    return out + found if kind == "add" else found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["plain", "bias", "gelu", "add"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_every_algorithm_makes_the_product(shape: tuple, kind: Kind, dtype: torch.dtype, library: CublasLt) -> None:
    problem = Problem(*shape, kind, dtype)
    x, weight, bias, before = tensors(problem)
    want = in_fp32(kind, x, weight, bias, before)
    named, tried = library.named(problem), candidates(library, problem)
    assert 0 < len(named) <= MOST_NAMED
    if library.is_hopper and shape[0] >= 256:
        assert len(set(tried) - set(named)) >= BEST // 2, "tiles of our choice"
    for algorithm in {*named, *tried}:
        assert library.accepts(problem, algorithm)
        out = before.clone() if kind == "add" else torch.full_like(before, float("nan"))
        library.run(problem, algorithm, x, weight, bias if kind in ("bias", "gelu") else None, out)
        error = (out.float() - want).norm() / want.norm()
        assert error < (5e-3 if dtype == torch.bfloat16 else 7e-4), library.setting(algorithm)


def test_what_is_no_algorithm_is_refused(library: CublasLt) -> None:
    problem = Problem(64, 1152, 1152, "bias", torch.bfloat16)
    assert not library.accepts(problem, b"short")
    assert not library.accepts(problem, bytes(64))
    (algorithm, *_) = library.named(problem)
    x, weight, bias, out = tensors(problem)
    with pytest.raises(RuntimeError, match="cuBLASLt"):
        library.run(problem, bytes(64), x, weight, bias, out)
    library.run(problem, algorithm, x, weight, bias, out)


def test_the_fastest_is_no_slower_than_torch(library: CublasLt) -> None:
    problem = Problem(1600, 1152, 4352, "add", torch.bfloat16)
    weights = [tensors(problem)[1] for _ in range(8)]
    trial = Trial(library, [problem])
    tried = candidates(library, problem)
    chosen = trial.fastest(problem, tried, weights)
    assert chosen in (TORCH, *tried)
    # What else runs on the GPU meanwhile may hit either of them.
    rounds = [trial.times(problem, [TORCH, chosen], weights, 8) for _ in range(9)]
    torches, own = (min(times) for times in zip(*rounds, strict=True))
    assert own <= 1.05 * torches
    assert trial.fastest(problem, [], weights) == TORCH
    assert trial.fastest(problem, [bytes(64)], weights) == TORCH, "what does not run is left out"


def test_graphs_run_by_what_was_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITGRAPH_CACHE", str(tmp_path))
    # So that every choice is one of the library's, whatever the clock says.
    fastest = Trial.fastest
    monkeypatch.setattr(Trial, "fastest", lambda *given: fastest(*given) or given[2][-1])
    grids = [Grid(1, 16, 16), Grid(1, 12, 12)]

    def encoded() -> tuple[list[Tensor], int]:
        config = EncoderConfig(budgets=(64, 128), measure=False)
        with VisionEncoder.from_config("qwen3_vl", device="cuda", config=config) as encoder:
            x = torch.ones(400, encoder.spec.patch_width, device="cuda", dtype=torch.bfloat16)
            x = x * torch.linspace(-1, 1, 400, device="cuda", dtype=torch.bfloat16)[:, None]
            got = [embedding.tokens for embedding in encoder.encode_patches(x, grids)]
            padded = [embedding.tokens for embedding in encoder.encode_patches(x, grids, mode="padded")]
            eager = [embedding.tokens for embedding in encoder.encode_patches(x, grids, mode="eager")]
            assert all(torch.equal(a, b) for a, b in zip(got, padded, strict=True))
            for a, b in zip(got, eager, strict=True):
                torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
            assert encoder.engine.gemms is not None
            return got, encoder.engine.gemms.runs

    first, runs = encoded()
    (entry,) = json.loads((tmp_path / "gemms.json").read_text()).values()
    assert runs and entry
    monkeypatch.setattr(module, "Trial", lambda *_: pytest.fail("measured again"))
    again, same = encoded()
    assert same == runs and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_library_that_is_not_found_leaves_products_to_torch(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    def missing(_: torch.device) -> CublasLt:
        raise OSError("libcublasLt.so: cannot open shared object file")

    monkeypatch.setattr(module, "cublaslt", missing)
    assert make_gemms(torch.device("cuda", 0), torch.bfloat16) is None
    assert "as torch chooses" in caplog.text
