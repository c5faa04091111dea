"""GLM-4.1V, GLM-4.5V and GLM-4.6V, which share one tower.

A ViT on flattened patches with RMS norms, gated MLPs and half-split rotary positions (y, x). A bicubically resampled
position table is added after the norm that follows the patch embedding; a strided convolution merges the patches, and
a gated MLP follows it. Reference: transformers `Glm4vVisionModel`, `Glm4vMoeVisionModel`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from vitgraph.attention.base import VarlenAttention
from vitgraph.core import Grid
from vitgraph.layers.block import Attention, Block
from vitgraph.layers.mlp import GatedMlp
from vitgraph.layers.norm import RMSNorm
from vitgraph.layers.ops import add_table
from vitgraph.layers.order import frame_coordinates, repeat_frames, segment_ends
from vitgraph.layers.patch_embed import PatchEmbed
from vitgraph.layers.pos_embed import table_taps
from vitgraph.layers.rotary import axial_angles, axis_frequencies
from vitgraph.models.contract import BufferSpec, Tower, TowerBuffers, TowerSpec, cu_seqlens_buffer
from vitgraph.models.fields import read_fields
from vitgraph.models.layout import Flatten, Layout, Rule, Transform
from vitgraph.models.registry import Family, Json
from vitgraph.preprocess.processor import Processor, SmartResizeProcessor
from vitgraph.preprocess.sampling import Rule as SamplingRule

MERGER_EPS = 1e-5
THETA = 10000.0


@dataclass(frozen=True)
class Glm4vConfig:
    """Numbers of the tower, under the names of config.json's `vision_config`.

    `intermediate_size` is the width of the merger's MLP; that of the blocks is `out_hidden_size`. `attention_bias` is
    of qkv alone. `model_type` is the whole model's: it names the default frame sampling.
    """

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    image_size: int = 336
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    in_channels: int = 3
    attention_bias: bool = False
    rms_norm_eps: float = 1e-5
    rope_theta: float = THETA
    model_type: str = "glm4v"

    @classmethod
    def from_hf(cls, config: Json) -> Glm4vConfig:
        """From a config.json."""
        vision = config["vision_config"]
        theta = (vision.get("rope_parameters") or {}).get("rope_theta", THETA)
        return read_fields(cls, vision, rope_theta=theta, model_type=config["model_type"])

    @property
    def table_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def kernel(self) -> tuple[int, int, int, int]:
        """Shape of one patch, (C, T, p, p)."""
        return (self.in_channels, self.temporal_patch_size, self.patch_size, self.patch_size)


class ConvMerger(nn.Module):
    """Norm, convolution over m x m rows, projection, LayerNorm, GELU (exact), gated MLP: `[P, D] -> [P / m^2, C]`.

    The kernel of the convolution equals its stride, so it is a Linear on m*m rows in block order.

    Args:
        dim: D, width of a patch row.
        merge: m.
        out_dim: C.
        hidden: width of the gated MLP.
        eps: of the first norm.
    """

    def __init__(self, dim: int, merge: int, out_dim: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.width = dim * merge**2
        self.norm = RMSNorm(dim, eps)
        self.downsample = nn.Linear(self.width, out_dim)
        self.proj = nn.Linear(out_dim, out_dim, bias=False)
        self.proj_norm = nn.LayerNorm(out_dim, eps=MERGER_EPS)
        self.mlp = GatedMlp(out_dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(self.norm(x).view(-1, self.width))
        return self.mlp(F.gelu(self.proj_norm(self.proj(x))))


class Glm4vTower(Tower):
    """Patch embedding and its norm, position table, blocks, final norm, downsampling convolution and merger."""

    frequencies: Tensor

    def __init__(self, config: Glm4vConfig, attention: VarlenAttention) -> None:
        super().__init__()
        dim, heads, merge = config.hidden_size, config.num_heads, config.spatial_merge_size
        self.config = config
        self.spec = TowerSpec(
            family="glm4v",
            modalities=("image", "video"),
            patch_width=int(np.prod(config.kernel)),
            merge=merge,
            temporal_patch=config.temporal_patch_size,
            width=config.out_hidden_size,
            splits_by_frame=True,
            buffers=(
                BufferSpec("position_ids", "int32", "patch", (2,)),
                BufferSpec("interp_indices", "int32", "patch", (16,)),
                BufferSpec("interp_weights", "float32", "patch", (16,)),
                cu_seqlens_buffer(),
            ),
        )
        norm = partial(RMSNorm, dim, config.rms_norm_eps)
        self.patch_embed = PatchEmbed(self.spec.patch_width, dim)
        self.patch_norm = norm()
        self.pos_embed = nn.Embedding(config.table_side**2, dim)
        self.blocks = nn.ModuleList(
            Block(
                norm,
                Attention(dim, heads, attention, qkv_bias=config.attention_bias, proj_bias=False),
                GatedMlp(dim, config.out_hidden_size, bias=False),
            )
            for _ in range(config.depth)
        )
        self.merger = ConvMerger(dim, merge, config.out_hidden_size, config.intermediate_size, config.rms_norm_eps)
        self.register_buffer("frequencies", axis_frequencies(dim // heads, config.rope_theta), persistent=False)

    def metadata(self, grid: Grid) -> dict[str, np.ndarray]:
        merge = self.spec.merge
        index, weight = table_taps(grid.h, grid.w, self.config.table_side, "bicubic", False, merge)
        positions = frame_coordinates(grid.h, grid.w, merge).astype(np.int32)
        return {
            "position_ids": repeat_frames(positions, grid),
            "interp_indices": repeat_frames(index, grid),
            "interp_weights": repeat_frames(weight, grid),
            "cu_seqlens": segment_ends(grid),
        }

    def forward(self, buffers: TowerBuffers) -> Tensor:
        meta, segments = buffers.metadata, buffers.segments["cu_seqlens"]
        x = self.patch_norm(self.patch_embed(buffers.pixel_values))
        x = add_table(x, self.pos_embed.weight, meta["interp_indices"], meta["interp_weights"])
        angles = axial_angles(meta["position_ids"], self.frequencies)
        rotary = angles.cos(), angles.sin()
        for block in self.blocks:
            x = block(x, rotary, segments)
        return self.merger(x).unsqueeze(0)

    def compile_regions(self) -> Iterable[nn.Module]:
        return self.blocks


@dataclass(frozen=True)
class BlockKernel(Transform):
    """2D convolution kernel (out, C, m, m) -> matrix on m*m rows in block order, (out, m * m * C)."""

    merge: int

    def load(self, sources: list[Tensor]) -> Tensor:
        (kernel,) = sources
        return kernel.permute(0, 2, 3, 1).flatten(1)

    def save(self, parameter: Tensor) -> list[Tensor]:
        rows = parameter.unflatten(1, (self.merge, self.merge, -1))
        return [rows.permute(0, 3, 1, 2).contiguous()]


def layouts(config: Glm4vConfig) -> tuple[Layout, ...]:
    """The published layout, and the one without the outer `model.` level."""
    patch, downsample = Flatten((config.hidden_size, *config.kernel)), BlockKernel(config.spatial_merge_size)
    return tuple(
        Layout(
            name=prefix + "*",
            prefixes=(prefix,),
            rules=(
                Rule(r"patch_embed\.proj\.weight", (prefix + "patch_embed.proj.weight",), patch),
                Rule(r"patch_norm\.weight", (prefix + "post_conv_layernorm.weight",)),
                Rule(r"pos_embed\.weight", (prefix + "embeddings.position_embedding.weight",)),
                Rule(r"merger\.norm\.weight", (prefix + "post_layernorm.weight",)),
                Rule(r"merger\.downsample\.weight", (prefix + "downsample.weight",), downsample),
                Rule(r"merger\.downsample\.bias", (prefix + "downsample.bias",)),
                Rule(r"merger\.proj_norm\.(.*)", (prefix + r"merger.post_projection_norm.\1",)),
                Rule(r"merger\.mlp\.(.*)", (prefix + r"merger.\1",)),
                Rule(r"(.*)", (prefix + r"\1",)),
            ),
        )
        for prefix in ("model.visual.", "visual.")
    )


def processor(config: Glm4vConfig, image: Json | None, video: Json | None) -> Processor:
    """The reference processor's resize and patchify, with the checkpoint's own limits where it states them.

    GLM-4.6V samples clips by another rule than GLM-4.1V: the processor class that the files name decides, and without
    one `model_type`.
    """
    sampling: SamplingRule = "duration" if config.model_type in ("glm46v", "glm_ocr") else "seconds"
    for file in (video, image):
        name = str((file or {}).get("video_processor_type") or (file or {}).get("image_processor_type") or "")
        if name.startswith("Glm4"):
            sampling = "duration" if name.startswith("Glm46") else "seconds"
            break
    return SmartResizeProcessor.from_hf(
        image,
        video,
        patch_size=config.patch_size,
        temporal_patch_size=config.temporal_patch_size,
        merge_size=config.spatial_merge_size,
        min_pixels=112 * 112,
        max_pixels=28 * 28 * 15000,
        image_scope="clip",
        video_min_pixels=112 * 112,
        video_max_pixels=28 * 28 * 2 * 30000,
        video_scope="clip",
        sampling=sampling,
    )


def tiny() -> tuple[dict[str, Any], dict[str, Any]]:
    """Three layers of width 64, tokens of width 48, a table of 8 x 8."""
    vision = {
        "model_type": "glm4v",
        "depth": 3,
        "hidden_size": 64,
        "hidden_act": "silu",
        "intermediate_size": 112,
        "num_heads": 4,
        "in_channels": 3,
        "image_size": 112,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 48,
        "attention_bias": False,
        "rms_norm_eps": 1e-5,
    }
    config = {"architectures": ["Glm4vForConditionalGeneration"], "model_type": "glm4v", "vision_config": vision}
    preprocessor = {
        "size": {"shortest_edge": 12544, "longest_edge": 9633792},
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Glm4vImageProcessor",
    }
    return config, preprocessor


FAMILY = Family(
    name="glm4v",
    title="GLM-4.1V, GLM-4.5V, GLM-4.6V",
    model_types=("glm4v", "glm4v_moe", "glm46v"),
    modalities=("image", "video"),
    parse_config=Glm4vConfig.from_hf,
    build=Glm4vTower,
    layouts=layouts,
    processor=processor,
    tiny=tiny,
)
