"""Tiny vision modules of Transformers with random weights, one row each: what the generic backend is held to."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

SMALL: Mapping[str, Any] = {
    **dict.fromkeys(("hidden_size", "embed_dim", "vision_output_dim", "output_dim", "fc_dim"), 32),
    **dict.fromkeys(("intermediate_size", "mlp_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "depth", "num_layers", "encoder_layers"), 3),
    **dict.fromkeys(("num_attention_heads", "num_heads", "num_key_value_heads", "attention_heads"), 2),
    "out_hidden_size": 24,
    "projection_dim": 16,
    "image_size": 56,
    "patch_size": 14,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "num_position_embeddings": 64,
}
"""Overrides of whatever whole numbers of these names a config has."""

GRIDS = ((1, 4, 8), (3, 8, 4), (1, 12, 4), (1, 4, 4), (2, 8, 8), (1, 8, 8))
IMAGES = ((1, 4, 8), (1, 12, 4), (1, 4, 4), (1, 8, 8))
PICTURES = 13


@dataclass(frozen=True)
class Case:
    """One vision module.

    Attributes:
        folder: of the model within `transformers.models`.
        name: of its class.
        settings: of its config, beside `SMALL`.
        row: trailing shape of its pixels; None for pictures of the config's size.
        batched: whether an axis of length one stands before the rows.
        grids: items of one call, for modules that take `grid_thw`; none for pictures.
        mask: trailing shape of the mask that callers give for whole pictures.
        limit: what it cannot do, for the documentation.
        reason: what the refusal says, for modules that cannot be captured.
        since: oldest Transformers whose module can be captured; "" where every supported one can.
    """

    folder: str
    name: str
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    row: tuple[int, ...] | None = None
    batched: bool = False
    grids: tuple[tuple[int, int, int], ...] = ()
    mask: tuple[int, ...] = ()
    limit: str = ""
    reason: str = ""
    since: str = ""

    def __str__(self) -> str:
        return f"{self.folder}-{self.name}"

    def build(self) -> nn.Module:
        """The module in evaluation mode, every parameter random.

        Raises:
            ImportError: the installed Transformers lacks it, or has one that cannot be captured yet.
        """
        if Version(transformers.__version__) < Version(self.since or "0"):
            raise ImportError(f"{self.name} can be captured since {self.since}")
        modeling = import_module(f"transformers.models.{self.folder}.modeling_{self.folder}")
        module_class = getattr(modeling, self.name, None)
        if module_class is None:
            raise ImportError(f"transformers has no {self.name}")
        module = module_class(small_config(module_class.config_class, self.settings)).eval()
        randomize(module)
        return module

    def arguments(self, module: nn.Module, seed: int = 0, pictures: int = PICTURES) -> dict[str, Any]:
        """Arguments of one call: mixed sizes, or several pictures."""
        generator = torch.Generator().manual_seed(seed)
        pixels = list(inspect.signature(type(module).forward).parameters)[1]
        if self.grids:
            grids = torch.tensor(self.grids)
            rows = torch.randn(int(grids.prod(1).sum()), *self.row, generator=generator)
            return {pixels: rows.unsqueeze(0) if self.batched else rows, "grid_thw": grids}
        shape = self.row or picture_shape(module.config)
        given = {pixels: torch.randn(pictures, *shape, generator=generator)}
        return {**given, "patch_attention_mask": torch.ones(pictures, *self.mask).bool()} if self.mask else given


def small_config(config_class: type, settings: Mapping[str, Any]) -> Any:
    """A config with the numbers of `SMALL`, then `settings`."""
    default = config_class()
    small = {key: value for key, value in SMALL.items() if isinstance(getattr(default, key, None), int)}
    return config_class(**{**small, **settings})


def randomize(module: nn.Module, scale: float = 0.1) -> None:
    """Random parameters: freshly made modules have zero biases and equal norms, which hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def picture_shape(config: Any) -> tuple[int, ...]:
    """Channels, height and width of a picture."""
    size = getattr(config, "image_size", 224)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return (getattr(config, "num_channels", None) or 3, height, width)


def tensors_of(output: Any) -> dict[str, Tensor]:
    """Every tensor of an output by its path."""
    if isinstance(output, Tensor):
        return {"": output}
    if output is None:
        return {}
    pairs = output.items() if isinstance(output, Mapping) else enumerate(output)
    return {f"{key}.{path}".rstrip("."): t for key, value in pairs for path, t in tensors_of(value).items()}


QWEN = (1176,)
RECENT = "5.23"
ADDS_FRAMES = Version(transformers.__version__) >= Version("5.24")
"""Whether Kimi's module adds frames where they belong; before, it stacked them, which takes clips of one length."""

GRID_CASES = (
    Case("cohere_compass", "CohereCompassVisionModel", row=QWEN, grids=GRIDS),
    Case("ernie4_5_vl_moe", "Ernie4_5_VLMoeVisionTransformerPretrainedModel", row=(588,), grids=GRIDS),
    Case("exaone4_5", "Exaone4_5_VisionModel", row=QWEN, grids=GRIDS),
    Case("glm5_next", "Glm5NextVisionModel", row=QWEN, grids=GRIDS),
    Case("glm_ocr", "GlmOcrVisionModel", row=QWEN, grids=GRIDS),
    Case(
        "kimi_k25", "Kimi_K25VisionModel", row=(3, 14, 14), grids=GRIDS if ADDS_FRAMES else IMAGES,
        limit="clips of several frames run its own forward before Transformers 5.24",
    ),
    Case("minimax_m3_vl", "MiniMaxM3VLVisionModel", row=QWEN, grids=GRIDS, since=RECENT),
    Case("muse_glimmer", "MuseGlimmerVisionModel", row=QWEN, grids=GRIDS),
    Case("muse_spark", "MuseSparkVisionModel", row=QWEN, grids=GRIDS),
    Case("paddleocr_vl", "PaddleOCRVisionModel", row=(3, 14, 14), batched=True, grids=GRIDS),
    Case("qwen2_5_omni", "Qwen2_5OmniVisionEncoder", row=QWEN, grids=GRIDS),
    Case("qwen2_5_vl", "Qwen2_5_VisionTransformerPretrainedModel", row=QWEN, grids=GRIDS),
    Case("qwen2_vl", "Qwen2VisionTransformerPretrainedModel", row=QWEN, grids=GRIDS),
    Case("qwen3_5", "Qwen3_5VisionModel", row=QWEN, grids=GRIDS),
    Case("qwen3_5_moe", "Qwen3_5MoeVisionModel", row=QWEN, grids=GRIDS),
    Case("qwen3_omni_moe", "Qwen3OmniMoeVisionEncoder", {"deepstack_visual_indexes": (0, 1)}, row=QWEN, grids=GRIDS),
    Case("qwen3_vl", "Qwen3VLVisionModel", {"deepstack_visual_indexes": (0, 1)}, row=QWEN, grids=GRIDS),
    Case("qwen3_vl_moe", "Qwen3VLMoeVisionModel", {"deepstack_visual_indexes": (0, 1)}, row=QWEN, grids=GRIDS),
    Case("qwen4_exp", "Qwen4ExpVisionModel", row=QWEN, grids=GRIDS),
)  # fmt: skip
"""Modules on packed patch rows."""

WHOLE = "pictures without padding: their masks are read back on every call"
LLAMA4 = {
    "pixel_shuffle_ratio": 0.5,
    "intermediate_size": 128,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
    "vision_output_dim": 32,
}
TILE_CASES = (
    Case("aimv2", "Aimv2VisionModel"),
    Case("altclip", "AltCLIPVisionModel"),
    Case("beit", "BeitModel"),
    Case("blip", "BlipVisionModel"),
    Case("blip_2", "Blip2VisionModel"),
    Case("chinese_clip", "ChineseCLIPVisionModel"),
    Case("clip", "CLIPVisionModel"),
    Case("clipseg", "CLIPSegVisionModel"),
    Case("deepseek_ocr2", "DeepseekOcr2SamVisionEncoder", since=RECENT),
    Case("deit", "DeiTModel"),
    Case("dinov2", "Dinov2Model"),
    Case("dinov2_with_registers", "Dinov2WithRegistersModel"),
    Case("dinov3_vit", "DINOv3ViTModel"),
    Case("dpt", "DPTModel"),
    Case("flava", "FlavaImageModel"),
    Case("git", "GitVisionModel"),
    Case("got_ocr2", "GotOcr2VisionEncoder", since=RECENT),
    Case("granite_docling", "GraniteDoclingVisionModel"),
    Case("groupvit", "GroupViTVisionModel"),
    Case("idefics2", "Idefics2VisionTransformer", mask=(4, 4), limit=WHOLE, since=RECENT),
    Case("idefics3", "Idefics3VisionTransformer", mask=(4, 4), limit=WHOLE, since=RECENT),
    Case("ijepa", "IJepaModel"),
    Case("instructblip", "InstructBlipVisionModel"),
    Case("instructblipvideo", "InstructBlipVideoVisionModel"),
    Case("internvl", "InternVLVisionModel", {"image_size": (56, 56), "patch_size": (14, 14)}),
    Case("janus", "JanusVisionModel"),
    Case("kosmos2", "Kosmos2VisionModel"),
    Case("llama4", "Llama4VisionModel", LLAMA4),
    Case("metaclip_2", "MetaClip2VisionModel"),
    Case("mlcd", "MLCDVisionModel"),
    Case("ovis2", "Ovis2VisionModel"),
    Case("owlv2", "Owlv2VisionModel"),
    Case("owlvit", "OwlViTVisionModel"),
    Case("phi4_multimodal", "Phi4MultimodalVisionModel", mask=(4, 4), limit=WHOLE, since=RECENT),
    Case("pixio", "PixioModel"),
    Case("qianfan_ocr", "QianfanOCRVisionModel", {"image_size": (56, 56), "patch_size": (14, 14)}),
    Case("radio", "RadioModel"),
    Case("sam", "SamVisionModel"),
    Case("sam3", "Sam3ViTModel"),
    Case("sam_hq", "SamHQVisionModel"),
    Case("sapiens2", "Sapiens2Model"),
    Case("siglip", "SiglipVisionModel"),
    Case("smolvlm", "SmolVLMVisionTransformer", mask=(4, 4), limit=WHOLE, since=RECENT),
    Case("timesformer", "TimesformerModel", {"num_frames": 4}, row=(4, 3, 56, 56)),
    Case("tipsv2", "Tipsv2VisionModel"),
    Case("unlimited_ocr", "UnlimitedOcrSamVisionEncoder"),
    Case("videomae", "VideoMAEModel", row=(16, 3, 56, 56)),
    Case("vit", "ViTModel"),
    Case("vit_msn", "ViTMSNModel"),
    Case("vivit", "VivitModel", {"num_frames": 4}, row=(4, 3, 56, 56)),
)
"""Modules on pictures, or clips, of one size."""

REFUSED_CASES = (
    Case("cosmos3_edge", "Cosmos3EdgeVisionModel", row=(588,), grids=IMAGES, reason="tolist"),
    Case("gemma4", "Gemma4VisionModel", reason="pixel_position_ids"),
    Case("glm4v", "Glm4vVisionModel", row=QWEN, grids=IMAGES, reason="reads the sizes of its items"),
    Case("glm_image", "GlmImageVisionModel", row=(588,), grids=IMAGES, reason="reads the sizes of its items"),
    Case("hunyuan_vl", "HunYuanVLVisionTransformer", reason="pooler_output"),
    Case("lfm3_vl", "Lfm3VlVisionModel", reason="tolist"),
    Case("minicpmv4_6", "MiniCPMV4_6VisionModel", reason="fails on an example"),
    Case("mllama", "MllamaVisionModel", reason="aspect_ratio_ids"),
    Case("pixtral", "PixtralVisionModel", reason="pictures first"),
    Case("siglip2", "Siglip2VisionModel", reason="spatial_shapes"),
    Case("step3p7", "Step3p7VisionModel", reason="copies a value from the host"),
    Case("video_llama_3", "VideoLlama3VisionModel", reason="merge_sizes"),
    Case("vit_mae", "ViTMAEModel", reason="ids_restore"),
)
"""Modules that no graph can hold as they are."""
