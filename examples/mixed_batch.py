"""Images of several sizes, a clip and a bad file in one call. The bad file fails alone.

    python examples/mixed_batch.py

A tiny tower with random weights, so it needs no GPU and no model hub.
"""

from __future__ import annotations

import io

from PIL import Image

from vitgraph import BatchError, Video, VisionEncoder
from vitgraph.assets import sample_photographs
from vitgraph.errors import InputError


def main() -> None:
    """Encodes the batch twice: once with an error in the slot of the bad file, once with an exception."""
    astronaut, cat, coffee, *_ = (photograph.read_bytes() for photograph in sample_photographs())
    wide = Image.open(io.BytesIO(coffee)).convert("RGB")
    frames = [wide.crop((x, 0, x + 240, 240)) for x in range(0, 320, 40)]
    batch = {
        "astronaut": astronaut,
        "cat, half as large": Image.open(io.BytesIO(cat)).resize((226, 150)),
        "truncated file": cat[: len(cat) // 2],
        "clip over coffee": Video(frames, source_fps=4, num_frames=8),
        "coffee": coffee,
    }
    with VisionEncoder.from_config("qwen3_vl") as encoder:
        results = encoder.encode(list(batch.values()), on_error="return")
        for name, result in zip(batch, results, strict=True):
            if isinstance(result, InputError):
                print(f"{name:19} {type(result).__name__}: {result}")
            else:
                print(f"{name:19} grid {tuple(result.grid)}, tokens {list(result.tokens.shape)}")

        try:
            encoder.encode(list(batch.values()))
        except BatchError as error:
            good = len(error.results) - len(error.errors)
            print(f"on_error='raise': BatchError for item {list(error.errors)}; {good} results are in error.results")


if __name__ == "__main__":
    main()
