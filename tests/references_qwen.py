"""Slow references of the Qwen families from Transformers, filled with a tower's weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from references import without_prefix
from vitgraph.core import Grid
from vitgraph.models.contract import Tower
from vitgraph.models.registry import get_family


class QwenReference(nn.Module):
    """A vision model of Transformers: tokens first, then the deepstack maps where it has any.

    Subclasses name its classes, and the index and prefix of the layout whose keys it has.
    """

    layout = 0
    prefix = "visual."

    def __init__(self, tower: Tower, hf_config: dict) -> None:
        super().__init__()
        kind, make_config = self.classes()
        vision = hf_config.get("thinker_config", hf_config)["vision_config"]
        config = make_config(**{k: v for k, v in vision.items() if k != "model_type"})
        config._attn_implementation = "sdpa"
        self.model = kind(config).eval()
        layout = get_family(tower.spec.family).layouts(tower.config)[self.layout]
        self.model.load_state_dict(without_prefix(layout.export(dict(tower.named_parameters())), self.prefix))

    def classes(self) -> tuple[Any, Any]:
        """The model's class and its config's."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
        out = self.model(pixel_values, grid_thw=torch.tensor(grids))
        return torch.stack([out.pooler_output, *getattr(out, "deepstack_features", ())])


class Qwen2VLReference(QwenReference):
    def classes(self) -> tuple[Any, Any]:
        from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
        from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

        return Qwen2VisionTransformerPretrainedModel, Qwen2VLVisionConfig


class Qwen25VLReference(QwenReference):
    def classes(self) -> tuple[Any, Any]:
        from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

        return Qwen2_5_VisionTransformerPretrainedModel, Qwen2_5_VLVisionConfig


class Qwen25OmniReference(QwenReference):
    layout = 2
    prefix = "thinker.visual."

    def classes(self) -> tuple[Any, Any]:
        from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniVisionEncoderConfig
        from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniVisionEncoder

        return Qwen2_5OmniVisionEncoder, Qwen2_5OmniVisionEncoderConfig


class Qwen35Reference(QwenReference):
    prefix = "model.visual."

    def classes(self) -> tuple[Any, Any]:
        from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5VisionConfig
        from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5VisionModel

        return Qwen3_5VisionModel, Qwen3_5VisionConfig


class Qwen3OmniReference(QwenReference):
    prefix = "thinker.visual."

    def classes(self) -> tuple[Any, Any]:
        from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeVisionEncoderConfig
        from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeVisionEncoder

        return Qwen3OmniMoeVisionEncoder, Qwen3OmniMoeVisionEncoderConfig


REFERENCES = {
    "qwen2_vl": Qwen2VLReference,
    "qwen2_5_vl": Qwen25VLReference,
    "qwen3_5": Qwen35Reference,
    "qwen3_omni": Qwen3OmniReference,
}
