"""The call of a serving engine: pixel_values and grid_thw of one step, as the model's processor made them.

    python examples/encode_patches.py

A tiny tower with random weights, so it needs no GPU and no model hub. The rows come from the encoder's own
preprocessing here; rows from Transformers' processor of the same model have the same layout.
"""

from __future__ import annotations

import torch

from vitgraph import VisionEncoder
from vitgraph.assets import sample_photographs


def main() -> None:
    """Encodes one step of three images and puts their tokens where a prompt has image positions."""
    with VisionEncoder.from_config("qwen3_vl") as encoder:
        prepared = [encoder.prepare(photograph.read_bytes()) for photograph in sample_photographs()[:3]]
        pixel_values = torch.cat([torch.as_tensor(patches.pixel_values) for patches in prepared])
        # Sizes are host integers: grid_thw never goes to the device, so nothing is read back from it.
        grid_thw = torch.tensor([patches.grid for patches in prepared])
        print(f"pixel_values {list(pixel_values.shape)}, grid_thw {grid_thw.tolist()}")

        embeddings = encoder.encode_patches(pixel_values.to(encoder.device), grid_thw)

        tokens = torch.cat([embedding.tokens for embedding in embeddings])
        print(f"tokens per image {[len(e.tokens) for e in embeddings]}, width {tokens.shape[1]}")

        text = 5
        inputs_embeds = torch.zeros(text + len(tokens), tokens.shape[1], dtype=tokens.dtype, device=tokens.device)
        is_image = torch.arange(len(inputs_embeds), device=tokens.device) >= text
        inputs_embeds[is_image] = tokens
        print(f"inputs_embeds {list(inputs_embeds.shape)}: {text} text positions, {len(tokens)} image positions")

        deepstack = [e.deepstack for e in embeddings if e.deepstack is not None]
        if deepstack:
            levels = torch.cat(deepstack, dim=1)
            print(f"deepstack {list(levels.shape)}: level i is added after layer i of the language model")

        # The same items without packing, padding or graphs.
        eager = encoder.encode_patches(pixel_values, grid_thw, mode="eager")
        error = max(float((a.tokens - b.tokens).abs().max()) for a, b in zip(embeddings, eager, strict=True))
        print(f"largest difference from eager: {error:.1e}")


if __name__ == "__main__":
    main()
