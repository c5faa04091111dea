"""Embeddings that make their views on first access are like those that were given theirs."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import FrozenInstanceError, asdict, replace
from threading import Thread

import pytest
import torch

from vitgraph import VisionEmbedding
from vitgraph.core import Grid

GRID = Grid(1, 2, 6)


def levels(n: int) -> torch.Tensor:
    return torch.arange(n * 10 * 4, dtype=torch.float32).view(n, 10, 4)


def test_views_are_the_rows_of_the_item() -> None:
    x = levels(3)
    embedding = VisionEmbedding.of_rows(x, 4, 3, GRID)
    assert torch.equal(embedding.tokens, x[0, 4:7])
    assert torch.equal(embedding.deepstack, x[1:, 4:7])
    assert embedding.tokens.data_ptr() == x[0, 4:].data_ptr()
    assert embedding.tokens is embedding.tokens
    assert embedding.grid is GRID
    assert VisionEmbedding.of_rows(levels(1), 4, 3, GRID).deepstack is None


def test_it_looks_like_one_that_was_given_its_tensors() -> None:
    lazy = VisionEmbedding.of_rows(levels(3), 4, 3, GRID)
    given = VisionEmbedding(lazy.tokens, lazy.deepstack, GRID)
    assert repr(lazy) == repr(given)
    assert lazy == given
    assert hash(lazy) == hash(given)
    assert replace(lazy, grid=Grid(1, 4, 3)).tokens is lazy.tokens
    assert asdict(VisionEmbedding.of_rows(levels(1), 0, 1, GRID)).keys() == {"tokens", "deepstack", "grid"}
    with pytest.raises(FrozenInstanceError):
        lazy.tokens = lazy.tokens
    with pytest.raises(AttributeError, match="no attribute 'token'"):
        _ = lazy.token
    assert not hasattr(VisionEmbedding.__new__(VisionEmbedding), "tokens")


def through_torch(embedding: VisionEmbedding) -> VisionEmbedding:
    file = io.BytesIO()
    torch.save(embedding, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    "again", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy, copy.deepcopy, through_torch],
    ids=["pickle", "copy", "deepcopy", "torch.save"],
)  # fmt: skip
def test_copies_hold_the_same(again, n: int) -> None:
    x = levels(n)
    got = again(VisionEmbedding.of_rows(x, 2, 5, GRID))
    assert torch.equal(got.tokens, x[0, 2:7])
    assert (got.deepstack is None) if n == 1 else torch.equal(got.deepstack, x[1:, 2:7])
    assert got.grid == GRID


def test_threads_that_ask_at_once_get_the_same_view() -> None:
    for _ in range(50):
        embedding, seen = VisionEmbedding.of_rows(levels(2), 1, 2, GRID), []
        threads = [Thread(target=lambda e=embedding, s=seen: s.append(e.tokens)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({id(view) for view in seen}) == 1
