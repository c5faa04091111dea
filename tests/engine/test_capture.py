"""The begin and the end of a capture, on a graph that is none: what a failed end leaves behind."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vitgraph.capture import capturing

DEVICE = torch.device("cuda", 0)


class Graph:
    """Notes what is called; its end may fail."""

    def __init__(self, fails: bool = False) -> None:
        self.calls: list[object] = []
        self._fails = fails

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        self.calls.append((pool, capture_error_mode))

    def capture_end(self) -> None:
        self.calls.append("end")
        if self._fails:
            raise RuntimeError("operation failed due to a previous error during capture")


@pytest.fixture
def cleaned(monkeypatch) -> list[object]:
    """What is put back after a failed end."""
    calls: list[object] = []
    generator = SimpleNamespace(clone_state=lambda: "copy", graphsafe_set_state=calls.append)
    monkeypatch.setattr(torch.cuda, "default_generators", (generator,))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *args: calls.append(args), raising=False)
    return calls


def test_a_capture_begins_and_ends_around_the_block(cleaned) -> None:
    graph = Graph()
    with capturing(graph, DEVICE, "pool"):
        graph.calls.append("block")
    assert graph.calls == [("pool", "thread_local"), "block", "end"] and not cleaned


def test_a_block_that_fails_ends_the_capture(cleaned) -> None:
    graph = Graph()
    with pytest.raises(ValueError, match="in the block"), capturing(graph, DEVICE, "pool"):
        raise ValueError("in the block")
    assert graph.calls[-1] == "end" and not cleaned


def test_an_end_that_fails_puts_generator_and_allocator_back(cleaned) -> None:
    with pytest.raises(RuntimeError, match="previous error"), capturing(Graph(fails=True), DEVICE, "pool"):
        pass
    assert cleaned == ["copy", (0, "pool")]
