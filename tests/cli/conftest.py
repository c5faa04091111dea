"""Fixtures of the command-line tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from vitgraph.cli import app
from vitgraph.models.tiny import write_tiny_checkpoint


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint("qwen3_vl", tmp_path_factory.mktemp("tiny") / "qwen3_vl")


@pytest.fixture
def run():
    """Runs `vitgraph` with these arguments; wide output, so that texts are not wrapped."""

    def invoke(*arguments: object):
        runner = CliRunner(env={"COLUMNS": "240", "TERM": "dumb"})
        return runner.invoke(app, [str(argument) for argument in arguments])

    return invoke


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with two images (one in a subfolder), a broken image and a text file."""
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    Image.radial_gradient("L").resize((256, 288)).save(folder / "a.png")
    Image.linear_gradient("L").convert("RGB").resize((320, 256)).save(folder / "deep" / "b.JPG", format="JPEG")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 this is not a picture")
    (folder / "notes.txt").write_text("not a picture")
    return folder
