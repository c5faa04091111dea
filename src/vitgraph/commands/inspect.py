"""`vitgraph inspect`: what a checkpoint's tower is and what its graphs would hold. Needs no GPU."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitgraph.commands.outputs import check_writable, console, human_bytes
from vitgraph.commands.settings import with_encoder_flags
from vitgraph.config import EncoderConfig
from vitgraph.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vitgraph.encoder import VisionEncoder
    from vitgraph.models.contract import TowerSpec
    from vitgraph.planning.budgets import Budget
    from vitgraph.planning.cost import CostModel


@with_encoder_flags()
def inspect(
    config: EncoderConfig,
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.")],
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32: what to run in. Default: bfloat16.")
    ] = None,
    time_budgets: Annotated[
        bool, typer.Option("--time", help="Also capture on CUDA, time the budgets and show what they cost.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="With --time: also draw the costs as PNG into this file.", metavar="FILE")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file of --plot.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show a checkpoint's tower, its budgets, its static buffers and the memory they take.

    Everything but --time is computed on the CPU. Activations are a rough estimate of what the largest graph holds at
    its widest point.
    """
    from vitgraph.bench.curve import costs_as_dict, costs_table
    from vitgraph.encoder import VisionEncoder

    _check_plot(plot, time_budgets, force)

    # Nothing runs, so a backend that needs a GPU is no reason to refuse.
    chosen, config = config, replace(config, attention="auto")
    with VisionEncoder.from_pretrained(model, device="cpu", dtype=dtype or "bfloat16", config=config) as encoder:
        facts = describe(encoder)
    measured = _time_budgets(model, dtype, chosen) if time_budgets else None
    if measured is not None:
        facts["costs"] = costs_as_dict(*measured)
        if plot is not None:
            from vitgraph.bench.plot import plot_costs

            plot_costs(facts["costs"], plot, model)
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    _print(model, facts)
    if measured is not None:
        console().print(costs_table(*measured))


def _check_plot(plot: Path | None, time_budgets: bool, force: bool) -> None:
    """Refuses what can be refused before any time is spent."""
    if plot is None:
        return
    if not time_budgets:
        raise ConfigError("--plot draws what --time measures; give both.")
    from vitgraph.bench.plot import check_plot_extra

    check_plot_extra()
    check_writable(plot, force)


def _time_budgets(model: str, dtype: str | None, config: EncoderConfig) -> tuple[CostModel, Sequence[Budget]]:
    """Costs of the budgets, measured with the checkpoint's own weights."""
    from vitgraph.encoder import VisionEncoder

    config = replace(config, graph=True, lazy=False, measure=True)
    with VisionEncoder.from_pretrained(model, device="cuda", dtype=dtype, config=config) as encoder:
        encoder.capture()
        return encoder.engine.planner.cost, encoder.budgets


def describe(encoder: VisionEncoder) -> dict[str, Any]:
    """Facts of an encoder as plain values; sizes in bytes."""
    spec, tower = encoder.spec, encoder.tower
    budgets = encoder.budgets if encoder.config.graph else ()
    largest = budgets[-1] if budgets else None
    buffers = _buffers(spec, largest, encoder.dtype) if largest else []
    weights = sum(p.nbytes for p in tower.parameters())
    return {
        "tower": {
            "family": spec.family,
            "title": encoder.family.title,
            "parameters": sum(p.numel() for p in tower.parameters()),
            "width": spec.width,
            "deepstack": spec.deepstack,
            "modalities": list(spec.modalities),
            "merge": spec.merge,
            "temporal_patch": spec.temporal_patch,
            "patch_width": spec.patch_width,
            "dtype": _name(encoder.dtype),
        },
        "budgets": {"tokens": [b.tokens for b in budgets], "largest": dict(largest.capacity) if largest else {}},
        "buffers": buffers,
        "memory": {
            "weights": weights,
            "static_buffers": sum(b["bytes"] for b in buffers),
            "activations_estimate": _activations(tower, largest, encoder.dtype.itemsize) if largest else 0,
        },
    }


def _buffers(spec: TowerSpec, budget: Budget, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Static buffers of one budget, the pixel rows first."""
    from vitgraph.engine.buffers import MetadataLayout

    rows = budget.capacity["patch"]
    pixels = {
        "name": "pixel_values",
        "dtype": _name(dtype),
        "shape": [rows, spec.patch_width],
        "bytes": rows * spec.patch_width * dtype.itemsize,
    }
    slots = MetadataLayout(spec, budget.capacity).slots
    return [
        pixels,
        *({"name": s.spec.name, "dtype": s.spec.dtype, "shape": list(s.shape), "bytes": s.nbytes} for s in slots),
    ]


def _activations(tower: nn.Module, budget: Budget, itemsize: int) -> int:
    """Input, output and residual of the tower's widest linear layer over all patch rows of a budget, in bytes."""
    from torch import nn

    widest, hidden = 0, 0
    for name, module in tower.named_modules():
        # Mergers see fewer, wider rows: about as many values as one patch row is wide.
        if isinstance(module, nn.Linear) and "merge" not in name:
            widest = max(widest, module.in_features + module.out_features)
            hidden = max(hidden, min(module.in_features, module.out_features))
    return budget.capacity["patch"] * (widest + hidden) * itemsize


def _print(model: str, facts: dict[str, Any]) -> None:
    from rich.table import Table

    out = console()
    tower = Table(title=model, title_justify="left", show_header=False)
    for key, value in _tower_rows(facts):
        tower.add_row(key, value)
    out.print(tower)
    buffers = Table(title=_budget_title(facts["budgets"]), title_justify="left")
    buffers.add_column("static buffer")
    buffers.add_column("dtype")
    buffers.add_column("shape", justify="right")
    buffers.add_column("size", justify="right")
    for buffer in facts["buffers"]:
        shape = " x ".join(map(str, buffer["shape"]))
        buffers.add_row(buffer["name"], buffer["dtype"], shape, human_bytes(buffer["bytes"]))
    if facts["buffers"]:
        out.print(buffers)
    memory = Table(title="memory", title_justify="left", show_header=False)
    for key, value in facts["memory"].items():
        memory.add_row(key.replace("_", " "), human_bytes(value))
    out.print(memory)


def _tower_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    tower, budgets = facts["tower"], facts["budgets"]["tokens"]
    levels = f", and {tower['deepstack']} deepstack levels" if tower["deepstack"] else ""
    span = f"{len(budgets)}, from {budgets[0]} to {budgets[-1]} tokens" if budgets else "none: runs eager"
    return [
        ("family", f"{tower['family']}: {tower['title']}"),
        ("parameters", f"{tower['parameters'] / 1e6:.1f} M"),
        ("dtype", tower["dtype"]),
        ("modalities", ", ".join(tower["modalities"])),
        ("output width", f"{tower['width']}{levels}"),
        ("patch row", f"{tower['patch_width']} values; {tower['temporal_patch']} frames per temporal patch"),
        ("merge", f"{tower['merge']} x {tower['merge']} patches per token"),
        ("budgets", span),
    ]


def _budget_title(budgets: dict[str, Any]) -> str:
    if not budgets["tokens"]:
        return "no budgets"
    held = ", ".join(f"{kind} {n}" for kind, n in budgets["largest"].items() if kind != "token")
    return f"largest budget: {budgets['tokens'][-1]} tokens ({held})"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
