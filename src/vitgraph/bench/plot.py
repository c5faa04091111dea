"""Pictures: a benchmark as grouped bars of the median time, measured costs as curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitgraph.bench.report import workload_title
from vitgraph.bench.run import Result
from vitgraph.errors import MissingExtraError

COLOURS = {
    "transformers": "#9aa0a6",
    "eager": "#c9b27c",
    "padded": "#8fb8a8",
    "graph": "#1f7a6d",
    "compile": "#d98b5f",
    "compile+graph": "#8c3b2e",
}

HEAD, FOOT = 0.42, 0.22
"""Inches above and below the panels."""

P99_ROOM = 1.2
"""A P99 is drawn up to this many times the longest median of its panel."""


def check_plot_extra() -> None:
    """Raises `MissingExtraError` when matplotlib is not installed, before any time is spent on measuring."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtraError("matplotlib", "plot", "--plot") from None


def plot_results(results: Sequence[Result], path: Path, title: str, footer: str) -> None:
    """Writes a PNG: per workload one bar per way, its length the median, the thin line up to the P99."""
    check_plot_extra()
    from matplotlib.figure import Figure

    workloads = list(dict.fromkeys(r.workload for r in results))
    heights = [sum(r.workload == w for r in results) for w in workloads]
    height = HEAD + FOOT + sum(0.34 * n + 0.65 for n in heights)
    figure = Figure(figsize=(8, height), dpi=140, layout="constrained")
    panels = figure.subplots(len(workloads), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for panel, workload in zip(panels, workloads, strict=True):
        _draw_panel(panel, [r for r in results if r.workload == workload])
    panels[-1].set_xlabel(
        "ms per call: bar = median, thin line = up to the P99; factor against the first row", fontsize=9
    )
    figure.text(0.01, 1 - 0.1 / height, title, fontsize=11, fontweight="bold", va="top")
    figure.text(0.99, 0.005, footer, ha="right", va="bottom", fontsize=7, color="#666666")
    engine: Any = figure.get_layout_engine()
    engine.set(rect=(0, FOOT / height, 1, 1 - (HEAD + FOOT) / height))
    figure.savefig(path)


def _draw_panel(panel: Any, rows: Sequence[Result]) -> None:
    """Bars of one workload. A P99 far beyond every median would squash the bars: it is written instead of drawn."""
    longest = max(r.timing.median for r in rows)
    end = P99_ROOM * longest
    for y, r in enumerate(rows):
        median, p99 = r.timing.median, r.timing.p99
        panel.barh(y, median, height=0.72, color=COLOURS.get(r.way, "#777777"))
        panel.plot([median, min(p99, end)], [y, y], color="#333333", linewidth=1)
        label = f"{median:.2f} ms   {rows[0].timing.median / median:.2f}x"
        label += f"   (P99 {p99:.0f} ms)" if p99 > end else ""
        panel.text(max(median, min(p99, end)) + 0.015 * longest, y, label, va="center", fontsize=8)
    panel.set_yticks(range(len(rows)), [r.way for r in rows], fontsize=8)
    panel.tick_params(axis="x", labelsize=8)
    panel.set_xlim(0, 1.65 * longest)
    panel.invert_yaxis()
    panel.set_title(workload_title(rows), fontsize=9, loc="left")
    panel.spines[["top", "right"]].set_visible(False)


def plot_costs(costs: dict[str, Any], path: Path, title: str) -> None:
    """Writes a PNG of measured costs, both axes logarithmic: replays by patches, and the eager forward.

    Args:
        costs: from `curve.costs_as_dict`; not empty.
        path: of the picture.
        title: above it.
    """
    check_plot_extra()
    from matplotlib.figure import Figure

    budgets = costs["budgets"]
    rows = [b["patches"] for b in budgets]
    plain = [b["fixed_us"] / 1e3 for b in budgets]
    one_image = [(b["fixed_us"] + b["us_per_load"] * b["patches"] ** 2) / 1e3 for b in budgets]
    figure = Figure(figsize=(8, 4.5), dpi=140, layout="constrained")
    panel = figure.subplots()
    panel.plot(rows, one_image, color=COLOURS["graph"], label="replay, one image that fills the budget")
    panel.plot(rows, plain, color=COLOURS["padded"], label="replay without attention between patches")
    timed = [(b["patches"], b["fixed_us"] / 1e3) for b in budgets if b["measured"]]
    panel.plot(*zip(*timed, strict=True), ".", color=COLOURS["padded"], markersize=3)
    if costs["eager"]:
        eager = [(point["patches"], point["us"] / 1e3) for point in costs["eager"]]
        label = "eager without attention between patches"
        panel.plot(*zip(*eager, strict=True), "o-", color=COLOURS["eager"], markersize=4, label=label)
    if costs["crossover_patches"] is not None:
        panel.axvline(costs["crossover_patches"], color="#999999", linewidth=0.8, linestyle="--")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.xaxis.set_major_formatter("{x:.0f}")
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter("{x:g}")
    panel.tick_params(labelsize=8, which="both")
    panel.set_xlabel("patches (points: budgets that were timed)", fontsize=9)
    panel.set_ylabel("ms", fontsize=9)
    panel.set_title(title, fontsize=11, loc="left", fontweight="bold")
    panel.legend(fontsize=8, frameon=False)
    panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
