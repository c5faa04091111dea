"""Kimi-VL: MoonViT and its projector.

A ViT on raster-ordered patches with a bicubically resampled position table, interleaved rotary positions (x, y
alternating), one attention segment per image, a final norm, and a projector over 2 x 2 cells.
Reference: the tower of transformers `Kimi_K25VisionModel` at t = 1, which computes the same function.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
from vitgraph.layers.order import frame_coordinates, merge_gather, segment_ends
from vitgraph.layers.patch_embed import PatchEmbed
from vitgraph.layers.pos_embed import table_taps
from vitgraph.layers.rotary import alternating_angles, axis_frequencies
from vitgraph.models.contract import BufferSpec, Tower, TowerBuffers, TowerSpec, cu_seqlens_buffer
from vitgraph.models.fields import read_fields
from vitgraph.models.layout import Flatten, HalfSplitQkv, Layout, Rule
from vitgraph.models.registry import Family, Json
from vitgraph.preprocess.processor import NavitProcessor, Processor

EPS = 1e-5
THETA = 10000.0
CHANNELS = 3
POSITION_BUFFERS = (
    BufferSpec("position_ids", "int32", "patch", (2,)),
    BufferSpec("interp_indices", "int32", "patch", (16,)),
    BufferSpec("interp_weights", "float32", "patch", (16,)),
)
"""The same for every frame of one size."""


@dataclass(frozen=True)
class KimiVLConfig:
    """Numbers of the tower, under the names of config.json's `vision_config`; `text_width` is the output's."""

    text_width: int
    num_hidden_layers: int = 27
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_attention_heads: int = 16
    init_pos_emb_height: int = 64
    init_pos_emb_width: int = 64
    patch_size: int = 14
    merge: int = 2

    @classmethod
    def from_hf(cls, config: Json) -> KimiVLConfig:
        """From a config.json."""
        vision = config["vision_config"]
        width, merge = config["text_config"]["hidden_size"], vision.get("merge_kernel_size", (2, 2))[0]
        return read_fields(cls, vision, text_width=width, merge=merge)


class KimiVLTower(Tower):
    """Patch embedding, blocks, final norm and the multimodal projector."""

    frequencies: Tensor

    def __init__(self, config: KimiVLConfig, attention: VarlenAttention) -> None:
        super().__init__()
        dim, heads = config.hidden_size, config.num_attention_heads
        self.config = config
        self.spec = self._declare(config)
        self.patch_embed = PatchEmbed(self.spec.patch_width, dim)
        self.pos_emb = nn.Embedding(config.init_pos_emb_height * config.init_pos_emb_width, dim)
        norm = partial(nn.LayerNorm, dim, eps=EPS)
        self.blocks = nn.ModuleList(
            Block(norm, Attention(dim, heads, attention), Mlp(dim, config.intermediate_size))
            for _ in range(config.num_hidden_layers)
        )
        self.final_layernorm = norm()
        self.projector = PatchMerger(dim, config.merge, config.text_width, EPS)
        self.register_buffer("frequencies", axis_frequencies(dim // heads, THETA), persistent=False)

    def _declare(self, config: KimiVLConfig) -> TowerSpec:
        return TowerSpec(
            family="kimi_vl",
            modalities=("image",),
            patch_width=CHANNELS * config.patch_size**2,
            merge=config.merge,
            temporal_patch=1,
            width=config.text_width,
            buffers=(
                *POSITION_BUFFERS,
                BufferSpec("merge_index", "int32", "patch", pad="identity_tail", offset="patch"),
                cu_seqlens_buffer(),
            ),
        )

    def metadata(self, grid: Grid) -> dict[str, np.ndarray]:
        index, weight = table_taps(grid.h, grid.w, self.config.init_pos_emb_height, "bicubic", False)
        return {
            "position_ids": frame_coordinates(grid.h, grid.w).astype(np.int32),
            "interp_indices": index,
            "interp_weights": weight,
            "merge_index": merge_gather(grid, self.spec.merge),
            "cu_seqlens": segment_ends(grid),
        }

    def forward(self, buffers: TowerBuffers) -> Tensor:
        x = self.encode(buffers)
        return self.projector(x.index_select(0, buffers.metadata["merge_index"])).unsqueeze(0)

    def encode(self, buffers: TowerBuffers) -> Tensor:
        """Everything before the projector: `[P, D]`."""
        meta, segments = buffers.metadata, buffers.segments["cu_seqlens"]
        x = self.add_positions(self.patch_embed(buffers.pixel_values), meta)
        angles = alternating_angles(meta["position_ids"].flip(1), self.frequencies)
        rotary = angles.cos(), angles.sin()
        for block in self.blocks:
            x = block(x, rotary, segments)
        return self.final_layernorm(x)

    def add_positions(self, x: Tensor, meta: Mapping[str, Tensor]) -> Tensor:
        """Embedded patches `[P, D]` with their positions."""
        return add_table(x, self.pos_emb.weight, meta["interp_indices"], meta["interp_weights"])

    def compile_regions(self) -> Iterable[nn.Module]:
        return self.blocks


def layouts(config: KimiVLConfig) -> tuple[Layout, ...]:
    """The published layout."""
    return (
        Layout(
            name="vision_tower.* + multi_modal_projector.*",
            prefixes=("vision_tower.", "multi_modal_projector."),
            rules=(
                *published_rules(config),
                Rule(r"projector\.norm\.(.*)", (r"multi_modal_projector.pre_norm.\1",)),
                Rule(r"projector\.fc(\d)\.(.*)", (r"multi_modal_projector.linear_\1.\2",)),
            ),
        ),
    )


def published_rules(config: KimiVLConfig) -> tuple[Rule, ...]:
    """MoonViT as Moonshot publishes it, without the projector."""
    dim, patch = config.hidden_size, config.patch_size
    kernel = Flatten((dim, CHANNELS, patch, patch))
    table = Flatten((config.init_pos_emb_height, config.init_pos_emb_width, dim), keep_last=True)
    block = r"vision_tower.encoder.blocks.\1."
    return (
        Rule(r"patch_embed\.proj\.weight", ("vision_tower.patch_embed.proj.weight",), kernel),
        Rule(r"patch_embed\.proj\.bias", ("vision_tower.patch_embed.proj.bias",)),
        Rule(r"pos_emb\.weight", ("vision_tower.patch_embed.pos_emb.weight",), table),
        Rule(r"blocks\.(\d+)\.norm1\.(.*)", (block + r"norm0.\2",)),
        Rule(r"blocks\.(\d+)\.norm2\.(.*)", (block + r"norm1.\2",)),
        Rule(r"blocks\.(\d+)\.attn\.qkv\.(.*)", (block + r"wqkv.\2",), HalfSplitQkv(config.num_attention_heads)),
        Rule(r"blocks\.(\d+)\.attn\.proj\.(.*)", (block + r"wo.\2",)),
        Rule(r"blocks\.(\d+)\.mlp\.fc1\.(.*)", (block + r"mlp.fc0.\2",)),
        Rule(r"blocks\.(\d+)\.mlp\.fc2\.(.*)", (block + r"mlp.fc1.\2",)),
        Rule(r"final_layernorm\.(.*)", (r"vision_tower.encoder.final_layernorm.\1",)),
    )


def processor(config: KimiVLConfig, image: Json | None, video: Json | None) -> Processor:
    """The reference processor's limits, resize, zero padding and patchify."""
    return NavitProcessor.from_hf(image, patch_size=config.patch_size, merge_size=config.merge)


def tiny() -> tuple[dict[str, Any], dict[str, Any]]:
    """Two layers of width 64."""
    vision = {
        "model_type": "moonvit",
        "hidden_size": 64,
        "init_pos_emb_height": 8,
        "init_pos_emb_width": 8,
        "intermediate_size": 112,
        "merge_kernel_size": [2, 2],
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "patch_size": 14,
    }
    config = {
        "architectures": ["KimiVLForConditionalGeneration"],
        "model_type": "kimi_vl",
        "text_config": {"hidden_size": 48},
        "vision_config": vision,
    }
    preprocessor = {
        "in_token_limit": 4096,
        "patch_size": 14,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "merge_kernel_size": [2, 2],
        "pad_input": True,
    }
    return config, preprocessor


FAMILY = Family(
    name="kimi_vl",
    title="Kimi-VL (A3B, Thinking)",
    model_types=("kimi_vl",),
    modalities=("image",),
    parse_config=KimiVLConfig.from_hf,
    build=KimiVLTower,
    layouts=layouts,
    processor=processor,
    tiny=tiny,
)
