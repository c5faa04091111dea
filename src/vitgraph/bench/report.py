"""What a benchmark run says: tables for people, JSON for machines."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.console import Group
from rich.table import Table

from vitgraph import __version__
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


def workload_title(rows: Sequence[Result]) -> str:
    """Name and size of the workload of these rows."""
    first = rows[0]
    return f"{first.workload}: {first.items} item{'s' * (first.items != 1)}, {first.patches} patches"


def results_tables(results: Sequence[Result]) -> Group:
    """One table per workload; speed-up is against its first row."""
    workloads = list(dict.fromkeys(r.workload for r in results))
    return Group(*(_table([r for r in results if r.workload == workload]) for workload in workloads), CAPTION)


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
        table.add_row(
            r.way,
            f"{r.timing.median:.2f}",
            f"{r.timing.p99:.2f}",
            *([f"{r.timing.device_median:.2f}"] if on_device else []),
            f"{r.items_per_second:.1f}",
            f"{first.timing.median / r.timing.median:.2f}x",
            "-" if r.packs is None else f"{r.padding:.1%}",
            f"{r.error:.1e}",
        )
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
