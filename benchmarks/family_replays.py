"""Replay time of every family at two budgets: plain kernels in a graph, and the product's.

    python benchmarks/family_replays.py [--json FILE]

Needs a CUDA device. Budgets of about 256 and 1024 tokens filled with usual images. Random weights and pixels.
"""

from __future__ import annotations

from functools import partial

import torch
from measuring import arguments, make_encoder, replay_time, write_report
from techniques import ORDER, encoder_without

from vitgraph.bench.geometries import geometry
from vitgraph.engine.fillings import usual_items
from vitgraph.models.registry import find_family

GEOMETRIES = ("qwen2-vl-7b", "qwen2.5-vl-7b", "qwen3-vl-8b", "qwen3.5-9b", "qwen3-omni-30b-a3b", "kimi-vl-a3b",
              "kimi-k2.5", "glm-4.1v-9b", "glm-ocr", "internvl3-8b")  # fmt: skip
"""One of each family."""

TOKENS = (256, 1024)
PLAIN = tuple(name for name in ORDER if name not in ("graph", "fine ladder"))


def times(name: str, missing: tuple[str, ...]) -> dict[int, float]:
    """Milliseconds by budget."""
    make = partial(make_encoder, name, budgets=TOKENS, measure=False)
    with encoder_without(missing, make) as encoder:
        found = {b.tokens: replay_time(encoder, usual_items(encoder.spec, b)) for b in encoder.budgets}
    torch.cuda.empty_cache()
    return found


def main() -> None:
    chosen = arguments(__doc__)
    rows = []
    for name in GEOMETRIES:
        before, after = times(name, PLAIN), times(name, ())
        family = find_family(geometry(name)).name
        rows.append({"geometry": name, "family": family, "plain_ms": before, "product_ms": after})
        cells = "  ".join(f"{n} tokens {before[n]:7.2f} -> {after[n]:7.2f} ms" for n in after)
        print(f"{name:20} {family:12} {cells}", flush=True)
    write_report(chosen.json, rows)


if __name__ == "__main__":
    main()
