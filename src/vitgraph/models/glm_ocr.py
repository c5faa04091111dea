"""GLM-OCR: the tower of GLM-4V at another size, without a position table.

Queries and keys are RMS-normalised per head before the rotary positions, and the linears of the blocks have biases.
Reference: transformers `GlmOcrVisionModel`.
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
from vitgraph.layers.mlp import GatedMlp
from vitgraph.layers.norm import RMSNorm
from vitgraph.layers.order import frame_coordinates, repeat_frames, segment_ends
from vitgraph.layers.patch_embed import PatchEmbed
from vitgraph.layers.rotary import axial_angles, axis_frequencies
from vitgraph.models import glm4v
from vitgraph.models.contract import BufferSpec, Tower, TowerBuffers, TowerSpec, cu_seqlens_buffer
from vitgraph.models.glm4v import ConvMerger, Glm4vConfig
from vitgraph.models.registry import Family


@dataclass(frozen=True)
class GlmOcrConfig(Glm4vConfig):
    """GLM-4V's numbers, two of which mean something else here.

    `intermediate_size` is the width of the blocks' MLP. `attention_bias` is of all linears of a block.
    """

    attention_bias: bool = True

    @property
    def merger_hidden_size(self) -> int:
        """Width of the merger's MLP, which config.json does not name."""
        return self.out_hidden_size * self.in_channels


class GlmOcrTower(Tower):
    """Patch embedding, blocks, final norm, downsampling convolution and merger."""

    frequencies: Tensor

    def __init__(self, config: GlmOcrConfig, attention: VarlenAttention) -> None:
        super().__init__()
        dim, heads, merge = config.hidden_size, config.num_heads, config.spatial_merge_size
        self.config = config
        self.spec = TowerSpec(
            family="glm_ocr",
            modalities=("image", "video"),
            patch_width=int(np.prod(config.kernel)),
            merge=merge,
            temporal_patch=config.temporal_patch_size,
            width=config.out_hidden_size,
            splits_by_frame=True,
            buffers=(BufferSpec("position_ids", "int32", "patch", (2,)), cu_seqlens_buffer()),
        )
        bias, eps = config.attention_bias, config.rms_norm_eps
        self.patch_embed = PatchEmbed(self.spec.patch_width, dim)
        self.blocks = nn.ModuleList(
            Block(
                partial(RMSNorm, dim, eps),
                Attention(dim, heads, attention, qkv_bias=bias, proj_bias=bias, qk_norm=partial(RMSNorm, eps=eps)),
                GatedMlp(dim, config.intermediate_size, bias=bias),
            )
            for _ in range(config.depth)
        )
        self.merger = ConvMerger(dim, merge, config.out_hidden_size, config.merger_hidden_size, eps)
        self.register_buffer("frequencies", axis_frequencies(dim // heads, config.rope_theta), persistent=False)

    def metadata(self, grid: Grid) -> dict[str, np.ndarray]:
        positions = frame_coordinates(grid.h, grid.w, self.spec.merge).astype(np.int32)
        return {"position_ids": repeat_frames(positions, grid), "cu_seqlens": segment_ends(grid)}

    def forward(self, buffers: TowerBuffers) -> Tensor:
        x = self.patch_embed(buffers.pixel_values)
        angles = axial_angles(buffers.metadata["position_ids"], self.frequencies)
        rotary = angles.cos(), angles.sin()
        for block in self.blocks:
            x = block(x, rotary, buffers.segments["cu_seqlens"])
        return self.merger(x).unsqueeze(0)

    def compile_regions(self) -> Iterable[nn.Module]:
        return self.blocks


def tiny() -> tuple[dict[str, Any], dict[str, Any]]:
    """GLM-4V's tiny model, with biases."""
    config, preprocessor = glm4v.tiny()
    vision = {**config["vision_config"], "model_type": "glm_ocr_vision", "attention_bias": True}
    kind = {"architectures": ["GlmOcrForConditionalGeneration"], "model_type": "glm_ocr"}
    return {**kind, "vision_config": vision}, {**preprocessor, "image_processor_type": "Glm46VImageProcessor"}


FAMILY = Family(
    name="glm_ocr",
    title="GLM-OCR",
    model_types=("glm_ocr",),
    modalities=("image", "video"),
    parse_config=GlmOcrConfig.from_hf,
    build=GlmOcrTower,
    layouts=glm4v.layouts,
    processor=glm4v.processor,
    tiny=tiny,
)
