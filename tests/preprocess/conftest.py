"""Pictures for the preprocessing tests."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image
import pytest

from vitgraph.assets import sample_photographs
from vitgraph.preprocess import load_image


@pytest.fixture(scope="session")
def photographs() -> dict[str, PIL.Image.Image]:
    return {path.name: load_image(path.read_bytes()) for path in sample_photographs()}


@pytest.fixture(scope="session")
def cat(photographs: dict[str, PIL.Image.Image]) -> PIL.Image.Image:
    return photographs["cat.jpg"]


@pytest.fixture(scope="session")
def cat_jpeg() -> bytes:
    return next(path for path in sample_photographs() if path.name == "cat.jpg").read_bytes()


@pytest.fixture(scope="session")
def panning(photographs: dict[str, PIL.Image.Image]) -> np.ndarray:
    """A clip of 10 frames, uint8 `[10, 120, 200, 3]`: the camera moves over a photograph."""
    coffee = np.asarray(photographs["coffee.jpg"])
    return np.stack([coffee[100:220, 20 * i : 20 * i + 200] for i in range(10)])


def encode(image: PIL.Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format=format, **options)
    return file.getvalue()
