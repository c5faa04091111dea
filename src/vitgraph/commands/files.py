"""Which files a command line names: paths, folders and globs."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vitgraph.errors import InputError

IMAGE_SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"})


@dataclass
class FoundFiles:
    """Files in the order given, each once, and the arguments that named none.

    Attributes:
        files: what to encode.
        failures: argument -> why it gave no file.
    """

    files: list[Path] = field(default_factory=list)
    failures: dict[str, InputError] = field(default_factory=dict)


def find_files(arguments: Sequence[str]) -> FoundFiles:
    """Expands folders (recursively, by extension) and globs (`**` included). A plain path is taken as it is."""
    found = FoundFiles()
    seen: set[Path] = set()
    for argument in arguments:
        try:
            paths = _expand(argument)
        except InputError as error:
            found.failures[argument] = error
            continue
        for path in paths:
            if path not in seen:
                seen.add(path)
                found.files.append(path)
    return found


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


def _expand(argument: str) -> list[Path]:
    path = Path(argument)
    if path.is_dir():
        return _media(path.rglob("*"), f"the folder {argument} holds no image or video")
    if path.is_file():
        return [path]
    if glob.has_magic(argument):
        matches = [Path(match) for match in glob.glob(argument, recursive=True)]
        return _media(matches, f"nothing matches {argument}")
    raise InputError(f"no such file or folder: {argument}")


def _media(paths: Iterable[Path], nothing: str) -> list[Path]:
    known = IMAGE_SUFFIXES | VIDEO_SUFFIXES
    files = sorted(path for path in paths if path.suffix.lower() in known and path.is_file())
    if not files:
        raise InputError(f"{nothing} (known extensions: {', '.join(sorted(known))}).")
    return files
