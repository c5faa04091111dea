"""The vision classes of Transformers that have a tower of ours, one row each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from vitgraph.attention.base import VarlenAttention
from vitgraph.integrations.transformers.towers import InternVLFeatures, KimiFeatures, WithHidden
from vitgraph.models.contract import Tower
from vitgraph.models.registry import Family, get_family

MERGER = "merger"
DOWNSAMPLE = "merger.downsample"
THETA = 10000.0


@dataclass(frozen=True)
class NativeFamily:
    """How a vision class of Transformers maps onto a tower.

    Attributes:
        module: name of its package in `transformers.models`.
        name: of the class.
        family: registry name of the tower.
        call: how its arguments and outputs look: "grid" (patch rows and grids to tokens), "cells" (the same, a token
            still being its cell of patches) or "tiles" (pictures of one size to all their rows).
        hidden: submodule of our tower whose input, or output if that makes tokens, Transformers calls
            `last_hidden_state`; "" when the tower returns it itself.
        fixed: values of the module's config that the tower takes for granted.
        output: class of what forward returns.
        tower: a tower for this module alone, or None for the family's own.
    """

    module: str
    name: str
    family: str
    call: str = "grid"
    hidden: str = MERGER
    fixed: Mapping[str, Any] = field(default_factory=dict)
    output: str = "BaseModelOutputWithPooling"
    tower: Callable[[Any, VarlenAttention], Tower] | None = None

    def build(self, vision_config: Mapping[str, Any], attention: VarlenAttention) -> tuple[Tower, Family, Any]:
        """The tower on the current default device, its family and its parsed config."""
        family = get_family(self.family)
        # What lies outside the vision module does not matter here, but a family reads the whole model's config.
        whole = {"model_type": family.model_types[0], "text_config": {"hidden_size": 1}, "vision_config": vision_config}
        config = family.parse_config(whole)
        tower = (self.tower or family.build)(config, attention)
        if self.hidden == MERGER:
            width = tower.get_submodule("patch_embed.proj").out_features
            tower = WithHidden(tower, MERGER, output=False, rows="patch", width=width)  # type: ignore[arg-type]
        elif self.hidden == DOWNSAMPLE:
            tower = WithHidden(tower, DOWNSAMPLE, output=True, rows="token", width=tower.spec.width)
        return tower, family, config

    def differs(self, vision_config: Mapping[str, Any]) -> str:
        """The first setting of the config that the tower does not have; empty when there is none."""
        for name, value in self.fixed.items():
            if vision_config.get(name, value) != value:
                return f"{name}={vision_config[name]!r} in its config; the tower has {value!r}"
        rope = vision_config.get("rope_parameters") or {}
        if rope.get("rope_type", "axial") not in ("axial", "default"):
            return f"rope_type={rope['rope_type']!r} in its config; the tower has 'axial'"
        if self.family not in READS_THETA and rope.get("rope_theta", THETA) != THETA:
            return f"rope_theta={rope['rope_theta']!r} in its config; the tower has {THETA}"
        return ""


READS_THETA = ("glm4v", "glm_ocr")
TANH, SILU = {"hidden_act": "gelu_pytorch_tanh"}, {"hidden_act": "silu"}
GLM = {**SILU, "in_channels": 3}
DEEPSTACK = "BaseModelOutputWithDeepstackFeatures"

NATIVE = (
    NativeFamily("qwen3_vl", "Qwen3VLVisionModel", "qwen3_vl", fixed=TANH, output=DEEPSTACK),
    NativeFamily("qwen3_vl_moe", "Qwen3VLMoeVisionModel", "qwen3_vl", fixed=TANH, output=DEEPSTACK),
    NativeFamily("qwen2_vl", "Qwen2VisionTransformerPretrainedModel", "qwen2_vl", fixed={"hidden_act": "quick_gelu"}),
    NativeFamily("qwen2_5_vl", "Qwen2_5_VisionTransformerPretrainedModel", "qwen2_5_vl", fixed=SILU),
    NativeFamily("qwen2_5_omni", "Qwen2_5OmniVisionEncoder", "qwen2_5_vl", fixed=SILU),
    NativeFamily("qwen3_5", "Qwen3_5VisionModel", "qwen3_5", fixed=TANH),
    NativeFamily("qwen3_5_moe", "Qwen3_5MoeVisionModel", "qwen3_5", fixed=TANH),
    NativeFamily("qwen3_omni_moe", "Qwen3OmniMoeVisionEncoder", "qwen3_omni", fixed=TANH, output=DEEPSTACK),
    NativeFamily("glm4v", "Glm4vVisionModel", "glm4v", hidden=DOWNSAMPLE, fixed=GLM),
    NativeFamily("glm4v_moe", "Glm4vMoeVisionModel", "glm4v", hidden=DOWNSAMPLE, fixed=GLM),
    NativeFamily("glm_ocr", "GlmOcrVisionModel", "glm_ocr", hidden=DOWNSAMPLE, fixed=GLM),
    NativeFamily("kimi_k25", "Kimi_K25VisionModel", "kimi_k25", "cells", "", TANH, tower=KimiFeatures),
    NativeFamily(
        "internvl",
        "InternVLVisionModel",
        "internvl",
        "tiles",
        "",
        {"hidden_act": "gelu", "num_channels": 3},
        "InternVLVisionModelOutputWithPooling",
        InternVLFeatures,
    ),
)


def native_family(module: nn.Module) -> NativeFamily | None:
    """The row of this module's very class, or None. A subclass may compute something else, so it is no match."""
    cls = type(module)
    for row in NATIVE:
        if (cls.__module__, cls.__name__) == (f"transformers.models.{row.module}.modeling_{row.module}", row.name):
            return row
    return None


def native_names() -> str:
    """The classes, for messages."""
    return ", ".join(row.name for row in NATIVE)
