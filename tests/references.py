"""Slow references from Transformers, filled with a tower's weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitgraph.core import Grid
from vitgraph.models.contract import Tower
from vitgraph.models.registry import get_family


def exported(tower: Tower) -> dict[str, Tensor]:
    """The tower's parameters under the keys of its published layout."""
    layout = get_family(tower.spec.family).layouts(tower.config)[0]
    return layout.export(dict(tower.named_parameters()))


def without_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


class Qwen3VLReference(nn.Module):
    """Transformers' Qwen3VLVisionModel: tokens first, then the deepstack maps."""

    def __init__(self, tower: Tower, hf_config: dict) -> None:
        from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
        from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

        super().__init__()
        vision = {k: v for k, v in hf_config["vision_config"].items() if k != "model_type"}
        config = Qwen3VLVisionConfig(**vision)
        config._attn_implementation = "sdpa"
        self.model = Qwen3VLVisionModel(config).eval()
        self.model.load_state_dict(without_prefix(exported(tower), "model.visual."))

    @torch.no_grad()
    def forward(self, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
        out = self.model(pixel_values, grid_thw=torch.tensor(grids))
        return torch.stack([out.pooler_output, *out.deepstack_features])


class KimiVLReference(nn.Module):
    """Transformers' Kimi-K2.5 tower at t = 1, with Kimi-VL's projector; weights renamed and unfused."""

    def __init__(self, tower: Tower, hf_config: dict) -> None:
        from transformers.models.kimi_k25.configuration_kimi_k25 import Kimi_K25VisionConfig
        from transformers.models.kimi_k25.modeling_kimi_k25 import Kimi_K25VisionModel

        super().__init__()
        vision = hf_config["vision_config"]
        self.config = Kimi_K25VisionConfig(
            patch_size=vision["patch_size"],
            pos_emb_height=vision["init_pos_emb_height"],
            pos_emb_width=vision["init_pos_emb_width"],
            num_attention_heads=vision["num_attention_heads"],
            num_hidden_layers=vision["num_hidden_layers"],
            hidden_size=vision["hidden_size"],
            intermediate_size=vision["intermediate_size"],
            merge_kernel_size=vision["merge_kernel_size"],
        )
        self.config._attn_implementation = "sdpa"
        self.model = Kimi_K25VisionModel(self.config).eval()
        state = exported(tower)
        self.model.load_state_dict(self._native(without_prefix(state, "vision_tower.")), strict=True)
        self.projector = without_prefix(state, "multi_modal_projector.")

    def _native(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        heads = self.config.num_attention_heads
        renamed: dict[str, Tensor] = {}
        for key, value in state.items():
            key = key.replace("encoder.blocks.", "layers.").replace("encoder.final", "final")
            key = key.replace("patch_embed.pos_emb.weight", "patch_embed.pos_emb.position_embeddings")
            key = key.replace(".norm1.", ".norm2.").replace(".norm0.", ".norm1.").replace(".wo.", ".attn.proj.")
            key = key.replace(".mlp.fc1.", ".mlp.fc2.").replace(".mlp.fc0.", ".mlp.fc1.")
            if ".wqkv." not in key:
                renamed[key] = value
                continue
            for name, part in zip("qkv", value.chunk(3), strict=True):
                # Published weights pair (2i, 2i+1); the native class pairs (i, i + Dh/2).
                if name != "v":
                    split = part.unflatten(0, (heads, -1, 2))
                    part = torch.cat([split[:, :, 0], split[:, :, 1]], dim=1).flatten(0, 1)
                renamed[key.replace("wqkv", f"attn.{name}_proj")] = part
        return renamed

    @torch.no_grad()
    def forward(self, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
        side = self.config.patch_size
        rows = pixel_values.view(-1, 3, side, side)
        x = self.model(rows, grid_thw=torch.tensor(grids)).pooler_output
        p = self.projector
        x = nn.functional.layer_norm(x, x.shape[-1:], p["pre_norm.weight"], p["pre_norm.bias"], 1e-5).flatten(1)
        x = nn.functional.gelu(nn.functional.linear(x, p["linear_1.weight"], p["linear_1.bias"]))
        return nn.functional.linear(x, p["linear_2.weight"], p["linear_2.bias"])[None]


REFERENCES = {"qwen3_vl": Qwen3VLReference, "kimi_vl": KimiVLReference}
