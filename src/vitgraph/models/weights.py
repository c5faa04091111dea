"""Weights of a tower: from a checkpoint, strictly; or random, from a seed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vitgraph.errors import CheckpointError
from vitgraph.layers.mlp import BlockMlp
from vitgraph.models.checkpoint import Checkpoint
from vitgraph.models.layout import Layout, best_layout


def materialise(tower: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Gives a tower that was built on the meta device uninitialised parameters; constants move and keep their dtype.

    On CUDA, the weights of MLPs are laid out as suits its GEMMs; see `BlockMlp.lay_out`.
    """
    for module in tower.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=dtype, device=device)
                module._parameters[name] = nn.Parameter(empty, requires_grad=False)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    # After the loop: children come after their parents there.
    for module in tower.modules():
        if device.type == "cuda" and isinstance(module, BlockMlp):
            module.lay_out()


def load_weights(tower: nn.Module, checkpoint: Checkpoint, layouts: Iterable[Layout]) -> Layout:
    """Fills every parameter of `tower` from the checkpoint; values are cast to the parameter's dtype.

    Returns:
        The layout that the checkpoint has.

    Raises:
        CheckpointError: listing every missing and every unexpected vision-side key at once, every tensor whose shape
            differs, or the shard that is missing.
    """
    parameters = dict(tower.named_parameters())
    files = checkpoint.keys()
    layout = best_layout(layouts, parameters, set(files))
    wanted = {name: layout.sources(name) for name in parameters}
    used = {key for keys, _ in wanted.values() for key in keys}
    _check_keys(checkpoint, layout, used, set(files))
    tensors = dict(checkpoint.tensors(sorted(used), files))
    mismatched = []
    for name, (keys, transform) in wanted.items():
        value = transform.load([tensors[key] for key in keys])
        if value.shape != parameters[name].shape:
            mismatched.append(f"{' + '.join(keys)}: {tuple(value.shape)}, expected {tuple(parameters[name].shape)}")
            continue
        with torch.no_grad():
            parameters[name].copy_(value)
    if mismatched:
        raise CheckpointError(_report(checkpoint, layout, [("tensors of another shape", mismatched)]))
    return layout


def randomise(tower: nn.Module, seed: int) -> None:
    """Random weights for every parameter, none of them neutral: a term that is ignored changes the output.

    Matrices are normal with a variance that keeps activations near one; norm scales lie near 1; biases are small.
    """
    for name, parameter in tower.named_parameters():
        generator = torch.Generator(parameter.device).manual_seed(hash_seed(name, seed))
        values = torch.randn(parameter.shape, generator=generator, device=parameter.device, dtype=torch.float32)
        with torch.no_grad():
            parameter.copy_(_scaled(name, values))


def _scaled(name: str, values: Tensor) -> Tensor:
    if values.dim() == 1:
        return 1 + 0.1 * values if name.endswith("weight") else 0.05 * values
    return values * (0.5 if "pos_emb" in name else values[0].numel() ** -0.5)


def hash_seed(name: str, seed: int) -> int:
    """A seed that depends on both and is the same in every process."""
    value = seed & 0xFFFFFFFF
    for byte in name.encode():
        value = (value * 1000003 ^ byte) & 0x7FFFFFFFFFFFFFFF
    return value


def _check_keys(checkpoint: Checkpoint, layout: Layout, used: set[str], present: set[str]) -> None:
    missing = sorted(used - present)
    unexpected = sorted(key for key in present - used if layout.owns(key))
    if missing or unexpected:
        lists = [("missing keys", missing), ("unexpected keys", unexpected)]
        raise CheckpointError(_report(checkpoint, layout, lists))


def _report(checkpoint: Checkpoint, layout: Layout, lists: list[tuple[str, list[str]]]) -> str:
    lines = [f"{checkpoint.model} does not fit layout {layout.name!r} of this family:"]
    for title, entries in lists:
        if entries:
            lines.append(f"{len(entries)} {title}:")
            lines.extend(f"  {entry}" for entry in entries)
    lines.append("Check that config.json belongs to these weights.")
    return "\n".join(lines)
