"""Slow references of InternVL, filled with a tower's weights. Kimi-K2.5's is in references_kimi_k25."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from references import without_prefix
from vitgraph.core import Grid
from vitgraph.models.contract import Tower
from vitgraph.models.registry import get_family


def tiles_of(rows: Tensor, side: int, patch: int) -> Tensor:
    """Patch rows in raster order -> tiles `[tiles, 3, side * patch, side * patch]`."""
    parts = rows.view(-1, side, side, 3, patch, patch)
    return parts.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, side * patch, side * patch)


class InternVLReference(nn.Module):
    """Transformers' InternVLVisionModel, its pixel shuffle and its projector, from weights in Transformers' layout."""

    def __init__(self, tower: Tower, hf_config: dict) -> None:
        from transformers.models.internvl.configuration_internvl import InternVLConfig, InternVLVisionConfig
        from transformers.models.internvl.modeling_internvl import (
            InternVLModel,
            InternVLMultiModalProjector,
            InternVLVisionModel,
        )

        super().__init__()
        vision = hf_config["vision_config"]
        shared = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "norm_type")
        names = {name: vision[name] for name in (*shared, "image_size", "patch_size", "hidden_act")}
        if "llm_config" in hf_config:
            names |= {"attention_bias": vision["qkv_bias"], "use_qk_norm": vision["qk_normalization"]}
        else:
            names |= {"attention_bias": vision["attention_bias"], "use_qk_norm": vision["use_qk_norm"]}
        config = InternVLVisionConfig(**names)
        config._attn_implementation = "sdpa"
        width = hf_config.get("llm_config", hf_config.get("text_config"))["hidden_size"]
        whole = InternVLConfig(vision_config=config, text_config={"model_type": "qwen2", "hidden_size": width})
        self.side, self.patch = config.image_size[0] // config.patch_size[0], config.patch_size[0]
        self.model = InternVLVisionModel(config).eval()
        self.projector = InternVLMultiModalProjector(whole).eval()
        self.shuffle = InternVLModel.pixel_shuffle
        state = get_family("internvl").layouts(tower.config)[1].export(dict(tower.named_parameters()))
        self.model.load_state_dict(without_prefix(state, "vision_tower."), strict=True)
        self.projector.load_state_dict(without_prefix(state, "multi_modal_projector."), strict=True)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
        x = self.model(tiles_of(pixel_values, self.side, self.patch)).last_hidden_state[:, 1:]
        x = self.shuffle(None, x.unflatten(1, (self.side, self.side)), scale_factor=0.5)
        return self.projector(x.flatten(1, 2)).flatten(0, 1)[None]


class OriginalInternVLReference:
    """The model that the original checkpoints describe, from weights in their layout. Not in Transformers.

    Args:
        state: tensors under the original keys.
        vision: the original `vision_config`.
    """

    def __init__(self, state: dict[str, Tensor], vision: dict) -> None:
        self.state, self.vision = state, vision

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor) -> Tensor:
        s, v = self.state, self.vision
        patch, side = v["patch_size"], v["image_size"] // v["patch_size"]
        tiles = tiles_of(pixel_values, side, patch)
        name = "vision_model.embeddings."
        x = F.conv2d(tiles, s[name + "patch_embedding.weight"], s[name + "patch_embedding.bias"], stride=patch)
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([s[name + "class_embedding"].expand(len(x), 1, -1), x], 1) + s[name + "position_embedding"]
        for layer in range(v["num_hidden_layers"]):
            at = f"vision_model.encoder.layers.{layer}."
            x = x + self.attend(self.norm(x, at + "norm1"), at + "attn.") * s[at + "ls1"]
            y = F.gelu(self.linear(self.norm(x, at + "norm2"), at + "mlp.fc1"))
            x = x + self.linear(y, at + "mlp.fc2") * s[at + "ls2"]
        cells = x[:, 1:].reshape(len(x), side // 2, 2, side // 2, 2, -1).permute(0, 1, 3, 2, 4, 5)
        x = cells.reshape(-1, 4 * x.shape[-1])
        x = F.layer_norm(x, x.shape[-1:], s["mlp1.0.weight"], s["mlp1.0.bias"])
        return self.linear(F.gelu(self.linear(x, "mlp1.1")), "mlp1.3")[None]

    def attend(self, x: Tensor, at: str) -> Tensor:
        heads = self.vision["num_attention_heads"]
        q, k, v = self.linear(x, at + "qkv").chunk(3, -1)
        if self.vision["qk_normalization"]:
            q, k = self.rms_norm(q, at + "q_norm"), self.rms_norm(k, at + "k_norm")
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        weights = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)
        return self.linear((weights @ v).transpose(1, 2).flatten(2), at + "proj")

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.state[name + ".weight"], self.state.get(name + ".bias"))

    def norm(self, x: Tensor, name: str) -> Tensor:
        if self.vision["norm_type"] == "rms_norm":
            return self.rms_norm(x, name)
        return F.layer_norm(x, x.shape[-1:], self.state[name + ".weight"], self.state[name + ".bias"], 1e-6)

    def rms_norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.state[name + ".weight"], 1e-6)


REFERENCES = {"internvl": InternVLReference}
