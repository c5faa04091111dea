"""Small real photographs for examples, warm-up and tests. Sources and licences: CREDITS.md beside this file."""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable

PHOTOGRAPHS = ("astronaut.jpg", "cat.jpg", "coffee.jpg", "hubble.jpg", "rocket.jpg")


def sample_photographs() -> list[Traversable]:
    """The photographs, RGB JPEG files of 224x224 to 640x427 pixels, one of them upright.

    Each is a path-like object of `importlib.resources`: on an installed package a `pathlib.Path`, and
    `.read_bytes()` gives the encoded image in any case.
    """
    return [files(__name__) / name for name in PHOTOGRAPHS]
