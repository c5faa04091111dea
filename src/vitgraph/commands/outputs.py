"""Where commands write: checks ahead of the work, and consoles."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console

from vitgraph.errors import VitgraphError


class OutputError(VitgraphError):
    """A result cannot be written to where the command was told to."""


def console() -> Console:
    """Console of results, on standard output."""
    return Console(highlight=False)


def log() -> Console:
    """Console of progress and failures, on standard error."""
    return Console(stderr=True, highlight=False)


def check_writable(path: Path, force: bool) -> None:
    """Raises before any work is done if `path` exists (without `force`) or its folder is missing."""
    if path.is_dir():
        raise OutputError(f"{path} is a folder; give the name of a file.")
    if path.exists() and not force:
        raise OutputError(f"{path} exists; pass --force to overwrite it, or choose another --out.")
    if not path.parent.is_dir():
        raise OutputError(f"the folder {path.parent} does not exist; create it first.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise OutputError(f"{path} cannot be written: permission denied.")


def human_bytes(count: float) -> str:
    """Bytes as a short text in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")
