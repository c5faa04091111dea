"""Start-up: seconds until the default ladder is captured and timed, with empty caches on disk and with filled ones.

    python benchmarks/startup.py [--geometry qwen3-vl-8b] [--compile] [--json FILE]

Needs a CUDA device. Each line is a process of its own; the first finds an empty folder where Triton, torch.compile and
vitgraph keep what they make, the second what the first left there. `capture` is the capture of all budgets, warm-ups
included; `timing` the measurement of the cost model; `weights` the tower with random weights. Imports do not count.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from measuring import arguments, make_encoder, write_report

CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "VITGRAPH_CACHE")
"""Environment variables that name the folders."""

CHILD = "--child"


def measure(geometry: str, compiled: bool) -> dict[str, Any]:
    """Seconds of this process."""
    start = time.perf_counter()
    with make_encoder(geometry, compile=compiled) as encoder:
        weights = time.perf_counter() - start
        encoder.capture(progress=False)
        total = time.perf_counter() - start
        stats = encoder.stats
    return {
        "graphs": stats.captured_graphs,
        "weights_s": weights,
        "capture_s": stats.capture_seconds,
        "timing_s": stats.measure_seconds,
        "total_s": total,
    }


def in_a_process(geometry: str, compiled: bool, folder: str) -> dict[str, Any]:
    """The same, in a process whose caches lie in a folder."""
    caches = {name: os.path.join(folder, name.lower()) for name in CACHES}
    command = [sys.executable, __file__, CHILD, geometry, *(["--compile"] if compiled else [])]
    done = subprocess.run(command, env=os.environ | caches, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    if CHILD in sys.argv:
        print(json.dumps(measure(sys.argv[sys.argv.index(CHILD) + 1], "--compile" in sys.argv)))
        return
    chosen = arguments(__doc__, flags=["compile"], geometry="qwen3-vl-8b")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for caches in ("empty", "filled"):
            row = {"caches": caches, "compile": chosen.compile}
            row |= in_a_process(chosen.geometry, chosen.compile, folder)
            rows.append(row)
            print(
                f"{caches:7} caches  {row['graphs']} graphs  capture {row['capture_s']:6.2f} s  "
                f"timing {row['timing_s']:5.2f} s  total {row['total_s']:6.2f} s",
                flush=True,
            )
    write_report(chosen.json, rows, geometry=chosen.geometry)


if __name__ == "__main__":
    main()
