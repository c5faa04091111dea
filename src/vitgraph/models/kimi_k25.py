"""Kimi-K2.5 and K2.6: MoonViT over short clips, and its projector.

Kimi-VL's tower with clips of a few frames as one item: each frame's patches get a fixed sinusoid, attention spans the
clip, and the frames are averaged at every position before the projector, so a clip makes as many tokens as an image.
Reference: transformers `Kimi_K25VisionModel` and its projector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitgraph.attention.base import VarlenAttention
from vitgraph.core import Counts, Grid
from vitgraph.errors import PatchError
from vitgraph.layers.order import merge_gather, repeat_frames, segment_ends
from vitgraph.layers.pos_embed import gather_table
from vitgraph.models.contract import BufferSpec, TowerBuffers, TowerSpec, cu_seqlens_buffer
from vitgraph.models.fields import read_fields
from vitgraph.models.kimi_vl import CHANNELS, POSITION_BUFFERS, THETA, KimiVLConfig, KimiVLTower, published_rules
from vitgraph.models.layout import Flatten, Fuse, Layout, Rule
from vitgraph.models.registry import Family, Json
from vitgraph.preprocess.kimi import KimiChunkProcessor
from vitgraph.preprocess.processor import Processor


@dataclass(frozen=True)
class KimiK25Config(KimiVLConfig):
    """As Kimi-VL's, plus the most frames of a clip."""

    init_pos_emb_time: int = 4

    @classmethod
    def from_hf(cls, config: Json) -> KimiK25Config:
        """From a config.json, with the published names or those of Transformers."""
        vision = config["vision_config"]
        published = {key.removeprefix("vt_"): value for key, value in vision.items() if key.startswith("vt_")}
        native = {f"init_{key}": value for key, value in vision.items() if key.startswith("pos_emb_")}
        width = (config.get("text_config") or {}).get("hidden_size") or vision.get("text_hidden_size", 7168)
        merge = vision.get("merge_kernel_size", (2, 2))[0]
        return read_fields(cls, {**native, **vision, **published}, text_width=width, merge=merge)


@dataclass(frozen=True)
class ClipSpec(TowerSpec):
    """A tower that takes a clip as one segment and averages over its frames.

    Attributes:
        longest: most temporal patches of a clip.
    """

    longest: int = 4

    def counts(self, grid: Grid) -> Counts:
        """One segment per item, and as many tokens as one frame has."""
        tokens = grid.h * grid.w // self.merge**2
        return {"patch": grid.patches, "token": tokens, "item": 1, "segment": 1}

    def check_grid(self, grid: Grid) -> None:
        super().check_grid(grid)
        if grid.t > self.longest:
            raise PatchError(
                f"grid {grid.t}x{grid.h}x{grid.w} has {grid.t} temporal patches, but the time table of {self.family} "
                f"has {self.longest} rows. Pass the clip in chunks of at most {self.longest} frames, one item each."
            )


class KimiK25Tower(KimiVLTower):
    """Patch embedding with space and time positions, blocks, final norm, the mean over frames and the multimodal
    projector."""

    config: KimiK25Config
    time_table: Tensor

    def __init__(self, config: KimiK25Config, attention: VarlenAttention) -> None:
        super().__init__(config, attention)
        self.register_buffer("time_table", time_table(config.init_pos_emb_time, config.hidden_size), persistent=False)

    def _declare(self, config: KimiVLConfig) -> TowerSpec:
        assert isinstance(config, KimiK25Config)
        frames = config.init_pos_emb_time
        return ClipSpec(
            family="kimi_k25",
            modalities=("image", "video"),
            patch_width=CHANNELS * config.patch_size**2,
            merge=config.merge,
            temporal_patch=1,
            width=config.text_width,
            longest=frames,
            buffers=(
                *POSITION_BUFFERS,
                BufferSpec("frame_index", "int32", "patch"),
                BufferSpec("pool_index", "int32", "token", (config.merge**2 * frames,), offset="patch"),
                BufferSpec("pool_weight", "float32", "token", (frames,)),
                cu_seqlens_buffer(),
            ),
        )

    def metadata(self, grid: Grid) -> dict[str, np.ndarray]:
        frame = super().metadata(Grid(1, grid.h, grid.w))
        numbers = np.arange(grid.t, dtype=np.int32) + np.int32(grid.t > 1)
        pool_index, pool_weight = mean_taps(grid, self.spec.merge, self.config.init_pos_emb_time)
        return {
            **{buffer.name: repeat_frames(frame[buffer.name], grid) for buffer in POSITION_BUFFERS},
            "frame_index": numbers.repeat(grid.h * grid.w),
            "pool_index": pool_index,
            "pool_weight": pool_weight,
            "cu_seqlens": segment_ends(grid, per_frame=False),
        }

    def add_positions(self, x: Tensor, meta: Mapping[str, Tensor]) -> Tensor:
        # Both tables are summed before the one rounding.
        table = gather_table(self.pos_emb.weight, meta["interp_indices"], meta["interp_weights"])
        return x + (table + self.time_table.index_select(0, meta["frame_index"])).to(x.dtype)

    def forward(self, buffers: TowerBuffers) -> Tensor:
        x = self.encode(buffers)
        index, weight = buffers.metadata["pool_index"], buffers.metadata["pool_weight"]
        frames = weight.shape[1]
        weight = weight[:, None].expand(-1, self.spec.merge**2, -1).reshape(-1, frames)
        mean = gather_table(x, index.view(-1, frames), weight)
        return self.projector(mean.to(x.dtype)).unsqueeze(0)


def time_table(frames: int, dim: int) -> Tensor:
    """`[1 + frames, dim]` fp32: a zero row for images, then each frame's sines and cosines."""
    # Always real, also while the tower around it is built on the meta device.
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    angles = torch.outer(torch.arange(frames, dtype=torch.float32, device="cpu"), 1.0 / THETA**exponents)
    return torch.cat([torch.zeros(1, dim, device="cpu"), torch.cat([angles.sin(), angles.cos()], 1)])


def mean_taps(grid: Grid, merge: int, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Taps of the mean over frames: per token, the patch rows of each position of its cell.

    Taps past the clip's last frame repeat that frame with weight 0: even then a NaN would come through, and so it
    stays within the item.

    Returns:
        Rows `[M, merge^2 * frames]` int32, the frames of a position side by side, and weights `[M, frames]` float32.
    """
    size = grid.h * grid.w
    starts = np.minimum(np.arange(frames, dtype=np.int32), np.int32(grid.t - 1)) * np.int32(size)
    rows = merge_gather(Grid(1, grid.h, grid.w), merge)[:, None] + starts
    weight = np.zeros((size // merge**2, frames), np.float32)
    weight[:, : grid.t] = np.float32(1) / np.float32(grid.t)
    return rows.reshape(len(weight), -1), weight


def layouts(config: KimiK25Config) -> tuple[Layout, ...]:
    """The published layout, and the one of Transformers' own modules."""
    return (
        Layout(
            name="vision_tower.* + mm_projector.*",
            prefixes=("vision_tower.", "mm_projector."),
            rules=(
                *published_rules(config),
                Rule(r"projector\.norm\.(.*)", (r"mm_projector.pre_norm.\1",)),
                Rule(r"projector\.fc1\.(.*)", (r"mm_projector.proj.0.\1",)),
                Rule(r"projector\.fc2\.(.*)", (r"mm_projector.proj.2.\1",)),
            ),
        ),
        _native_layout(config),
    )


def _native_layout(config: KimiK25Config) -> Layout:
    dim, patch = config.hidden_size, config.patch_size
    tower, projector = "model.vision_tower.", "model.mm_projector."
    kernel = Flatten((dim, CHANNELS, patch, patch))
    table = Flatten((config.init_pos_emb_height, config.init_pos_emb_width, dim), keep_last=True)
    qkv = tuple(rf"{tower}layers.\1.attn.{name}_proj.\2" for name in "qkv")
    return Layout(
        name=f"{tower}* + {projector}*",
        prefixes=(tower, projector),
        rules=(
            Rule(r"patch_embed\.proj\.weight", (tower + "patch_embed.proj.weight",), kernel),
            Rule(r"pos_emb\.weight", (tower + "patch_embed.pos_emb.position_embeddings",), table),
            Rule(r"blocks\.(\d+)\.attn\.qkv\.(.*)", qkv, Fuse((dim, dim, dim))),
            Rule(r"blocks\.(.*)", (tower + r"layers.\1",)),
            Rule(r"projector\.norm\.(.*)", (projector + r"pre_norm.\1",)),
            Rule(r"projector\.fc1\.(.*)", (projector + r"in_proj.\1",)),
            Rule(r"projector\.fc2\.(.*)", (projector + r"out_proj.\1",)),
            Rule(r"(.*)", (tower + r"\1",)),
        ),
    )


def processor(config: KimiK25Config, image: Json | None, video: Json | None) -> Processor:
    """The reference processor's limits, resize, zero padding and patchify; a clip is one chunk of frames."""
    sizes = {"patch_size": config.patch_size, "merge_size": config.merge, "chunk_frames": config.init_pos_emb_time}
    return KimiChunkProcessor.from_hf(image, video, **sizes, max_patches=16384, fit_sides=True)


def tiny() -> tuple[dict[str, Any], dict[str, Any]]:
    """Two layers of width 64 and clips of at most four frames."""
    table = {"init_pos_emb_height": 8, "init_pos_emb_width": 8, "init_pos_emb_time": 4}
    vision = {
        **table,
        "merge_kernel_size": [2, 2],
        "mm_hidden_size": 64,
        "patch_size": 14,
        "text_hidden_size": 48,
        "vt_hidden_size": 64,
        "vt_intermediate_size": 112,
        "vt_num_attention_heads": 4,
        "vt_num_hidden_layers": 2,
    }
    config = {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        "text_config": {"hidden_size": 48},
        "vision_config": vision,
    }
    media = {
        "in_patch_limit": 16384,
        "in_patch_limit_each_frame": 4096,
        "patch_limit_on_one_side": 512,
        "patch_size": 14,
        "merge_kernel_size": 2,
        "temporal_merge_kernel_size": 4,
        "sample_fps": 2.0,
    }
    return config, {"media_proc_cfg": media}


FAMILY = Family(
    name="kimi_k25",
    title="Kimi-K2.5, Kimi-K2.6",
    model_types=("kimi_k25",),
    modalities=("image", "video"),
    parse_config=KimiK25Config.from_hf,
    build=KimiK25Tower,
    layouts=layouts,
    processor=processor,
    tiny=tiny,
)
