"""Products of a tower by the algorithms that its graphs run, beside those that torch takes.

    python benchmarks/gemms.py [--geometry qwen3-vl-8b] [--json FILE]

Needs a CUDA device. A line per number of rows and product, `columns x inner kind`: microseconds of one product in a
graph of 16, eight weights in turn, so that weights come from memory as in a tower; both ways in turn, medians. `=` is
where torch's algorithm is the choice. The first line says what capture took; algorithms are chosen in it, where they
were not kept before. Random weights.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from measuring import arguments, make_encoder, write_report
from torch import Tensor

from vitgraph.attention.trial import elapsed
from vitgraph.capture import capturing
from vitgraph.engine.cublaslt import Problem
from vitgraph.engine.gemm_trial import TORCH
from vitgraph.engine.gemms import MOST_ROWS, MOST_WEIGHTS, Gemms
from vitgraph.layers.gemm import add_product, linear, linear_gelu_tanh
from vitgraph.workspace import without_workspace

ROWS = (256, 512, 1024, 1536, 2304, 3072, 4096, 6144, 8192, 10240, 12288, MOST_ROWS)
PRODUCTS, ROUNDS = 16, 15


def product(problem: Problem, device: torch.device) -> Callable[[int], object]:
    """Runs the problem on random tensors, with one of MOST_WEIGHTS weights by its number."""
    rows, columns, inner, kind, dtype = problem
    make = partial(torch.randn, device=device, dtype=dtype)
    x, bias, out = make(rows, inner), make(columns), make(rows, columns)
    weights: list[Tensor] = [make(columns, inner) * inner**-0.5 for _ in range(MOST_WEIGHTS)]
    run: dict[str, Callable[[Tensor], object]] = {
        "plain": lambda weight: linear(x, weight),
        "bias": lambda weight: linear(x, weight, bias),
        "gelu": lambda weight: linear_gelu_tanh(x, weight, bias),
        "add": lambda weight: add_product(out, x, weight),
    }
    return lambda number: run[kind](weights[number % MOST_WEIGHTS])


def in_a_graph(gemms: Gemms, run: Callable[[int], object], chosen: bool, device: torch.device) -> torch.cuda.CUDAGraph:
    """PRODUCTS of them, as a graph of the tower runs them; by torch's algorithms unless `chosen`."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream), without_workspace(device), gemms.applied() if chosen else nullcontext():
        run(0)
        with capturing(graph, device, torch.cuda.graph_pool_handle()):
            for number in range(PRODUCTS):
                run(number)
    torch.cuda.current_stream(device).wait_stream(stream)
    return graph


def line(gemms: Gemms, problem: Problem, device: torch.device) -> dict[str, Any]:
    """Microseconds of one product, both ways."""
    run = product(problem, device)
    graphs = [in_a_graph(gemms, run, chosen, device) for chosen in (False, True)]
    times = [[elapsed(graph.replay) / PRODUCTS for graph in graphs] for _ in range(ROUNDS)]
    torchs, ours = (statistics.median(own) for own in zip(*times, strict=True))
    return {
        "rows": problem.rows, "columns": problem.columns, "inner": problem.inner, "kind": problem.kind,
        "torch_us": torchs, "chosen_us": ours, "is_torch": gemms.chosen[problem] == TORCH,
    }  # fmt: skip


def main() -> None:
    chosen = arguments(__doc__, geometry="qwen3-vl-8b")
    with make_encoder(chosen.geometry, measure=False) as encoder:
        start = time.perf_counter()
        encoder.capture(progress=False)
        print(f"capture, with the choice of algorithms: {time.perf_counter() - start:.1f} s")
        gemms, device = encoder.engine.gemms, encoder.device
        if gemms is None:
            raise SystemExit("this tower's products run as torch chooses: half precision on an NVIDIA GPU is needed.")
        problems = sorted((one for one in gemms.chosen if one.rows in ROWS), key=lambda one: one[:4])
        lines = [line(gemms, problem, device) for problem in problems]
    for row in lines:
        share = row["chosen_us"] / row["torch_us"] - 1
        name = f"{row['columns']} x {row['inner']} {row['kind']}"
        print(
            f"{row['rows']:6}  {name:20}  torch {row['torch_us']:7.1f} us  chosen {row['chosen_us']:7.1f} us  "
            f"{share:+6.1%}{'  =' if row['is_torch'] else ''}"
        )
    print(f"chosen beside torch's, mean: {statistics.mean(r['chosen_us'] / r['torch_us'] for r in lines) - 1:+.1%}")
    write_report(chosen.json, lines, geometry=chosen.geometry)


if __name__ == "__main__":
    main()
