"""Where one `encode_patches` call spends its time: host work, replays, and what the caller waits for.

    python benchmarks/call_anatomy.py [--geometry qwen3-vl-8b] [--compile] [--json FILE]

Needs a CUDA device. Per workload, medians: `call` is the wall clock around the call and a synchronisation, `host` the
part of it before the call returns, `replay` the device time of the packs' graphs alone. Random weights and pixels.
"""

from __future__ import annotations

import time

from measuring import arguments, call_times, make_encoder, replay_time, write_report

from vitgraph import VisionEncoder
from vitgraph.bench.workloads import parse_workload, random_patches

MIXED = "1x14x14+11x20x20+6x28x28+8x42x42+6x64x64"
WORKLOADS = ("1x14x14", "1x20x20", "1x28x28", "1x42x42", "1x64x64", "1x84x84", "8x20x20", "20x20x20", MIXED)


def anatomy(encoder: VisionEncoder, text: str) -> dict[str, object]:
    """One row of the table."""
    workload = parse_workload(text)
    pixels = random_patches(workload, encoder.spec.patch_width).to(encoder.device, encoder.dtype)
    call, host = call_times(lambda: encoder.encode_patches(pixels, workload.grids))
    packs = [pack for pack in encoder.plan(workload.grids) if pack.budget is not None]
    tokens = sum(pack.counts["token"] for pack in packs)
    budgets = [encoder.budgets[pack.budget].tokens for pack in packs]
    replay = replay_time(encoder, workload.grids)
    return {
        "workload": text,
        "call_ms": call,
        "host_ms": host,
        "replay_ms": replay,
        "budgets": budgets,
        "padding": 1 - tokens / sum(budgets),
    }


def main() -> None:
    chosen = arguments(__doc__, flags=["compile"], geometry="qwen3-vl-8b")
    with make_encoder(chosen.geometry, compile=chosen.compile) as encoder:
        start = time.perf_counter()
        encoder.capture(progress=False)
        capture = time.perf_counter() - start
        stats = encoder.stats
        rows = [anatomy(encoder, text) for text in WORKLOADS]
    facts = {"geometry": chosen.geometry, "compile": chosen.compile, "capture_seconds": capture}
    facts |= {"graphs": stats.captured_graphs, "graph_bytes": stats.graph_bytes, "static_bytes": stats.static_bytes}
    print(f"{stats.captured_graphs} graphs captured in {capture:.2f} s, pool {stats.graph_bytes / 1e6:.0f} MB")
    for row in rows:
        print(
            f"{row['workload'][:12]:12} call {row['call_ms']:8.2f} ms  host {row['host_ms']:6.2f} ms  "
            f"replay {row['replay_ms']:8.2f} ms  padding {row['padding']:6.1%}  budgets {row['budgets']}"
        )
    write_report(chosen.json, rows, **facts)


if __name__ == "__main__":
    main()
