"""Slow reference of Kimi-K2.5 from Transformers, filled with a tower's weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from references import without_prefix
from vitgraph.core import Grid
from vitgraph.models.contract import Tower
from vitgraph.models.registry import get_family


class KimiK25Reference(nn.Module):
    """Transformers' Kimi_K25VisionModel and its projector, one item per call.

    Its gather for the temporal mean cannot stack clips of different length, so a batch of them has no answer.
    Its rotary half-split needs q and k as Transformers stores them: weights come from the native layout, and
    another test holds the published layout to it.
    """

    def __init__(self, tower: Tower, hf_config: dict) -> None:
        from transformers.models.kimi_k25 import modeling_kimi_k25 as native
        from transformers.models.kimi_k25.configuration_kimi_k25 import Kimi_K25Config

        super().__init__()
        vision = hf_config["vision_config"]
        config = Kimi_K25Config(
            text_config={"model_type": "deepseek_v3", "hidden_size": hf_config["text_config"]["hidden_size"]},
            vision_config={
                "patch_size": vision["patch_size"],
                "pos_emb_height": vision["init_pos_emb_height"],
                "pos_emb_width": vision["init_pos_emb_width"],
                "pos_emb_time": vision["init_pos_emb_time"],
                "num_attention_heads": vision["vt_num_attention_heads"],
                "num_hidden_layers": vision["vt_num_hidden_layers"],
                "hidden_size": vision["vt_hidden_size"],
                "intermediate_size": vision["vt_intermediate_size"],
                "merge_kernel_size": vision["merge_kernel_size"],
            },
            projection_hidden_size=vision["mm_hidden_size"],
        )
        config.vision_config._attn_implementation = "sdpa"
        self.patch_size = vision["patch_size"]
        self.model = native.Kimi_K25VisionModel(config.vision_config).eval()
        self.projector = native.Kimi_K25MultimodalProjection(config).eval()
        layout = get_family("kimi_k25").layouts(tower.config)[1]
        state = layout.export(dict(tower.named_parameters()))
        self.model.load_state_dict(without_prefix(state, "model.vision_tower."), strict=True)
        self.projector.load_state_dict(without_prefix(state, "model.mm_projector."), strict=True)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
        rows = pixel_values.view(-1, 3, self.patch_size, self.patch_size)
        parts = rows.split([grid.patches for grid in grids])
        tokens = [self._one(part, grid) for part, grid in zip(parts, grids, strict=True)]
        return torch.cat(tokens)[None]

    def _one(self, rows: Tensor, grid: Grid) -> Tensor:
        pooled = self.model(rows, grid_thw=torch.tensor([grid])).pooler_output
        return self.projector(pooled).squeeze(1)


REFERENCES = {"kimi_k25": KimiK25Reference}
