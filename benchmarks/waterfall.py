"""What each technique brings: one is added at a time, from an eager run of plain kernels to the product.

    python benchmarks/waterfall.py [--geometry qwen3-vl-8b] [--json FILE]

Needs a CUDA device. Milliseconds of whole calls (pixels on the device), medians of 30. Random weights and pixels.
"""

from __future__ import annotations

from functools import partial

import torch
from measuring import arguments, call_times, make_encoder, write_report
from techniques import ORDER, encoder_without

from vitgraph import VisionEncoder
from vitgraph.bench.workloads import parse_workload, random_patches

WORKLOADS = ("1x14x14", "1x20x20", "1x42x42", "1x64x64", "8x20x20", "20x20x20")
MOST_TOKENS = 2048
"""Enough for every workload."""


def row(encoder: VisionEncoder) -> dict[str, float]:
    """Milliseconds by workload."""
    times = {}
    for text in WORKLOADS:
        workload = parse_workload(text)
        pixels = random_patches(workload, encoder.spec.patch_width).to(encoder.device, encoder.dtype)
        times[text] = call_times(lambda: encoder.encode_patches(pixels, workload.grids))[0]  # noqa: B023
    return times


def main() -> None:
    chosen = arguments(__doc__, geometry="qwen3-vl-8b")
    make = partial(make_encoder, chosen.geometry, max_tokens=MOST_TOKENS, measure=False)
    rows = []
    print(f"{'':26}" + "".join(f"{text:>10}" for text in WORKLOADS))
    for added in range(len(ORDER) + 1):
        name = f"+ {ORDER[added - 1]}" if added else "eager, plain kernels"
        with encoder_without(ORDER[added:], make) as encoder:
            times = row(encoder)
        torch.cuda.empty_cache()
        rows.append({"technique": name, "ms": times})
        print(f"{name:26}" + "".join(f"{times[text]:10.2f}" for text in WORKLOADS), flush=True)
    write_report(chosen.json, rows, geometry=chosen.geometry)


if __name__ == "__main__":
    main()
