"""Choices that were measured once per GPU, kept on disk."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch

logger = logging.getLogger("vitgraph")

Times = Mapping[int, Mapping[str, float]]
"""Rows of one segment -> backend -> microseconds."""


def cache_folder() -> Path:
    """`$VITGRAPH_CACHE`, else `vitgraph` in the user's cache folder."""
    if "VITGRAPH_CACHE" in os.environ:
        return Path(os.environ["VITGRAPH_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitgraph"


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
    entry = _read(path or cache_folder() / "attention.json").get(key)
    if entry is None:
        return None
    return {int(rows): dict(times) for rows, times in entry.items()}


def save_times(key: str, times: Times, path: Path | None = None) -> None:
    """Adds an entry; other processes may do the same. A folder that cannot be written is logged, not raised."""
    path = path or cache_folder() / "attention.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = _read(path) | {key: {str(rows): dict(own) for rows, own in times.items()}}
        with NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False, encoding="utf-8") as file:
            json.dump(entries, file, indent=1)
        # Readers see the old file or the new one, never half of it.
        os.replace(file.name, path)
    except OSError as error:
        logger.warning("measured choices cannot be kept in %s: %s; they are measured again next time", path, error)


def _read(path: Path) -> dict[str, dict[str, dict[str, float]]]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read: %s; its choices are measured again", path, error)
        return {}
    return entries if isinstance(entries, dict) else {}
