"""Qwen2-VL and the checkpoints that share its tower.

A ViT on flattened patches without a position table: half-split rotary positions (y, x), quick GELU, and one attention
segment per temporal patch. Reference: transformers `Qwen2VisionTransformerPretrainedModel`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn

from vitgraph.attention.base import VarlenAttention
from vitgraph.core import Grid
from vitgraph.layers.block import Attention, Block
from vitgraph.layers.merger import PatchMerger
from vitgraph.layers.mlp import Mlp
from vitgraph.layers.order import frame_coordinates, repeat_frames, segment_ends
from vitgraph.layers.patch_embed import PatchEmbed
from vitgraph.layers.rotary import axial_angles, axis_frequencies
from vitgraph.models.contract import BufferSpec, Tower, TowerBuffers, TowerSpec, cu_seqlens_buffer
from vitgraph.models.fields import read_fields
from vitgraph.models.layout import Flatten, Layout, Rule
from vitgraph.models.registry import Family, Json
from vitgraph.preprocess.processor import Processor, SmartResizeProcessor

EPS = 1e-6
THETA = 10000.0


@dataclass(frozen=True)
class Qwen2VLConfig:
    """Numbers of the tower, under the names of config.json's `vision_config`.

    `embed_dim` is the tower's own width; `hidden_size` is the width of its output.
    """

    hidden_size: int
    depth: int = 32
    embed_dim: int = 1280
    num_heads: int = 16
    mlp_ratio: float = 4
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    in_channels: int = 3

    @classmethod
    def from_hf(cls, config: Json) -> Qwen2VLConfig:
        """From a config.json."""
        vision = config["vision_config"]
        return read_fields(cls, vision)

    @property
    def kernel(self) -> tuple[int, int, int, int]:
        """Shape of one patch, (C, T, p, p)."""
        return (self.in_channels, self.temporal_patch_size, self.patch_size, self.patch_size)


class Qwen2VLTower(Tower):
    """Patch embedding, blocks and merger."""

    frequencies: Tensor

    def __init__(self, config: Qwen2VLConfig, attention: VarlenAttention) -> None:
        super().__init__()
        dim, heads = config.embed_dim, config.num_heads
        self.config = config
        self.spec = TowerSpec(
            family="qwen2_vl",
            modalities=("image", "video"),
            patch_width=int(np.prod(config.kernel)),
            merge=config.spatial_merge_size,
            temporal_patch=config.temporal_patch_size,
            width=config.hidden_size,
            splits_by_frame=True,
            buffers=(BufferSpec("position_ids", "int32", "patch", (2,)), cu_seqlens_buffer()),
        )
        self.patch_embed = PatchEmbed(self.spec.patch_width, dim, bias=False)
        norm = partial(nn.LayerNorm, dim, eps=EPS)
        self.blocks = nn.ModuleList(
            Block(norm, Attention(dim, heads, attention), Mlp(dim, int(dim * config.mlp_ratio), "quick_gelu"))
            for _ in range(config.depth)
        )
        self.merger = PatchMerger(dim, config.spatial_merge_size, config.hidden_size, EPS)
        self.register_buffer("frequencies", axis_frequencies(dim // heads, THETA), persistent=False)

    def metadata(self, grid: Grid) -> dict[str, np.ndarray]:
        positions = frame_coordinates(grid.h, grid.w, self.spec.merge).astype(np.int32)
        return {"position_ids": repeat_frames(positions, grid), "cu_seqlens": segment_ends(grid)}

    def forward(self, buffers: TowerBuffers) -> Tensor:
        segments = buffers.segments["cu_seqlens"]
        x = self.patch_embed(buffers.pixel_values)
        angles = axial_angles(buffers.metadata["position_ids"], self.frequencies)
        rotary = angles.cos(), angles.sin()
        for block in self.blocks:
            x = block(x, rotary, segments)
        return self.merger(x).unsqueeze(0)

    def compile_regions(self) -> Iterable[nn.Module]:
        return self.blocks


def layouts(config: Qwen2VLConfig) -> tuple[Layout, ...]:
    """The published layout, and the one with an outer `model.` level."""
    kernel = Flatten((config.embed_dim, *config.kernel))
    return tuple(Layout(p + "*", (p,), vision_rules(p, kernel)) for p in ("visual.", "model.visual."))


def vision_rules(prefix: str, kernel: Flatten) -> tuple[Rule, ...]:
    """Rules for towers that name their merger `ln_q`, `mlp.0`, `mlp.2`; every other name is the tower's own."""
    return (
        Rule(r"patch_embed\.proj\.weight", (prefix + "patch_embed.proj.weight",), kernel),
        Rule(r"merger\.norm\.(.*)", (prefix + r"merger.ln_q.\1",)),
        Rule(r"merger\.fc1\.(.*)", (prefix + r"merger.mlp.0.\1",)),
        Rule(r"merger\.fc2\.(.*)", (prefix + r"merger.mlp.2.\1",)),
        Rule(r"(.*)", (prefix + r"\1",)),
    )


def processor(config: Qwen2VLConfig, image: Json | None, video: Json | None) -> Processor:
    """The reference processor's resize and patchify, with the checkpoint's own limits where it states them."""
    return SmartResizeProcessor.from_hf(
        image,
        video,
        patch_size=config.patch_size,
        temporal_patch_size=config.temporal_patch_size,
        merge_size=config.spatial_merge_size,
    )


def tiny() -> tuple[dict[str, Any], dict[str, Any]]:
    """Three layers of width 64."""
    vision = {
        "model_type": "qwen2_vl",
        "depth": 3,
        "embed_dim": 64,
        "hidden_act": "quick_gelu",
        "hidden_size": 48,
        "mlp_ratio": 2,
        "num_heads": 4,
        "in_channels": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    config = {"architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl", "vision_config": vision}
    preprocessor = {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
    }
    return config, preprocessor


FAMILY = Family(
    name="qwen2_vl",
    title="Qwen2-VL",
    model_types=("qwen2_vl",),
    modalities=("image", "video"),
    parse_config=Qwen2VLConfig.from_hf,
    build=Qwen2VLTower,
    layouts=layouts,
    processor=processor,
    tiny=tiny,
)
