"""Products of a tower by the algorithms that its graphs run, beside those that torch takes.

    python benchmarks/gemms.py [--geometry qwen3-vl-8b] [--json FILE]

Needs a CUDA device. A line per number of rows and product, `columns x inner kind`: microseconds of one product, its
weights in turn, so that they come from memory as in a tower; both ways in turn, medians. `=` is where torch's
algorithm is the choice. The first line says what capture took; algorithms are chosen in it, where they were not kept
before. Random weights.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from measuring import arguments, make_encoder, write_report
from torch import Tensor

from vitgraph.engine.cublaslt import Problem, cublaslt
from vitgraph.engine.gemm_trial import TORCH, Trial
from vitgraph.engine.gemms import MOST_ROWS, MOST_WEIGHTS
from vitgraph.workspace import without_workspace

ROWS = (256, 512, 1024, 1536, 2304, 3072, 4096, 6144, 8192, 10240, 12288, MOST_ROWS)
ROUNDS = 15


def random_weights(problem: Problem, device: torch.device) -> list[Tensor]:
    """As many as a trial takes in turn."""
    columns, inner = problem.columns, problem.inner
    return [torch.randn(columns, inner, device=device, dtype=problem.dtype) * inner**-0.5 for _ in range(MOST_WEIGHTS)]


def line(trial: Trial, problem: Problem, algorithm: bytes, device: torch.device) -> dict[str, Any]:
    """Microseconds of one product, both ways."""
    weights = random_weights(problem, device)
    rounds = [trial.times(problem, [TORCH, algorithm], weights, MOST_WEIGHTS) for _ in range(ROUNDS)]
    torchs, chosen = (statistics.median(times) * 1e3 for times in zip(*rounds, strict=True))
    return {
        "rows": problem.rows, "columns": problem.columns, "inner": problem.inner, "kind": problem.kind,
        "torch_us": torchs, "chosen_us": chosen, "is_torch": algorithm == TORCH,
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
        trial = Trial(cublaslt(device), problems)
        with without_workspace(device):
            lines = [line(trial, problem, gemms.chosen[problem], device) for problem in problems]
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
