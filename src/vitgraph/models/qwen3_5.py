"""Qwen3.5 and Qwen3.6, dense and mixture-of-experts: the tower of Qwen3-VL without deepstack.

Reference: transformers `Qwen3_5VisionModel`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vitgraph.models import qwen3_vl
from vitgraph.models.qwen3_vl import Qwen3VLConfig, Qwen3VLTower
from vitgraph.models.registry import Family, Json


class Qwen35Tower(Qwen3VLTower):
    """Patch embedding, blocks and merger."""

    family = "qwen3_5"


def parse_config(config: Json) -> Qwen3VLConfig:
    """From a config.json. The reference has no deepstack, whatever the file lists."""
    return replace(Qwen3VLConfig.from_hf(config), deepstack_visual_indexes=())


def tiny() -> tuple[dict[str, Any], dict[str, Any]]:
    """Three layers of width 64."""
    config, preprocessor = qwen3_vl.tiny()
    vision = {**config["vision_config"], "model_type": "qwen3_5", "deepstack_visual_indexes": []}
    architecture = "Qwen3_5ForConditionalGeneration"
    return {"architectures": [architecture], "model_type": "qwen3_5", "vision_config": vision}, preprocessor


FAMILY = Family(
    name="qwen3_5",
    title="Qwen3.5 and Qwen3.6 (dense and MoE)",
    model_types=("qwen3_5", "qwen3_5_moe"),
    modalities=("image", "video"),
    parse_config=parse_config,
    build=Qwen35Tower,
    layouts=qwen3_vl.layouts,
    processor=qwen3_vl.processor,
    tiny=tiny,
)
