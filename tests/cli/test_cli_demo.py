"""`vitgraph demo`."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from safetensors import safe_open

import vitgraph.demo
from vitgraph.models.registry import families


@pytest.mark.parametrize("family", [f.name for f in families()])
def test_every_family(run, tmp_path, family):
    result = run("demo", "--family", family, "--out", tmp_path, "--max-tokens", 384)
    assert result.exit_code == 0, result.output
    assert "random weights" in result.output
    assert "agrees" in result.output
    folder = tmp_path / family
    assert (folder / "checkpoint" / "config.json").is_file()
    with Image.open(folder / "packing.png") as picture:
        assert picture.width > 1000
    with safe_open(folder / "embeddings.safetensors", "pt") as file:
        entries = json.loads(file.metadata()["files"])
    assert len({tuple(entry["grid"]) for entry in entries}) > 3


def test_a_disagreement_is_an_exit_code(run, tmp_path, monkeypatch):
    monkeypatch.setattr(vitgraph.demo, "relative_error", lambda *_: float("nan"))
    result = run("demo", "--family", "qwen3_vl", "--out", tmp_path)
    assert result.exit_code == 1
    assert "DIFFERS" in result.output


def test_without_graphs(run, tmp_path):
    result = run("demo", "--family", "qwen3_vl", "--out", tmp_path, "--no-graph")
    assert result.exit_code == 0, result.output
    assert "all eager" in result.output


def test_unknown_family(run, tmp_path):
    result = run("demo", "--family", "resnet", "--out", tmp_path)
    assert result.exit_code == 2
    assert "qwen3_vl" in result.output
