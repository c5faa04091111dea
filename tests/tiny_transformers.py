"""Tiny multimodal models of Transformers with random weights, one per vision class, and prompts for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from vitgraph.models.registry import get_family
from vitgraph.models.weights import hash_seed

IMAGE, VIDEO, START, END = 250, 251, 252, 253
WIDTH, VOCABULARY = 48, 256
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
HEAD = {**TEXT, "head_dim": 16, "rope_parameters": {**ROPE, "mrope_section": [4, 2, 2]}}
QWEN2 = {**TEXT, "rope_parameters": {**ROPE, "mrope_section": [2, 2, 2]}}
WHOLE_ROPE = {**HEAD["rope_parameters"], "partial_rotary_factor": 1.0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
    "partial_rotary_factor": 1.0,
}
GLM_EXPERTS = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    **TEXT,
    **GLM_EXPERTS,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
KIMI_VISION = {
    "patch_size": 14,
    "pos_emb_height": 8,
    "pos_emb_width": 8,
    "pos_emb_time": 4,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 112,
}
INTERNVL_VISION = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "attention_bias": True,
    "use_qk_norm": True,
    "norm_type": "rms_norm",
    "image_size": [56, 56],
    "patch_size": [14, 14],
}
AUDIO = {"num_mel_bins": 8, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "d_model": 16}


@dataclass(frozen=True)
class TinyModel:
    """How to make one.

    Attributes:
        package: in `transformers.models`.
        name: what class names of the model and its config start with.
        text, vision: their configs; vision None takes that of the family's own tiny model.
        family: registry name.
        video: "whole" (a run of placeholders per clip), "frames" (one per frame), "alone" (one per frame, with the
            placeholders of images and without images in the same prompt), or "" where generate takes no clips.
        extra: of the whole model's config.
    """

    package: str
    name: str
    family: str
    text: dict[str, Any]
    vision: dict[str, Any] | None = None
    video: str = "frames"
    extra: dict[str, Any] | None = None

    def classes(self) -> tuple[type, type]:
        """The classes of its config and of the model."""
        package = f"transformers.models.{self.package}"
        config = getattr(import_module(f"{package}.configuration_{self.package}"), self.name + "Config")
        model = getattr(import_module(f"{package}.modeling_{self.package}"), self.name + "ForConditionalGeneration")
        return config, model

    def config(self) -> Any:
        """A config of tiny sizes."""
        vision = self.vision
        if vision is None:
            whole = get_family(self.family).tiny()[0]
            vision = {**whole.get("thinker_config", whole)["vision_config"]}
            vision.pop("model_type")
        config = self.classes()[0](text_config=dict(self.text), vision_config=vision, **(self.extra or {}))
        for name, token in (("image_", IMAGE), ("video_", VIDEO), ("vision_start_", START), ("vision_end_", END)):
            setattr(config, f"{name}token_id", token)
        return config

    def make(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A model in eval mode whose every parameter is random, zeros and ones included."""
        torch.manual_seed(seed)
        model = self.classes()[1](self.config()).eval().to(dtype)
        randomise(model, seed)
        return model


def randomise(model: nn.Module, seed: int) -> None:
    """As `vitgraph.models.weights.randomise`, on any model: what Transformers sets to 0 or 1 changes the output."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(hash_seed(name, seed))
        values = torch.randn(parameter.shape, generator=generator)
        if values.dim() == 1:
            values = 1 + 0.1 * values if name.endswith("weight") else 0.05 * values
        else:
            values *= values[0].numel() ** -0.5
        with torch.no_grad():
            parameter.copy_(values)


AUDIO_EXTRA = {"audio_config": AUDIO}
MODELS = {
    "qwen3_vl": TinyModel("qwen3_vl", "Qwen3VL", "qwen3_vl", HEAD),
    "qwen3_vl_moe": TinyModel("qwen3_vl_moe", "Qwen3VLMoe", "qwen3_vl", {**HEAD, **EXPERTS}),
    "qwen2_vl": TinyModel("qwen2_vl", "Qwen2VL", "qwen2_vl", QWEN2, video="whole"),
    "qwen2_5_vl": TinyModel("qwen2_5_vl", "Qwen2_5_VL", "qwen2_5_vl", QWEN2, video="whole"),
    "qwen2_5_omni": TinyModel(
        "qwen2_5_omni", "Qwen2_5OmniThinker", "qwen2_5_vl", QWEN2, video="whole", extra=AUDIO_EXTRA
    ),
    "qwen3_5": TinyModel("qwen3_5", "Qwen3_5", "qwen3_5", {**HEAD, **LINEAR}),
    "qwen3_5_moe": TinyModel(
        "qwen3_5_moe", "Qwen3_5Moe", "qwen3_5", {**HEAD, **LINEAR, **EXPERTS, "shared_expert_intermediate_size": 32}
    ),
    "qwen3_omni": TinyModel(
        "qwen3_omni_moe", "Qwen3OmniMoeThinker", "qwen3_omni", {**HEAD, **EXPERTS}, video="whole", extra=AUDIO_EXTRA
    ),
    "glm4v": TinyModel("glm4v", "Glm4v", "glm4v", QWEN2, video="alone"),
    "glm4v_moe": TinyModel(
        "glm4v_moe", "Glm4vMoe", "glm4v", {**HEAD, **GLM_EXPERTS, "rope_parameters": WHOLE_ROPE}, video="alone"
    ),
    "glm_ocr": TinyModel("glm_ocr", "GlmOcr", "glm_ocr", HEAD, video="alone"),
    "kimi_k25": TinyModel(
        "kimi_k25", "Kimi_K25", "kimi_k25", DEEPSEEK, KIMI_VISION, "", {"projection_hidden_size": 64}
    ),
    "internvl": TinyModel("internvl", "InternVL", "internvl", {"model_type": "qwen2", **TEXT}, INTERNVL_VISION, ""),
}
NAMES = list(MODELS)
Grids = Sequence[tuple[int, int, int]]
IMAGES: Grids = [(1, 4, 6), (1, 2, 2), (1, 8, 4)]
CLIPS: Grids = [(2, 4, 2), (2, 2, 6)]


def vision_module(model: nn.Module) -> nn.Module:
    """The module that is accelerated."""
    found = {name.rpartition(".")[2]: module for name, module in model.named_modules()}
    return found["visual"] if "visual" in found else found["vision_tower"]


def width_of(name: str) -> int:
    """Values of one patch row."""
    side = 16 if name.startswith("qwen3") else 14
    return 3 * side * side * (1 if name in ("kimi_k25", "internvl") else 2)


def pixels(name: str, grids: Grids, seed: int = 0) -> Tensor:
    """Random patch rows in the shape that the model's processor makes them."""
    generator = torch.Generator().manual_seed(seed)
    if name == "internvl":
        return torch.randn(len(grids), 3, 56, 56, generator=generator)
    rows = torch.randn(sum(t * h * w for t, h, w in grids), width_of(name), generator=generator)
    return rows.view(-1, 3, 14, 14) if name == "kimi_k25" else rows


def tower_inputs(name: str, grids: Grids, seed: int = 0) -> dict[str, Tensor]:
    """Arguments of a direct call of the vision module."""
    if name == "internvl":
        return {"pixel_values": pixels(name, grids, seed)}
    rows = "pixel_values" if name == "kimi_k25" else "hidden_states"
    return {rows: pixels(name, grids, seed), "grid_thw": torch.tensor(grids)}


def prompt(name: str, images: Grids = (), clips: Grids = (), seed: int = 0) -> dict[str, Tensor]:
    """Arguments of `generate` for one sequence: images, then clips, with text around them."""
    video = MODELS[name].video
    runs = [(IMAGE, 1, 4 if name == "internvl" else t * h * w // 4) for t, h, w in images]
    token = IMAGE if video == "alone" else VIDEO
    for t, h, w in clips:
        runs += [(token, 2, t * h * w // 4)] if video == "whole" else [(token, 2, h * w // 4)] * t
    ids, types = [11, 12], [0, 0]
    for number, (token, kind, length) in enumerate(runs):
        ids += [START, *[token] * length, END, 20 + number]
        types += [0, *[kind] * length, 0, 0]
    tokens = torch.tensor([ids])
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if name not in ("kimi_k25", "internvl") and "omni" not in name:
        inputs["mm_token_type_ids"] = torch.tensor([types], dtype=torch.int32)
    if images:
        inputs["pixel_values"] = pixels(name, images, seed)
    if images and name != "internvl":
        inputs["image_grid_thw"] = torch.tensor(images)
    if clips:
        inputs |= {"pixel_values_videos": pixels(name, clips, seed + 1), "video_grid_thw": torch.tensor(clips)}
    if clips and "omni" in name:
        inputs["video_second_per_grid"] = torch.ones(len(clips))
    return inputs


def generate(model: nn.Module, inputs: dict[str, Tensor], tokens: int = 6) -> list[int]:
    """Greedy tokens after the prompt."""
    made: Callable[..., Tensor] = model.generate
    return made(**inputs, max_new_tokens=tokens, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
