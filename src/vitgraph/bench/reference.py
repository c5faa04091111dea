"""Transformers' own vision model with a tower's weights: the peer that a benchmark compares with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from vitgraph.core import Grid
from vitgraph.errors import ConfigError, MissingExtraError
from vitgraph.models.contract import Tower
from vitgraph.models.registry import get_family


def reference_model(tower: Tower) -> nn.Module:
    """Transformers' vision model with the tower's sizes, weights, device and dtype; attention is SDPA.

    Raises:
        ConfigError: for a family that has no builder here.
        MissingExtraError: when Transformers is not installed.
    """
    family = tower.spec.family
    if family not in _BUILDERS:
        raise ConfigError(f"no Transformers reference for family {family!r}; there is one for: {', '.join(_BUILDERS)}.")
    parameter = next(tower.parameters())
    with torch.device("cpu"):
        model = _BUILDERS[family](tower)
    model.load_state_dict(checkpoint_state(tower))
    return model.to(device=parameter.device, dtype=parameter.dtype).eval()


def checkpoint_state(tower: Tower) -> dict[str, Tensor]:
    """The tower's weights under the checkpoint's names and shapes, without the layout's prefix."""
    layout = get_family(tower.spec.family).layouts(tower.config)[0]
    (prefix,) = layout.prefixes
    return {key.removeprefix(prefix): value for key, value in layout.export(dict(tower.named_parameters())).items()}


@torch.inference_mode()
def reference_forward(model: nn.Module, pixel_values: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
    """All items in one call of the reference.

    Args:
        model: from `reference_model`.
        pixel_values: `[P, patch_width]`, cast to the model's device and dtype.
        grids: one per item.

    Returns:
        Per item `[levels, M, C]`: tokens, then the deepstack maps.
    """
    parameter = next(model.parameters())
    output = model(
        pixel_values.to(device=parameter.device, dtype=parameter.dtype),
        grid_thw=torch.tensor(grids, device=parameter.device),
    )
    levels = torch.stack([output.pooler_output, *(getattr(output, "deepstack_features", None) or [])])
    config: Any = model.config
    merge = config.spatial_merge_size
    return list(levels.split([grid.patches // merge**2 for grid in grids], dim=1))


def _qwen3_vl(tower: Tower) -> nn.Module:
    try:
        from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
        from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel
    except ImportError:
        raise MissingExtraError("transformers", "transformers", "--against transformers") from None
    sizes: Any = tower.config
    config = Qwen3VLVisionConfig(**asdict(sizes))
    config._attn_implementation = "sdpa"
    return Qwen3VLVisionModel(config)


_BUILDERS: dict[str, Callable[[Tower], nn.Module]] = {"qwen3_vl": _qwen3_vl}
