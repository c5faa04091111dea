"""What was measured once per machine, kept on disk: a JSON file of entries by key."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

logger = logging.getLogger("vitgraph")


def cache_folder() -> Path:
    """`$VITGRAPH_CACHE`, else `vitgraph` in the user's cache folder."""
    if "VITGRAPH_CACHE" in os.environ:
        return Path(os.environ["VITGRAPH_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitgraph"


def read_entry(path: Path, key: str) -> dict[str, Any] | None:
    """What is kept under the key; None when nothing of use is, or when the file cannot be read."""
    entry = _read(path).get(key)
    return entry if isinstance(entry, dict) else None


def keep_entry(path: Path, key: str, entry: Mapping[str, Any]) -> None:
    """Adds an entry; other processes may do the same. A folder that cannot be written is logged, not raised."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = _read(path) | {key: entry}
        with NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False, encoding="utf-8") as file:
            json.dump(entries, file, indent=1)
        # Readers see the old file or the new one, never half of it.
        os.replace(file.name, path)
    except OSError as error:
        logger.warning("measured choices cannot be kept in %s: %s; they are measured again next time", path, error)


def _read(path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read: %s; its choices are measured again", path, error)
        return {}
    return entries if isinstance(entries, dict) else {}
