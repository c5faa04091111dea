"""Choices that were measured once per GPU, kept on disk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from vitgraph.measured import cache_folder, keep_entry, read_entry

logger = logging.getLogger("vitgraph")

Times = Mapping[int, Mapping[str, float]]
"""Rows of one segment -> backend -> microseconds."""


def choice_key(gpu: str, subjects: Sequence[str], heads: int, head_dim: int, dtype: torch.dtype) -> str:
    """Names what was measured.

    Args:
        gpu: name of the device.
        subjects: what is compared, with versions.
        heads, head_dim, dtype: of q, k and v.
    """
    kind = str(dtype).removeprefix("torch.")
    return " | ".join([gpu, f"torch {torch.__version__}", *subjects, f"{heads} x {head_dim}", kind])


def measure_once(key: str, classes: Iterable[int], measure: Callable[[int], dict[str, float]]) -> Times:
    """What was measured under this key before, or else what `measure` gives for each class, which is then kept.

    Args:
        key: see `choice_key`.
        classes: numbers of rows.
        measure: from rows to microseconds by name.
    """
    times = load_times(key)
    if times is None:
        logger.info("measuring once: %s", key)
        times = {rows: measure(rows) for rows in classes}
        save_times(key, times)
    return times


def load_times(key: str, path: Path | None = None) -> dict[int, dict[str, float]] | None:
    """What was measured under this key; None when nothing was, or when the file cannot be read.

    Args:
        key: names the GPU, versions and shape.
        path: default: `attention.json` in `cache_folder()`.
    """
    entry = read_entry(path or cache_folder() / "attention.json", key)
    return None if entry is None else {int(rows): dict(times) for rows, times in entry.items()}


def save_times(key: str, times: Times, path: Path | None = None) -> None:
    """Adds an entry; see `keep_entry`."""
    entry = {str(rows): dict(own) for rows, own in times.items()}
    keep_entry(path or cache_folder() / "attention.json", key, entry)
