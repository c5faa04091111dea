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
    "kimi-vl-a3b": _kimi_vl,
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
