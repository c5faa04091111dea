"""Photographs in, embeddings out.

    python examples/encode_images.py                                    # a tiny tower with random weights
    python examples/encode_images.py Qwen/Qwen3-VL-8B-Instruct *.jpg    # your model, your photographs

Without arguments it needs no GPU and no model hub.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from vitgraph import VisionEncoder
from vitgraph.assets import sample_photographs
from vitgraph.models.tiny import write_tiny_checkpoint


def main(arguments: Sequence[str]) -> None:
    """Encodes the photographs that the arguments name (default: those that vitgraph ships)."""
    photographs = [Path(name) for name in arguments[1:]] or [Path(str(p)) for p in sample_photographs()]
    with TemporaryDirectory() as folder:
        model = arguments[0] if arguments else write_tiny_checkpoint("qwen3_vl", folder)
        with VisionEncoder.from_pretrained(model) as encoder:
            embeddings = encoder.encode(photographs)
            print(f"{encoder.family.title} on {encoder.device}, {encoder.dtype}")
            for path, embedding in zip(photographs, embeddings, strict=True):
                t, h, w = embedding.grid
                print(f"  {path.name:14} {t}x{h}x{w} patches -> tokens {list(embedding.tokens.shape)}", end="")
                print("" if embedding.deepstack is None else f", deepstack {list(embedding.deepstack.shape)}")
            stats = encoder.stats
            print(f"{stats.items} images in {stats.packs} pack(s), {stats.padding:.1%} of the tokens were padding")


if __name__ == "__main__":
    main(sys.argv[1:])
