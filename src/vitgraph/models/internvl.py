"""InternVL2, 2.5, 3 and 3.5: InternViT-300M and InternViT-6B on tiles of one size, and the projector.

An item is a stack of independent tiles: the parts of an image and its thumbnail, or the frames of a clip. Every tile
gets a class row and learned positions, and attends within itself; the class row is dropped and each 2 x 2 patches
become one token. Reference: transformers `InternVLVisionModel` and `InternVLMultiModalProjector`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitgraph.attention.base import VarlenAttention
from vitgraph.core import Counts, Grid
from vitgraph.errors import ConfigError, PatchError
from vitgraph.layers.block import Attention, Block
from vitgraph.layers.mlp import Mlp
from vitgraph.layers.norm import RMSNorm
from vitgraph.layers.patch_embed import PatchEmbed
from vitgraph.models.contract import BufferSpec, SegmentSpec, Tower, TowerBuffers, TowerSpec
from vitgraph.models.layout import Flatten, Fuse, Layout, Rule
from vitgraph.models.registry import Family, Json
from vitgraph.preprocess.processor import Processor
from vitgraph.preprocess.tiles import TileProcessor

CHANNELS = 3
NORMS: Mapping[str, Callable[..., nn.Module]] = {"layer_norm": nn.LayerNorm, "rms_norm": RMSNorm}
ONLY = {
    "pad2square": False,
    "flash_mode": False,
    "select_layer": -1,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
    "hidden_act": "gelu",
    "use_mean_pooling": True,
    "use_absolute_position_embeddings": True,
}
"""Settings that have one value in every published checkpoint, and no other meaning here."""
TRANSFORMERS_DEFAULTS = {
    "num_hidden_layers": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "attention_bias": False,
    "use_qk_norm": False,
    "norm_type": "layer_norm",
    "image_size": 448,
    "patch_size": 14,
}
"""What Transformers' files leave out when it is the value of the class."""


@dataclass(frozen=True)
class InternVLConfig:
    """Numbers of the tower; `text_width` is the output's.

    The last five are the original config's rules for cutting images; Transformers' files have them in
    preprocessor_config.json.
    """

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    text_width: int
    qkv_bias: bool
    qk_norm: bool
    norm_type: str
    layer_norm_eps: float = 1e-6
    image_size: int = 448
    patch_size: int = 14
    merge: int = 2
    original: bool = False
    dynamic_image_size: bool = True
    min_dynamic_patch: int = 1
    max_dynamic_patch: int = 12
    use_thumbnail: bool = True

    @classmethod
    def from_hf(cls, config: Json) -> InternVLConfig:
        """From a config.json, the original one or that of Transformers.

        Raises:
            ConfigError: a setting that no published checkpoint has.
        """
        original = "llm_config" in config
        vision = config["vision_config"] if original else {**TRANSFORMERS_DEFAULTS, **config["vision_config"]}
        qkv_bias, qk_norm = ("qkv_bias", "qk_normalization") if original else ("attention_bias", "use_qk_norm")
        tiling = ("dynamic_image_size", "min_dynamic_patch", "max_dynamic_patch", "use_thumbnail")
        parsed = cls(
            num_hidden_layers=vision["num_hidden_layers"],
            hidden_size=vision["hidden_size"],
            intermediate_size=vision["intermediate_size"],
            num_attention_heads=vision["num_attention_heads"],
            text_width=config["llm_config" if original else "text_config"]["hidden_size"],
            qkv_bias=vision[qkv_bias],
            qk_norm=vision[qk_norm],
            norm_type=vision["norm_type"],
            layer_norm_eps=vision.get("layer_norm_eps", 1e-6),
            image_size=_one_side(vision, "image_size"),
            patch_size=_one_side(vision, "patch_size"),
            merge=round(1 / config.get("downsample_ratio", 0.5)),
            original=original,
            **{name: config[name] for name in tiling if config.get(name) is not None},
        )
        _check(parsed, {**config, **vision})
        return parsed

    @property
    def side(self) -> int:
        """Patches on a side of a tile."""
        return self.image_size // self.patch_size


def _one_side(vision: Json, name: str) -> int:
    """A size that may be given as a number or as two equal ones."""
    sides = {vision[name]} if isinstance(vision[name], int) else set(vision[name])
    if len(sides) != 1:
        raise ConfigError(f"{name} is {vision[name]!r} in config.json; expected a square.")
    return sides.pop()


def _check(parsed: InternVLConfig, config: Json) -> None:
    allowed = {
        "force_image_size": (None, parsed.image_size),
        "norm_type": tuple(NORMS),
        **{name: (None, value) for name, value in ONLY.items()},
        # The original class reads a missing value as "v1", whose token grid is transposed.
        "ps_version": ("v2",) if parsed.original else (None, "v2"),
    }
    for name, values in allowed.items():
        if config.get(name) not in values:
            raise ConfigError(f"{name}={config.get(name)!r} in config.json is not supported; expected {values[-1]!r}.")
    block = parsed.patch_size * parsed.merge
    if parsed.image_size % block:
        raise ConfigError(f"image_size={parsed.image_size} in config.json is no multiple of {block} pixels.")


@dataclass(frozen=True)
class TileSpec(TowerSpec):
    """A tower of fixed tiles: t of them in a grid, each `side` x `side` patches and one class row.

    Attributes:
        side: patches on a side of a tile.
    """

    side: int = 32

    def counts(self, grid: Grid) -> Counts:
        rows = grid.t * (self.side**2 + 1)
        return {"patch": grid.patches, "token": grid.t * self.unit, "item": 1, "segment": grid.t, "row": rows}

    def capacity(self, tokens: int, max_items: int, max_frames: int) -> Counts:
        """A budget is a number of tiles: any items that fit have no more segments than that."""
        tiles = tokens // self.unit
        return {**self.counts(Grid(tiles, self.side, self.side)), "item": min(max_items, tiles)}

    def check_grid(self, grid: Grid) -> None:
        t, h, w = grid
        if t < 1 or (h, w) != (self.side, self.side):
            raise PatchError(
                f"grid {t}x{h}x{w} does not fit {self.family}: expected tiles x {self.side} x {self.side}, patches of "
                "whole tiles one after another, as the model's own processor cuts them."
            )


class InternVLTower(Tower):
    """Patch embedding, class row and positions, blocks and the projector `mlp1`."""

    spec: TileSpec

    def __init__(self, config: InternVLConfig, attention: VarlenAttention) -> None:
        super().__init__()
        dim, patches, merged = config.hidden_size, config.side**2, config.hidden_size * config.merge**2
        self.config = config
        self.spec = TileSpec(
            family="internvl",
            modalities=("image", "video"),
            patch_width=CHANNELS * config.patch_size**2,
            merge=config.merge,
            temporal_patch=1,
            width=config.text_width,
            splits_by_frame=True,
            unit=patches // config.merge**2,
            side=config.side,
            buffers=(BufferSpec("cu_seqlens", "int32", "segment", pad="repeat_last", offset="row", lead=1),),
            segments=(SegmentSpec(max_length=patches + 1),),
        )
        self.patch_embed = PatchEmbed(self.spec.patch_width, dim)
        self.cls_token = nn.Parameter(torch.empty(1, dim))
        self.pos_emb = nn.Embedding(patches + 1, dim)
        norm = partial(NORMS[config.norm_type], eps=config.layer_norm_eps)
        qk_norm = partial(RMSNorm, eps=config.layer_norm_eps) if config.qk_norm else None
        attend = partial(Attention, dim, config.num_attention_heads, attention, config.qkv_bias)
        self.blocks = nn.ModuleList(
            Block(
                partial(norm, dim),
                attend(qk_norm=qk_norm, norm_per_head=False),
                Mlp(dim, config.intermediate_size, "gelu"),
                layer_scale=dim,
            )
            for _ in range(config.num_hidden_layers)
        )
        width = config.text_width
        self.mlp1 = nn.Sequential(nn.LayerNorm(merged), nn.Linear(merged, width), nn.GELU(), nn.Linear(width, width))

    def metadata(self, grid: Grid) -> dict[str, np.ndarray]:
        return {"cu_seqlens": np.arange(1, grid.t + 1, dtype=np.int32) * np.int32(self.spec.side**2 + 1)}

    def forward(self, buffers: TowerBuffers) -> Tensor:
        segments = buffers.segments["cu_seqlens"]
        tiles = self.patch_embed(buffers.pixel_values).unflatten(0, (-1, self.spec.side**2))
        tiles = torch.cat([self.cls_token.expand(len(tiles), 1, -1), tiles], dim=1)
        x = (tiles + self.pos_emb.weight).flatten(0, 1)
        for block in self.blocks:
            x = block(x, None, segments)
        x = x.unflatten(0, (-1, self.spec.side**2 + 1))[:, 1:]
        return self.mlp1(self.merge_cells(x)).unsqueeze(0)

    def merge_cells(self, x: Tensor) -> Tensor:
        """Patches of tiles `[tiles, side * side, D]` -> their cells, rows before columns: `[M, merge * merge * D]`."""
        m, cells = self.spec.merge, self.spec.side // self.spec.merge
        return x.unflatten(1, (cells, m, cells, m)).transpose(2, 3).flatten(3, 5).flatten(0, 2)

    def compile_regions(self) -> Iterable[nn.Module]:
        return self.blocks


def layouts(config: InternVLConfig) -> tuple[Layout, ...]:
    """The original layout, and that of Transformers, without and with the outer `model.` level."""
    original, own = _original_layout(config), [_transformers_layout(prefix, config) for prefix in ("", "model.")]
    return (original, *own)


def _embedding_rules(config: InternVLConfig, kernel: str, cls_token: str, positions: str) -> tuple[Rule, ...]:
    dim, patch = config.hidden_size, config.patch_size
    return (
        Rule(r"patch_embed\.proj\.weight", (kernel + ".weight",), Flatten((dim, CHANNELS, patch, patch))),
        Rule(r"patch_embed\.proj\.bias", (kernel + ".bias",)),
        Rule(r"cls_token", (cls_token,), Flatten((1, 1, dim), keep_last=True)),
        Rule(r"pos_emb\.weight", (positions,), Flatten((1, config.side**2 + 1, dim), keep_last=True)),
    )


def _original_layout(config: InternVLConfig) -> Layout:
    embeddings, layers = "vision_model.embeddings.", "vision_model.encoder.layers."
    names = (embeddings + name for name in ("patch_embedding", "class_embedding", "position_embedding"))
    return Layout(
        name="vision_model.* + mlp1.*",
        # The last three are the token compression of the Flash models, which this tower lacks: refused, not ignored.
        prefixes=("vision_model.", "mlp1.", "mlp2.", "gating.", "pooling_before_gating."),
        rules=(
            *_embedding_rules(config, *names),
            Rule(r"blocks\.(\d+)\.scale(\d)", (layers + r"\1.ls\2",)),
            Rule(r"blocks\.(.*)", (layers + r"\1",)),
            Rule(r"(mlp1\..*)", (r"\1",)),
        ),
    )


def _transformers_layout(prefix: str, config: InternVLConfig) -> Layout:
    dim = config.hidden_size
    tower, projector = prefix + "vision_tower.", prefix + "multi_modal_projector."
    names = ("patch_embeddings.projection", "cls_token", "position_embeddings")
    block = tower + r"encoder.layer.\1."
    qkv = tuple(rf"{block}attention.{name}_proj.\2" for name in "qkv")
    return Layout(
        name=f"{tower}* + {projector}*",
        prefixes=(tower, projector),
        rules=(
            *_embedding_rules(config, *(f"{tower}embeddings.{name}" for name in names)),
            Rule(r"blocks\.(\d+)\.attn\.qkv\.(.*)", qkv, Fuse((dim, dim, dim))),
            Rule(r"blocks\.(\d+)\.attn\.proj\.(.*)", (block + r"attention.projection_layer.\2",)),
            Rule(r"blocks\.(\d+)\.attn\.(.*)", (block + r"attention.\2",)),
            Rule(r"blocks\.(\d+)\.norm1\.(.*)", (block + r"layernorm_before.\2",)),
            Rule(r"blocks\.(\d+)\.norm2\.(.*)", (block + r"layernorm_after.\2",)),
            Rule(r"blocks\.(\d+)\.scale(\d)", (block + r"lambda_\2",)),
            Rule(r"blocks\.(\d+)\.(mlp\..*)", (block + r"\2",)),
            Rule(r"mlp1\.0\.(.*)", (projector + r"layer_norm.\1",)),
            Rule(r"mlp1\.1\.(.*)", (projector + r"linear_1.\1",)),
            Rule(r"mlp1\.3\.(.*)", (projector + r"linear_2.\1",)),
        ),
        unused=(re.escape(tower) + r"embeddings\.mask_token",),
    )


def processor(config: InternVLConfig, image: Json | None, video: Json | None) -> Processor:
    """The reference processor's tiles; the original config brings its own rules and arithmetic."""
    shape = {"image_size": config.image_size, "patch_size": config.patch_size, "merge_size": config.merge}
    if not config.original:
        return TileProcessor.from_hf(image, video, **shape)
    return TileProcessor.from_hf(
        image,
        video,
        **shape,
        min_tiles=config.min_dynamic_patch if config.dynamic_image_size else 1,
        max_tiles=config.max_dynamic_patch if config.dynamic_image_size else 1,
        thumbnail=config.use_thumbnail,
        arithmetic="divided",
    )


def tiny() -> tuple[dict[str, Any], dict[str, Any]]:
    """Three layers of width 64 on tiles of 56 pixels, 4 tokens each; the 300M tower's structure."""
    vision = {
        "architectures": ["InternVisionModel"],
        "hidden_act": "gelu",
        "hidden_size": 64,
        "image_size": 56,
        "intermediate_size": 112,
        "layer_norm_eps": 1e-06,
        "model_type": "intern_vit_6b",
        "norm_type": "layer_norm",
        "num_attention_heads": 4,
        "num_channels": 3,
        "num_hidden_layers": 3,
        "patch_size": 14,
        "qk_normalization": False,
        "qkv_bias": True,
    }
    config = {
        "architectures": ["InternVLChatModel"],
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 56,
        "llm_config": {"hidden_size": 48},
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "model_type": "internvl_chat",
        "ps_version": "v2",
        "select_layer": -1,
        "use_thumbnail": True,
        "vision_config": vision,
    }
    preprocessor = {
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
        "size": 56,
    }
    return config, preprocessor


FAMILY = Family(
    name="internvl",
    title="InternVL2, InternVL2.5, InternVL3, InternVL3.5",
    model_types=("internvl_chat", "internvl"),
    modalities=("image", "video"),
    parse_config=InternVLConfig.from_hf,
    build=InternVLTower,
    layouts=layouts,
    processor=processor,
    tiny=tiny,
)
