"""Tiny whole models whose vision module the generic backend runs, with random weights, and prompts for them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from tiny_transformers import END, HEAD, IMAGE, START, TEXT, VIDEO, TinyModel
from vision_modules import RECENT

GRIDS = ((1, 4, 6), (1, 4, 4), (1, 8, 4))
CLIPS = ((2, 4, 4), (4, 4, 6))
SIDE = 56

VIT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 14,
}
PACKED = {
    **{k: v for k, v in VIT.items() if k != "image_size"},
    "num_heads": 4,
    "depth": 3,
    "embed_dim": 64,
    "out_hidden_size": 48,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": (),
    "spatial_merge_size": 2,
}
ERNIE_TEXT = {
    **TEXT,
    "head_dim": 16,
    "moe_intermediate_size": [32, 32],
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_num_shared_experts": 1,
    "mlp_layer_types": ["dense", "sparse"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 4]},
}
COMPASS_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
COMPASS_TEXT = {
    **TEXT,
    "head_dim": 16,
    "sliding_window": 64,
    "rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), COMPASS_ROPE),
}
GEMMA_TEXT = {**TEXT, "head_dim": 16, "sliding_window": 64}
LLAMA = {"model_type": "llama", **TEXT}

PACKED_MODELS = {
    "paddleocr_vl": TinyModel("paddleocr_vl", "PaddleOCRVL", "", HEAD, {**VIT, "spatial_merge_size": 2}, video=""),
    "ernie4_5_vl_moe": TinyModel("ernie4_5_vl_moe", "Ernie4_5_VLMoe", "", ERNIE_TEXT, PACKED, video="halved"),
    "cohere_compass": TinyModel("cohere_compass", "CohereCompass", "", COMPASS_TEXT, PACKED),
}
PICTURE_MODELS = {
    "gemma3": TinyModel(
        "gemma3", "Gemma3", "", GEMMA_TEXT, {"model_type": "siglip_vision_model", **VIT}, "", {"mm_tokens_per_image": 4}
    ),
    "llava": TinyModel("llava", "Llava", "", LLAMA, {"model_type": "clip_vision_model", **VIT}, ""),
    "idefics3": TinyModel("idefics3", "Idefics3", "", LLAMA, dict(VIT), ""),
}
TOKENS = {"gemma3": 4, "llava": 16, "idefics3": 4}
"""Placeholders of one picture."""

NAMES = [*PACKED_MODELS, *PICTURE_MODELS]


def packed_prompt(name: str, images: Sequence[tuple[int, int, int]], clips: Sequence[tuple[int, int, int]] = ()):
    """Arguments of `generate`: images, then clips, with text around them."""
    model = PACKED_MODELS[name]
    width = 588 if name in ("ernie4_5_vl_moe", "paddleocr_vl") else 1176
    runs = [(IMAGE, 1, t * h * w // 4) for t, h, w in images]
    for t, h, w in clips:
        frames = t // 2 if model.video == "halved" else t
        runs += [(VIDEO, 2, frames * h * w // 4)] if model.video == "halved" else [(VIDEO, 2, h * w // 4)] * t
    inputs = _text(runs)
    for kind, grids in (("image", images), ("video", clips)):
        rows = torch.randn(sum(t * h * w for t, h, w in grids), width)
        rows = rows.view(-1, 3, 14, 14) if name == "paddleocr_vl" else rows
        if grids:
            key = "pixel_values" if kind == "image" else "pixel_values_videos"
            inputs |= {key: rows, f"{kind}_grid_thw": torch.tensor(grids)}
    return inputs


def picture_prompt(name: str, pictures: int) -> dict[str, Tensor]:
    """Arguments of `generate` for several pictures."""
    inputs = _text([(IMAGE, 1, TOKENS[name])] * pictures)
    pixels = torch.randn(pictures, 3, SIDE, SIDE)
    if name != "gemma3":
        del inputs["mm_token_type_ids"]
    else:
        inputs["token_type_ids"] = inputs.pop("mm_token_type_ids")
    return {**inputs, "pixel_values": pixels.unsqueeze(0) if name == "idefics3" else pixels}


def _text(runs: Sequence[tuple[int, int, int]]) -> dict[str, Tensor]:
    ids, types = [11, 12], [0, 0]
    for number, (token, kind, length) in enumerate(runs):
        ids += [START, *[token] * length, END, 20 + number]
        types += [0, *[kind] * length, 0, 0]
    tokens = torch.tensor([ids])
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "mm_token_type_ids": torch.tensor([types], dtype=torch.int32),
    }


def prompts(name: str) -> list[dict[str, Tensor]]:
    """Several pictures in every prompt; clips where the model takes them; one size for the second time."""
    if name in PICTURE_MODELS:
        return [picture_prompt(name, n) for n in (3, 2, 3)]
    made = [packed_prompt(name, GRIDS), packed_prompt(name, GRIDS[:2]), packed_prompt(name, GRIDS)]
    if PACKED_MODELS[name].video:
        made += [packed_prompt(name, (), CLIPS), packed_prompt(name, GRIDS[:2], CLIPS)]
    return made


def make(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """One of the models; skips the test where the installed Transformers has none, or one that cannot be captured."""
    if name == "idefics3" and Version(transformers.__version__) < Version(RECENT):
        pytest.skip(f"Idefics3's vision module can be captured since {RECENT}")
    try:
        return {**PACKED_MODELS, **PICTURE_MODELS}[name].make(dtype=dtype)
    except (ImportError, AttributeError) as error:
        pytest.skip(f"the installed Transformers has no {name}: {error}")
