"""Tiny checkpoints with random weights, in a family's real layout: for the demo and the tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from vitgraph.attention.sdpa import SdpaAttention
from vitgraph.models.checkpoint import INDEX
from vitgraph.models.registry import get_family
from vitgraph.models.weights import materialise, randomise

TEXT_KEY = "language_model.embed_tokens.weight"


def write_tiny_checkpoint(family: str, folder: str | Path, seed: int = 0, layout: int = 0) -> Path:
    """Writes config.json, preprocessor_config.json and two shards with an index; a text tensor lies beside them.

    Args:
        family: registry name.
        folder: created if needed.
        seed: of the random weights.
        layout: index of the checkpoint layout to write.

    Returns:
        The folder.
    """
    row = get_family(family)
    config, preprocessor = row.tiny()
    parsed = row.parse_config(config)
    with torch.device("meta"):
        tower = row.build(parsed, SdpaAttention())
    materialise(tower, torch.device("cpu"), torch.float32)
    randomise(tower, seed)
    tensors = row.layouts(parsed)[layout].export(dict(tower.named_parameters()))
    tensors[TEXT_KEY] = torch.zeros(8, 4)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2))
    _write_shards(folder, tensors)
    return folder


def _write_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    keys = sorted(tensors)
    middle = len(keys) // 2
    weight_map: dict[str, str] = {}
    for number, part in enumerate((keys[:middle], keys[middle:]), start=1):
        name = f"model-{number:05d}-of-00002.safetensors"
        save_file({key: tensors[key].detach().contiguous() for key in part}, folder / name)
        weight_map.update(dict.fromkeys(part, name))
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=2))
