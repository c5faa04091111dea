"""The vision side of Qwen3-Omni: the tower of Qwen3-VL under other names, with Qwen2-VL's rules for clips.

Reference: transformers `Qwen3OmniMoeVisionEncoder`.
"""

from __future__ import annotations

from typing import Any

from vitgraph.models import qwen3_vl
from vitgraph.models.layout import Flatten, Layout, Rule
from vitgraph.models.qwen3_vl import Qwen3VLConfig, Qwen3VLTower
from vitgraph.models.registry import Family, Json
from vitgraph.preprocess.processor import Processor, SmartResizeProcessor


class Qwen3OmniTower(Qwen3VLTower):
    """Patch embedding, blocks, merger and deepstack mergers."""

    family = "qwen3_omni"


def parse_config(config: Json) -> Qwen3VLConfig:
    """From a config.json, whole or of the thinker alone."""
    return Qwen3VLConfig.from_hf(config.get("thinker_config", config))


def layouts(config: Qwen3VLConfig) -> tuple[Layout, ...]:
    """The published layout, and that of the thinker alone."""
    return tuple(_layout(prefix, config) for prefix in ("thinker.visual.", "visual."))


def _layout(prefix: str, config: Qwen3VLConfig) -> Layout:
    rules = [
        Rule(
            r"patch_embed\.proj\.weight",
            (prefix + "patch_embed.proj.weight",),
            Flatten((config.hidden_size, *config.kernel)),
        ),
        Rule(r"(blocks\.\d+\.mlp)\.(fc\d\..*)", (prefix + r"\1.linear_\2",)),
    ]
    for ours, theirs in (("norm", "ln_q"), ("fc1", "mlp.0"), ("fc2", "mlp.2")):
        rules.append(Rule(rf"merger\.{ours}\.(.*)", (prefix + rf"merger.{theirs}.\1",)))
        rules.append(Rule(rf"deepstack_merger_list\.(\d+)\.{ours}\.(.*)", (prefix + rf"merger_list.\1.{theirs}.\2",)))
    return Layout(prefix + "*", (prefix,), (*rules, Rule(r"(.*)", (prefix + r"\1",))))


def processor(config: Qwen3VLConfig, image: Json | None, video: Json | None) -> Processor:
    """The reference processor's resize and patchify, with the checkpoint's own limits where it states them."""
    return SmartResizeProcessor.from_hf(
        image,
        video,
        patch_size=config.patch_size,
        temporal_patch_size=config.temporal_patch_size,
        merge_size=config.spatial_merge_size,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
    )


def tiny() -> tuple[dict[str, Any], dict[str, Any]]:
    """Three layers of width 64 with two deepstack levels."""
    config, preprocessor = qwen3_vl.tiny()
    vision = {**config["vision_config"], "model_type": "qwen3_omni_moe_vision_encoder"}
    thinker = {"model_type": "qwen3_omni_moe_thinker", "vision_config": vision}
    architecture = "Qwen3OmniMoeForConditionalGeneration"
    config = {"architectures": [architecture], "model_type": "qwen3_omni_moe", "thinker_config": thinker}
    return config, {**preprocessor, "size": {"shortest_edge": 3136, "longest_edge": 12845056}}


FAMILY = Family(
    name="qwen3_omni",
    title="Qwen3-Omni (vision)",
    model_types=("qwen3_omni_moe", "qwen3_omni_moe_thinker"),
    modalities=("image", "video"),
    parse_config=parse_config,
    build=Qwen3OmniTower,
    layouts=layouts,
    processor=processor,
    tiny=tiny,
)
