"""Settings, from the JSON that vLLM users have, and what they make of a batch.

    python examples/settings.py

A tiny tower with random weights, so it needs no GPU and no model hub.
"""

from __future__ import annotations

import json
from dataclasses import asdict

from vitgraph import EncoderConfig, VisionEncoder
from vitgraph.errors import ConfigError

COMPILATION_CONFIG = """
{
  "cudagraph_mm_encoder": true,
  "encoder_cudagraph_token_budgets": [64, 256, 1024],
  "encoder_cudagraph_max_vision_items_per_batch": 8,
  "metadata_cache": 1024
}
"""
GRIDS = [(1, 16, 16), (1, 24, 40), (1, 4, 6), (1, 32, 48), (1, 80, 80), (4, 12, 12)]


def main() -> None:
    """Prints the settings, the plan of a batch under them, and what a wrong name gives."""
    config = EncoderConfig.from_dict(json.loads(COMPILATION_CONFIG))
    changed = {name: value for name, value in asdict(config).items() if value != getattr(EncoderConfig(), name)}
    print("settings that differ from the default:", changed)

    with VisionEncoder.from_config("qwen3_vl", config=config) as encoder:
        for number, pack in enumerate(encoder.plan(GRIDS)):
            grids = ", ".join("x".join(map(str, piece.grid)) for piece in pack.pieces)
            where = pack.reason if pack.budget is None else f"budget {encoder.budgets[pack.budget].tokens}"
            print(f"pack {number}: {pack.counts['token']} tokens of {grids} -> {where}")

    try:
        EncoderConfig.from_dict({"cudagraph_encoder": True})
    except ConfigError as error:
        print("a wrong name:", error)


if __name__ == "__main__":
    main()
