"""Slow references of the GLM families from Transformers, filled with a tower's weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from references import exported, without_prefix
from vitgraph.core import Grid
from vitgraph.models.contract import Tower


class GlmReference(nn.Module):
    """A vision model of Transformers; subclasses name its classes."""

    def __init__(self, tower: Tower, hf_config: dict) -> None:
        super().__init__()
        kind, make_config = self.classes()
        config = make_config(**{k: v for k, v in hf_config["vision_config"].items() if k != "model_type"})
        config._attn_implementation = "sdpa"
        self.model = kind(config).eval()
        self.model.load_state_dict(without_prefix(exported(tower), "model.visual."))

    def classes(self) -> tuple[Any, Any]:
        """The model's class and its config's."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
        return self.model(pixel_values, grid_thw=torch.tensor(grids)).pooler_output[None]


class Glm4vReference(GlmReference):
    """The tower looks sizes up per segment but has one per item, so it fails on grids of more than one temporal patch.

    A clip goes in as t grids of one temporal patch, as the model around it does it.
    """

    def classes(self) -> tuple[Any, Any]:
        from transformers.models.glm4v.configuration_glm4v import Glm4vVisionConfig
        from transformers.models.glm4v.modeling_glm4v import Glm4vVisionModel

        return Glm4vVisionModel, Glm4vVisionConfig

    def forward(self, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
        return super().forward(pixel_values, [Grid(1, h, w) for t, h, w in grids for _ in range(t)])


class Glm4vMoeReference(Glm4vReference):
    def classes(self) -> tuple[Any, Any]:
        from transformers.models.glm4v_moe.configuration_glm4v_moe import Glm4vMoeVisionConfig
        from transformers.models.glm4v_moe.modeling_glm4v_moe import Glm4vMoeVisionModel

        return Glm4vMoeVisionModel, Glm4vMoeVisionConfig


class GlmOcrReference(GlmReference):
    """Without a table the tower takes clips as they are."""

    def classes(self) -> tuple[Any, Any]:
        from transformers.models.glm_ocr.configuration_glm_ocr import GlmOcrVisionConfig
        from transformers.models.glm_ocr.modeling_glm_ocr import GlmOcrVisionModel

        return GlmOcrVisionModel, GlmOcrVisionConfig


REFERENCES = {"glm4v": Glm4vReference, "glm_ocr": GlmOcrReference}
