"""Qwen3-VL, dense and mixture-of-experts, and the checkpoints that share its tower (Qwen3-VL-Embedding and others).

A ViT on flattened patches with a bilinearly resampled position table, half-split rotary positions (y, x), one
attention segment per temporal patch, and deepstack: mergers at listed layers whose maps the language model adds to its
first layers. Reference: transformers `Qwen3VLVisionModel`.
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
from vitgraph.layers.ops import add_table
from vitgraph.layers.order import frame_coordinates, repeat_frames, segment_ends
from vitgraph.layers.overlap import SideBranches
from vitgraph.layers.patch_embed import PatchEmbed
from vitgraph.layers.pos_embed import table_taps
from vitgraph.layers.rotary import axial_angles, axis_frequencies
from vitgraph.models.contract import BufferSpec, Tower, TowerBuffers, TowerSpec, cu_seqlens_buffer
from vitgraph.models.fields import read_fields
from vitgraph.models.layout import Flatten, Layout, Rule
from vitgraph.models.registry import Family, Json
from vitgraph.preprocess.processor import Processor, SmartResizeProcessor

EPS = 1e-6
THETA = 10000.0


@dataclass(frozen=True)
class Qwen3VLConfig:
    """Numbers of the tower, under the names of config.json's `vision_config`."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    num_position_embeddings: int
    deepstack_visual_indexes: tuple[int, ...] = (8, 16, 24)
    patch_size: int = 16
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    in_channels: int = 3

    @classmethod
    def from_hf(cls, config: Json) -> Qwen3VLConfig:
        """From a config.json."""
        vision = config["vision_config"]
        return read_fields(cls, vision)

    @property
    def table_side(self) -> int:
        return int(self.num_position_embeddings**0.5)

    @property
    def kernel(self) -> tuple[int, int, int, int]:
        """Shape of one patch, (C, T, p, p)."""
        return (self.in_channels, self.temporal_patch_size, self.patch_size, self.patch_size)


class Qwen3VLTower(Tower):
    """Patch embedding, blocks, merger and deepstack mergers."""

    family = "qwen3_vl"
    frequencies: Tensor

    def __init__(self, config: Qwen3VLConfig, attention: VarlenAttention) -> None:
        super().__init__()
        dim, heads = config.hidden_size, config.num_heads
        self.config = config
        self.spec = TowerSpec(
            family=self.family,
            modalities=("image", "video"),
            patch_width=int(np.prod(config.kernel)),
            merge=config.spatial_merge_size,
            temporal_patch=config.temporal_patch_size,
            width=config.out_hidden_size,
            deepstack=len(config.deepstack_visual_indexes),
            splits_by_frame=True,
            buffers=(
                BufferSpec("position_ids", "int32", "patch", (2,)),
                BufferSpec("interp_indices", "int32", "patch", (4,)),
                BufferSpec("interp_weights", "float32", "patch", (4,)),
                cu_seqlens_buffer(),
            ),
        )
        self.patch_embed = PatchEmbed(self.spec.patch_width, dim)
        self.pos_embed = nn.Embedding(config.num_position_embeddings, dim)
        norm = partial(nn.LayerNorm, dim, eps=EPS)
        self.blocks = nn.ModuleList(
            Block(norm, Attention(dim, heads, attention), Mlp(dim, config.intermediate_size))
            for _ in range(config.depth)
        )
        merger = partial(PatchMerger, dim, config.spatial_merge_size, config.out_hidden_size, EPS)
        self.merger = merger()
        self.deepstack_merger_list = nn.ModuleList(
            merger(norm_after_concat=True) for _ in config.deepstack_visual_indexes
        )
        self.register_buffer("frequencies", axis_frequencies(dim // heads, THETA), persistent=False)

    def metadata(self, grid: Grid) -> dict[str, np.ndarray]:
        merge = self.spec.merge
        index, weight = table_taps(grid.h, grid.w, self.config.table_side, "bilinear", True, merge)
        positions = frame_coordinates(grid.h, grid.w, merge).astype(np.int32)
        return {
            "position_ids": repeat_frames(positions, grid),
            "interp_indices": repeat_frames(index, grid),
            "interp_weights": repeat_frames(weight, grid),
            "cu_seqlens": segment_ends(grid),
        }

    def forward(self, buffers: TowerBuffers) -> Tensor:
        meta, segments = buffers.metadata, buffers.segments["cu_seqlens"]
        x = self.patch_embed(buffers.pixel_values)
        x = add_table(x, self.pos_embed.weight, meta["interp_indices"], meta["interp_weights"])
        angles = axial_angles(meta["position_ids"], self.frequencies)
        rotary = angles.cos(), angles.sin()
        levels = self.levels(buffers)
        branches = SideBranches(x.device, x.shape[0])
        deepstack = zip(self.deepstack_merger_list, levels[1:], strict=True)
        for layer, block in enumerate(self.blocks):
            x = block(x, rotary, segments)
            if layer in self.config.deepstack_visual_indexes:
                merger, level = next(deepstack)
                branches.run(merger, x, level)
        self.merger(x, levels[0])
        branches.join()
        return levels

    def compile_regions(self) -> Iterable[nn.Module]:
        return self.blocks


def layouts(config: Qwen3VLConfig) -> tuple[Layout, ...]:
    """The published layout, and the one without the outer `model.` level."""
    return tuple(_layout(prefix, config) for prefix in ("model.visual.", "visual."))


def _layout(prefix: str, config: Qwen3VLConfig) -> Layout:
    kernel = Flatten((config.hidden_size, *config.kernel))
    return Layout(
        name=prefix + "*",
        prefixes=(prefix,),
        rules=(
            Rule(r"patch_embed\.proj\.weight", (prefix + "patch_embed.proj.weight",), kernel),
            Rule(r"(blocks\.\d+\.mlp)\.(fc\d\..*)", (prefix + r"\1.linear_\2",)),
            Rule(r"((?:merger|deepstack_merger_list\.\d+)\.)(fc\d\..*)", (prefix + r"\1linear_\2",)),
            Rule(r"(.*)", (prefix + r"\1",)),
        ),
    )


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
        video_scope="clip",
        video_min_pixels=128 * 32 * 32,
        video_max_pixels=768 * 32 * 32,
        sampling="spread",
        max_video_tokens=768,
    )


def tiny() -> tuple[dict[str, Any], dict[str, Any]]:
    """Three layers of width 64 with two deepstack levels."""
    vision = {
        "model_type": "qwen3_vl",
        "depth": 3,
        "hidden_size": 64,
        "hidden_act": "gelu_pytorch_tanh",
        "intermediate_size": 112,
        "num_heads": 4,
        "in_channels": 3,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 48,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    config = {"architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", "vision_config": vision}
    preprocessor = {
        "size": {"shortest_edge": 65536, "longest_edge": 16777216},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "image_processor_type": "Qwen2VLImageProcessorFast",
    }
    return config, preprocessor


FAMILY = Family(
    name="qwen3_vl",
    title="Qwen3-VL (dense and MoE), Qwen3-VL-Embedding",
    model_types=("qwen3_vl", "qwen3_vl_moe"),
    modalities=("image", "video"),
    parse_config=Qwen3VLConfig.from_hf,
    build=Qwen3VLTower,
    layouts=layouts,
    processor=processor,
    tiny=tiny,
)
