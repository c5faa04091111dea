"""Towers of published models by name: their sizes without their weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from vitgraph.errors import ConfigError

Json = dict[str, Any]


def _qwen2_vl(width: int) -> Json:
    vision = {
        "model_type": "qwen2_vl",
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": width,
        "num_heads": 16,
        "mlp_ratio": 4,
        "in_channels": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    return {"model_type": "qwen2_vl", "vision_config": vision}


def _qwen2_5_vl(mlp: int, width: int) -> Json:
    vision = {
        "model_type": "qwen2_5_vl",
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": mlp,
        "num_heads": 16,
        "in_channels": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "out_hidden_size": width,
    }
    return {"model_type": "qwen2_5_vl", "vision_config": vision}


def _qwen3_vl(large: bool, width: int) -> Json:
    depth, hidden, mlp, taps = (27, 1152, 4304, [8, 16, 24]) if large else (24, 1024, 4096, [5, 11, 17])
    vision = {
        "model_type": "qwen3_vl",
        "depth": depth,
        "hidden_size": hidden,
        "hidden_act": "gelu_pytorch_tanh",
        "intermediate_size": mlp,
        "num_heads": 16,
        "in_channels": 3,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": width,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": taps,
    }
    return {"model_type": "qwen3_vl", "vision_config": vision}


def _kimi_vl() -> Json:
    vision = {
        "model_type": "moonvit",
        "num_hidden_layers": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "init_pos_emb_height": 64,
        "init_pos_emb_width": 64,
        "patch_size": 14,
        "merge_kernel_size": [2, 2],
    }
    return {"model_type": "kimi_vl", "text_config": {"hidden_size": 2048}, "vision_config": vision}


def _qwen3_5() -> Json:
    vision = {**_qwen3_vl(True, 4096)["vision_config"], "model_type": "qwen3_5", "deepstack_visual_indexes": []}
    return {"model_type": "qwen3_5", "vision_config": vision}


def _qwen3_omni() -> Json:
    vision = {**_qwen3_vl(True, 2048)["vision_config"], "model_type": "qwen3_omni_moe_vision_encoder"}
    return {"model_type": "qwen3_omni_moe", "thinker_config": {"vision_config": vision}}


def _kimi_k25() -> Json:
    vision = {
        "vt_hidden_size": 1152,
        "vt_intermediate_size": 4304,
        "vt_num_attention_heads": 16,
        "vt_num_hidden_layers": 27,
        "init_pos_emb_height": 64,
        "init_pos_emb_width": 64,
        "init_pos_emb_time": 4,
        "mm_hidden_size": 1152,
        "text_hidden_size": 7168,
        "patch_size": 14,
        "merge_kernel_size": [2, 2],
    }
    return {"model_type": "kimi_k25", "text_config": {"hidden_size": 7168}, "vision_config": vision}


def _glm4v(model_type: str, merger: int) -> Json:
    vision = {
        "model_type": model_type,
        "depth": 24,
        "hidden_size": 1536,
        "intermediate_size": merger,
        "num_heads": 12,
        "image_size": 336,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 4096,
    }
    return {"model_type": model_type, "vision_config": vision}


def _glm_ocr() -> Json:
    sizes = {"hidden_size": 1024, "num_heads": 16, "intermediate_size": 4096, "out_hidden_size": 1536}
    vision = {**_glm4v("glm_ocr", 0)["vision_config"], **sizes, "model_type": "glm_ocr_vision"}
    return {"model_type": "glm_ocr", "vision_config": vision}


def _internvl(large: bool, width: int) -> Json:
    depth, hidden, mlp, heads = (45, 3200, 12800, 25) if large else (24, 1024, 4096, 16)
    vision = {
        "architectures": ["InternVisionModel"],
        "hidden_act": "gelu",
        "hidden_size": hidden,
        "image_size": 448,
        "intermediate_size": mlp,
        "layer_norm_eps": 1e-6,
        "model_type": "intern_vit_6b",
        "norm_type": "rms_norm" if large else "layer_norm",
        "num_attention_heads": heads,
        "num_channels": 3,
        "num_hidden_layers": depth,
        "patch_size": 14,
        "qk_normalization": large,
        "qkv_bias": not large,
    }
    settings = {"downsample_ratio": 0.5, "force_image_size": 448, "ps_version": "v2", "select_layer": -1}
    llm = {"llm_config": {"hidden_size": width}, "vision_config": vision}
    return {"model_type": "internvl_chat", **settings, **llm}


GEOMETRIES: dict[str, Callable[[], Json]] = {
    "qwen2-vl-2b": partial(_qwen2_vl, 1536),
    "qwen2-vl-7b": partial(_qwen2_vl, 3584),
    "qwen2-vl-72b": partial(_qwen2_vl, 8192),
    "qwen2.5-vl-3b": partial(_qwen2_5_vl, 3420, 2048),
    "qwen2.5-vl-7b": partial(_qwen2_5_vl, 3420, 3584),
    "qwen2.5-vl-32b": partial(_qwen2_5_vl, 3456, 5120),
    "qwen2.5-vl-72b": partial(_qwen2_5_vl, 3456, 8192),
    "qwen3-vl-2b": partial(_qwen3_vl, False, 2048),
    "qwen3-vl-4b": partial(_qwen3_vl, False, 2560),
    "qwen3-vl-8b": partial(_qwen3_vl, True, 4096),
    "qwen3-vl-32b": partial(_qwen3_vl, True, 5120),
    "qwen3-vl-30b-a3b": partial(_qwen3_vl, True, 2048),
    "qwen3-vl-235b-a22b": partial(_qwen3_vl, True, 4096),
    "qwen3.5-9b": _qwen3_5,
    "qwen3-omni-30b-a3b": _qwen3_omni,
    "kimi-vl-a3b": _kimi_vl,
    "kimi-k2.5": _kimi_k25,
    "glm-4.1v-9b": partial(_glm4v, "glm4v", 13696),
    "glm-4.5v": partial(_glm4v, "glm4v_moe", 10944),
    "glm-ocr": _glm_ocr,
    "internvl3-8b": partial(_internvl, False, 3584),
    "internvl3-38b": partial(_internvl, True, 5120),
}
"""Name -> config.json of the published model, cut down to what shapes the tower."""


def served_geometries() -> list[str]:
    """The names whose family is registered."""
    from vitgraph.models.registry import families

    known = {model_type for family in families() for model_type in family.model_types}
    return [name for name, config in GEOMETRIES.items() if config()["model_type"] in known]


def geometry(name: str) -> Json:
    """config.json of a named geometry.

    Raises:
        ConfigError: listing the known names.
    """
    names = served_geometries()
    if name not in names:
        raise ConfigError(f"unknown geometry {name!r}; known: {', '.join(names)}.")
    return GEOMETRIES[name]()
