"""The safetensors file that `encode` writes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from vitgraph.commands.embedding_file import EmbeddingFile
from vitgraph.commands.outputs import OutputError
from vitgraph.core import Grid
from vitgraph.embedding import VisionEmbedding


def _embedding(tokens, dtype=torch.float32, levels=0):
    deepstack = torch.randn(levels, tokens, 6).to(dtype) if levels else None
    return VisionEmbedding(torch.randn(tokens, 6).to(dtype), deepstack, Grid(1, 2, 2 * tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_goes_in_comes_out(tmp_path, dtype):
    path = tmp_path / "e.safetensors"
    items = {"a b.jpg": _embedding(3, dtype, levels=2), "é.png": _embedding(5, dtype)}
    with EmbeddingFile(path, {"model": "m"}) as target:
        for key, item in items.items():
            target.add(key, item)
    stored = load_file(path)
    assert set(stored) == {"a b.jpg", "a b.jpg.deepstack", "é.png"}
    assert torch.equal(stored["a b.jpg"], items["a b.jpg"].tokens)
    assert torch.equal(stored["a b.jpg.deepstack"], items["a b.jpg"].deepstack)
    assert torch.equal(stored["é.png"], items["é.png"].tokens)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["model"] == "m"
    assert json.loads(metadata["files"])[0] == {"key": "a b.jpg", "grid": [1, 2, 6], "tokens": 3}


def test_views_are_stored_as_they_look(tmp_path):
    tokens = torch.randn(6, 4).T
    with EmbeddingFile(tmp_path / "e.safetensors", {}) as target:
        target.add("x", VisionEmbedding(tokens, None, Grid(1, 2, 2)))
    assert torch.equal(load_file(tmp_path / "e.safetensors")["x"], tokens)


def test_nothing_is_left_behind_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), EmbeddingFile(tmp_path / "e.safetensors", {}) as target:
        target.add("x", _embedding(2))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_without_items(tmp_path):
    with EmbeddingFile(tmp_path / "e.safetensors", {}):
        pass
    assert list(tmp_path.iterdir()) == []


def test_two_items_of_one_name_are_refused(tmp_path):
    with (
        pytest.raises(OutputError, match="two inputs"),
        EmbeddingFile(tmp_path / "e.safetensors", {}) as target,
    ):
        target.add("x", _embedding(2))
        target.add("x", _embedding(2))
