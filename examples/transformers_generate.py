"""Generate with a Transformers model before and after `vitgraph.accelerate`, and compare the tokens and the time.

    python examples/transformers_generate.py [--model Qwen/Qwen3-VL-2B-Instruct] [--images cat.jpg coffee.jpg]

Without --model it makes a tiny Qwen3-VL with random weights, which needs no GPU and no model hub: its tokens mean
nothing, but they are the same before and after. With --model, Transformers' own processor prepares the prompt; that of
Qwen3-VL needs torchvision.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen3VLConfig, Qwen3VLForConditionalGeneration

import vitgraph
from vitgraph.assets import sample_photographs

IMAGE = 250
NEW_TOKENS = 16


def load(model_id: str, images: list[str]) -> tuple[Any, dict[str, Any]]:
    """A published model on the GPU, and a prompt with these images."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForImageTextToText.from_pretrained(model_id, dtype="auto").to(device).eval()
    content = [{"type": "image", "url": image} for image in images] + [{"type": "text", "text": "What is this?"}]
    inputs = AutoProcessor.from_pretrained(model_id).apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    return model, dict(inputs.to(device))


def make_tiny(images: list[str]) -> tuple[Any, dict[str, Any]]:
    """A tiny model with random weights, and a prompt with these images."""
    torch.manual_seed(0)
    encoder = vitgraph.VisionEncoder.from_config("qwen3_vl", device="cpu")  # for its preprocessing
    patches = [encoder.prepare(image) for image in images]
    text = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256, "pad_token_id": 0}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}
    vision = {"depth": 3, "hidden_size": 64, "intermediate_size": 112, "num_heads": 4, "out_hidden_size": 48}
    vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE)
    model = Qwen3VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))

    ids = [1]
    for one in patches:
        ids += [2, *[IMAGE] * (one.grid.patches // 4), 3]
    input_ids = torch.tensor([ids])
    inputs = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": (input_ids == IMAGE).int(),
        "pixel_values": torch.cat([torch.as_tensor(one.pixel_values) for one in patches]),
        "image_grid_thw": torch.tensor([one.grid for one in patches]),
    }
    return model, inputs


def timed(model: Any, inputs: dict[str, Any]) -> tuple[list[int], float]:
    """New tokens and seconds of the fourth of four calls: graphs are captured on the second use of a size."""
    for _ in range(4):
        start = time.perf_counter()
        tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        new = tokens[0, inputs["input_ids"].shape[1] :].tolist()  # waits for the device
    return new, time.perf_counter() - start


def main() -> None:
    """Generates twice with the same prompt."""
    photographs = [str(photograph) for photograph in sample_photographs()[:2]]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder; default: a tiny model with random weights")
    parser.add_argument("--images", nargs="+", default=photographs)
    args = parser.parse_args()

    if args.model:
        model, inputs = load(args.model, args.images)
    else:
        print("tiny Qwen3-VL with random weights: the tokens mean nothing")
        model, inputs = make_tiny(args.images)

    before, seconds_before = timed(model, inputs)
    vitgraph.accelerate(model)
    after, seconds_after = timed(model, inputs)

    print(f"tokens before: {before}")
    print(f"tokens after:  {after}")
    print(f"the same: {before == after}")
    place = "" if torch.cuda.is_available() else " (on the CPU there are no graphs: this shows that it works, no more)"
    print(f"seconds: {seconds_before:.3f} before, {seconds_after:.3f} after{place}")
    print(vitgraph.acceleration(model))

    vitgraph.restore(model)
    print(f"restored: {vitgraph.acceleration(model)}")


if __name__ == "__main__":
    main()
