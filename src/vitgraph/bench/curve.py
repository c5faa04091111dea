"""The measured costs of a ladder: a table for people, plain values for machines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from vitgraph.planning.budgets import Budget
from vitgraph.planning.cost import CostModel

MOST_ROWS = 16


def costs_as_dict(cost: CostModel, budgets: Sequence[Budget]) -> dict[str, Any]:
    """The model as plain values; times in microseconds. Empty before anything was timed."""
    if cost.unit != "us":
        return {}
    ladder = zip(budgets, cost.fixed, cost.slope, cost.measured, strict=True)
    return {
        "budgets": [
            {"tokens": b.tokens, "patches": b.capacity["patch"], "fixed_us": f, "us_per_load": s, "measured": m}
            for b, f, s, m in ladder
        ],
        "eager": [{"patches": p, "us": t} for p, t in zip(cost.eager_rows, cost.eager_time, strict=True)],
        "crossover_patches": cost.crossover,
    }


def crossover_text(costs: dict[str, Any]) -> str:
    """From which size eager is as fast as a full budget."""
    rows = costs["crossover_patches"]
    if rows is None:
        return "graphs are faster than eager in every budget"
    return f"from {rows} patches on, an exactly filled eager run is as fast as its graph"


def costs_table(cost: CostModel, budgets: Sequence[Budget]) -> Table:
    """Some budgets with the replay of one image that fills them, of many small ones, and the eager forward."""
    table = Table(
        title="measured costs, ms", title_justify="left", caption=crossover_text(costs_as_dict(cost, budgets))
    )
    for name in ("tokens", "patches", "replay,\nno attention", "replay,\none image", "eager,\none image"):
        table.add_column(name, justify="right")
    step = max(-(-len(budgets) // MOST_ROWS), 1)
    for index in sorted({*range(0, len(budgets), step), len(budgets) - 1}):
        rows = budgets[index].capacity["patch"]
        load = float(rows) ** 2
        times = (cost.fixed[index], cost.replay(index, load), cost.eager(rows, load))
        table.add_row(str(budgets[index].tokens), str(rows), *(f"{time / 1e3:.2f}" for time in times))
    return table
