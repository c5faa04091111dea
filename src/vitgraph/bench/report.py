"""What a benchmark run says: tables for people, JSON for machines."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.console import Group
from rich.table import Table

from vitgraph import __version__
from vitgraph.bench.curve import crossover_text
from vitgraph.bench.run import Result

PACKAGES = ("torch", "triton", "transformers", "numpy")
CAPTION = "speed-up against the first row; error |out - ref| / |ref| against float32"


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and date of this run."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hardware": _hardware(device),
        "versions": {"vitgraph": __version__, "python": platform.python_version(), **_versions()},
    }


def results_as_dicts(results: Iterable[Result]) -> list[dict[str, Any]]:
    """Rows for JSON; times in milliseconds."""
    return [
        {
            "workload": r.workload,
            "way": r.way,
            "items": r.items,
            "patches": r.patches,
            "median_ms": r.timing.median,
            "p99_ms": r.timing.p99,
            "best_ms": r.timing.best,
            "device_median_ms": r.timing.device_median,
            "runs": r.timing.runs,
            "items_per_second": r.items_per_second,
            "padding": r.padding,
            "packs": r.packs,
            "relative_error": r.error,
        }
        for r in results
    ]


def captures_as_dicts(results: Iterable[Result]) -> dict[str, dict[str, Any]]:
    """Cost of capturing the ladder, by way."""
    return {r.way: asdict(r.capture) for r in results if r.capture is not None}


def captures_text(results: Sequence[Result]) -> str:
    """A line per way that captured graphs."""
    return "\n".join(
        f"{way}: {c['graphs']} graphs captured in {c['seconds']:.1f} s, pool {c['graph_bytes'] / 1e6:.0f} MB, "
        f"static buffers {c['static_bytes'] / 1e6:.0f} MB"
        + (f"; timed in {c['measure_seconds']:.1f} s: {crossover_text(c['costs'])}" if c["costs"] else "")
        for way, c in captures_as_dicts(results).items()
    )


def as_markdown(report: Mapping[str, Any], results: Sequence[Result]) -> str:
    """The report as a page: what ran where, then a table per workload."""
    hardware, versions = report["hardware"], report["versions"]
    lines = [
        f"# {report['model']}, {report['dtype']}",
        "",
        f"{hardware.get('gpu', hardware['cpu'])}, {report['date']}",
        "",
        ", ".join(f"{name} {number}" for name, number in versions.items()),
        "",
        "```",
        report["command"],
        "```",
        "",
        f"Wall clock around one call and a device synchronisation, median of {results[0].timing.runs}; {CAPTION}.",
    ]
    for workload in dict.fromkeys(r.workload for r in results):
        rows = [r for r in results if r.workload == workload]
        lines += [
            "",
            f"## {workload_title(rows)}",
            "",
            "| way | median ms | P99 ms | items/s | speed-up | padding | error |",
        ]
        lines.append("|---|---|---|---|---|---|---|")
        lines += [f"| {' | '.join(_cells(r, rows[0]))} |" for r in rows]
    captures = captures_text(results)
    if captures:
        lines += ["", "## Capture", "", *(f"- {line}" for line in captures.splitlines())]
    return "\n".join(lines) + "\n"


def _cells(r: Result, first: Result) -> list[str]:
    return [
        r.way,
        f"{r.timing.median:.2f}",
        f"{r.timing.p99:.2f}",
        f"{r.items_per_second:.1f}",
        f"{first.timing.median / r.timing.median:.2f}x",
        "-" if r.packs is None else f"{r.padding:.1%}",
        f"{r.error:.2e}",
    ]


def workload_title(rows: Sequence[Result]) -> str:
    """Name and size of the workload of these rows."""
    first = rows[0]
    return f"{first.workload}: {first.items} item{'s' * (first.items != 1)}, {first.patches} patches"


def results_tables(results: Sequence[Result]) -> Group:
    """One table per workload, then what capture cost; speed-up is against a table's first row."""
    workloads = list(dict.fromkeys(r.workload for r in results))
    return Group(
        *(_table([r for r in results if r.workload == workload]) for workload in workloads),
        CAPTION,
        captures_text(results),
    )


def _table(rows: Sequence[Result]) -> Table:
    first = rows[0]
    on_device = first.timing.device_median is not None
    table = Table(title=workload_title(rows), title_justify="left")
    table.add_column("way", min_width=13, no_wrap=True)
    for name in (
        "median ms",
        "P99 ms",
        *(["device ms"] if on_device else []),
        "items/s",
        "speed-up",
        "padding",
        "error",
    ):
        table.add_column(name.replace(" ", "\n"), justify="right", no_wrap=True, min_width=6)
    for r in rows:
        way, median, p99, *rest = _cells(r, first)
        device = [f"{r.timing.device_median:.2f}"] if on_device else []
        table.add_row(way, median, p99, *device, *rest)
    return table


def _hardware(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {"device": device.type, "cpu": platform.processor() or platform.machine()}
    facts["cpu_threads"] = torch.get_num_threads()
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        facts |= {"gpu": gpu.name, "gpu_memory_bytes": gpu.total_memory, "cuda": torch.version.cuda}
    return facts


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
