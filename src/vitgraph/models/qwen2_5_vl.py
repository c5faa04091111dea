"""Qwen2.5-VL, and the vision side of Qwen2.5-Omni.

A ViT on flattened patches with RMS norms, gated MLPs and half-split rotary positions (y, x). Most layers attend within
windows of merge cells, a few within whole temporal patches. So that windows are contiguous, the rows travel through
the blocks in window order: merge cells move as wholes, and the merged tokens move back at the end.
Reference: transformers `Qwen2_5_VisionTransformerPretrainedModel`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn

from vitgraph.attention.base import VarlenAttention
from vitgraph.core import Counts, Grid
from vitgraph.layers.block import Attention, Block
from vitgraph.layers.merger import PatchMerger
from vitgraph.layers.mlp import GatedMlp
from vitgraph.layers.norm import RMSNorm
from vitgraph.layers.order import frame_coordinates, repeat_frames, segment_ends
from vitgraph.layers.patch_embed import PatchEmbed
from vitgraph.layers.rotary import axial_angles, axis_frequencies
from vitgraph.models.contract import BufferSpec, SegmentSpec, Tower, TowerBuffers, TowerSpec, cu_seqlens_buffer
from vitgraph.models.fields import read_fields
from vitgraph.models.layout import Flatten, Fuse, Layout, Rule
from vitgraph.models.qwen2_vl import vision_rules
from vitgraph.models.registry import Family, Json
from vitgraph.preprocess.processor import Processor, SmartResizeProcessor

EPS = 1e-6
THETA = 10000.0


@dataclass(frozen=True)
class Qwen25VLConfig:
    """Numbers of the tower, under the names of config.json's `vision_config`. `window_size` is in pixels."""

    hidden_size: int
    out_hidden_size: int
    depth: int = 32
    intermediate_size: int = 3420
    num_heads: int = 16
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    window_size: int = 112
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    in_channels: int = 3

    @classmethod
    def from_hf(cls, config: Json) -> Qwen25VLConfig:
        """From a config.json; that of Qwen2.5-Omni keeps the vision side under `thinker_config`."""
        vision = config.get("thinker_config", config)["vision_config"]
        return read_fields(cls, vision)

    @property
    def kernel(self) -> tuple[int, int, int, int]:
        """Shape of one patch, (C, T, p, p)."""
        return (self.in_channels, self.temporal_patch_size, self.patch_size, self.patch_size)

    @property
    def window(self) -> int:
        """Side of a window in merge cells."""
        return self.window_size // self.spatial_merge_size // self.patch_size


@dataclass(frozen=True)
class WindowedSpec(TowerSpec):
    """A tower whose frames are cut into windows.

    Attributes:
        window: side of a window in merge cells; windows in the last row and column may be smaller.
    """

    window: int = 4

    def counts(self, grid: Grid) -> Counts:
        rows, columns = (-(-side // self.merge // self.window) for side in (grid.h, grid.w))
        return {**super().counts(grid), "window": grid.t * rows * columns}

    def capacity(self, tokens: int, max_items: int, max_frames: int) -> Counts:
        """Enough windows for any frames that fit in tokens and segments.

        A frame of a x b cells has at most `(ab + k - 1) / k` windows of side k; strips one cell high come closest.
        """
        base = super().capacity(tokens, max_items, max_frames)
        windows = (tokens + (self.window - 1) * base["segment"]) // self.window
        return {**base, "window": min(windows, tokens)}


class Qwen25VLTower(Tower):
    """Patch embedding, window order, blocks, merger, the caller's order."""

    frequencies: Tensor

    def __init__(self, config: Qwen25VLConfig, attention: VarlenAttention) -> None:
        super().__init__()
        dim, heads, merge = config.hidden_size, config.num_heads, config.spatial_merge_size
        self.config = config
        self.spec = WindowedSpec(
            family="qwen2_5_vl",
            modalities=("image", "video"),
            patch_width=int(np.prod(config.kernel)),
            merge=merge,
            temporal_patch=config.temporal_patch_size,
            width=config.out_hidden_size,
            window=config.window,
            splits_by_frame=True,
            buffers=(
                BufferSpec("position_ids", "int32", "patch", (2,)),
                BufferSpec("window_index", "int32", "token", pad="identity_tail", offset="token"),
                BufferSpec("reverse_index", "int32", "token", pad="identity_tail", offset="token"),
                cu_seqlens_buffer(),
                cu_seqlens_buffer("cu_window_seqlens", rows="window"),
            ),
            segments=(SegmentSpec(), SegmentSpec("cu_window_seqlens", (config.window * merge) ** 2)),
        )
        self.patch_embed = PatchEmbed(self.spec.patch_width, dim, bias=False)
        norm = partial(RMSNorm, dim, EPS)
        self.blocks = nn.ModuleList(
            Block(norm, Attention(dim, heads, attention), GatedMlp(dim, config.intermediate_size, bias=True))
            for _ in range(config.depth)
        )
        self.merger = PatchMerger(dim, merge, config.out_hidden_size, EPS)
        self.merger.register_module("norm", norm())
        self.register_buffer("frequencies", axis_frequencies(dim // heads, THETA), persistent=False)

    def metadata(self, grid: Grid) -> dict[str, np.ndarray]:
        merge = self.spec.merge
        order, lengths = window_order(grid.h // merge, grid.w // merge, self.config.window)
        cells = frame_coordinates(grid.h, grid.w, merge).astype(np.int32).reshape(len(order), merge**2, 2)
        starts = np.arange(grid.t, dtype=np.int32)[:, None] * np.int32(len(order))
        return {
            "position_ids": repeat_frames(cells[order].reshape(-1, 2), grid),
            "window_index": (starts + order).reshape(-1),
            "reverse_index": (starts + np.argsort(order).astype(np.int32)).reshape(-1),
            "cu_seqlens": segment_ends(grid),
            "cu_window_seqlens": np.cumsum(repeat_frames(lengths, grid) * merge**2, dtype=np.int32),
        }

    def forward(self, buffers: TowerBuffers) -> Tensor:
        meta = buffers.metadata
        cells = self.patch_embed(buffers.pixel_values).unflatten(0, (-1, self.spec.merge**2))
        x = cells.index_select(0, meta["window_index"]).flatten(0, 1)
        angles = axial_angles(meta["position_ids"], self.frequencies)
        rotary = angles.cos(), angles.sin()
        for layer, block in enumerate(self.blocks):
            full = layer in self.config.fullatt_block_indexes
            x = block(x, rotary, buffers.segments["cu_seqlens" if full else "cu_window_seqlens"])
        return self.merger(x).index_select(0, meta["reverse_index"]).unsqueeze(0)

    def compile_regions(self) -> Iterable[nn.Module]:
        return self.blocks


def window_order(rows: int, columns: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Cells of one frame, window after window; within a window in raster order, as are the windows themselves.

    Args:
        rows, columns: size of the frame in merge cells.
        side: of a window, in merge cells.

    Returns:
        Raster indexes of the cells in window order `[rows * columns]` int32, and cells per window, none of them 0.
    """
    y, x = np.divmod(np.arange(rows * columns), columns)
    window = y // side * -(-columns // side) + x // side
    return np.argsort(window, kind="stable").astype(np.int32), np.bincount(window)


def layouts(config: Qwen25VLConfig) -> tuple[Layout, ...]:
    """The published layout, the one with an outer `model.` level, and Qwen2.5-Omni's: whole, and the thinker alone."""
    kernel = Flatten((config.hidden_size, *config.kernel))
    split = Fuse((config.hidden_size,) * 3)
    found = [Layout(p + "*", (p,), vision_rules(p, kernel)) for p in ("visual.", "model.visual.")]
    for prefix in ("thinker.visual.", "visual."):
        parts = tuple(prefix + rf"\1.{part}.\2" for part in "qkv")
        rules = (Rule(r"(blocks\.\d+\.attn)\.qkv\.(.*)", parts, split), *vision_rules(prefix, kernel))
        found.append(Layout(prefix + "* with split qkv", (prefix,), rules))
    return tuple(found)


def processor(config: Qwen25VLConfig, image: Json | None, video: Json | None) -> Processor:
    """The reference processor's resize and patchify, with the checkpoint's own limits where it states them."""
    return SmartResizeProcessor.from_hf(
        image,
        video,
        patch_size=config.patch_size,
        temporal_patch_size=config.temporal_patch_size,
        merge_size=config.spatial_merge_size,
    )


def tiny() -> tuple[dict[str, Any], dict[str, Any]]:
    """Four layers of width 64, two of them with full attention."""
    vision = {
        "model_type": "qwen2_5_vl",
        "depth": 4,
        "hidden_size": 64,
        "hidden_act": "silu",
        "intermediate_size": 112,
        "num_heads": 4,
        "out_hidden_size": 48,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [1, 3],
    }
    kind = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl"}
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
    return {**kind, "vision_config": vision}, preprocessor


FAMILY = Family(
    name="qwen2_5_vl",
    title="Qwen2.5-VL, Qwen2.5-Omni (vision)",
    model_types=("qwen2_5_vl", "qwen2_5_omni", "qwen2_5_omni_thinker"),
    modalities=("image", "video"),
    parse_config=Qwen25VLConfig.from_hf,
    build=Qwen25VLTower,
    layouts=layouts,
    processor=processor,
    tiny=tiny,
)
