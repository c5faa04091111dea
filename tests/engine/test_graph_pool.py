"""Captures into one pool, on a device that is none: what a capture recorded is made executable in a thread."""

from __future__ import annotations

import threading
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from vitgraph.engine import graph as module
from vitgraph.engine.graph import GraphPool

DEVICE = torch.device("cuda", 0)
RECORDED, EXECUTABLE = 1000, 300
"""Bytes that a capture takes, and its graph when it is made executable."""


class Device:
    """Notes what happens, and how much memory is free."""

    def __init__(self) -> None:
        self.free, self.events, self.fails = 10_000, [], set()
        self.open = threading.Event()
        self.open.set()
        self.threads: set[str] = set()

    def graph(self, keep_graph: bool) -> SimpleNamespace:
        assert keep_graph, "else the end of the capture makes it executable"
        number = sum(event.startswith("capture") for event in self.events)
        return SimpleNamespace(number=number, instantiate=lambda: self.instantiate(number))

    def instantiate(self, number: int) -> None:
        assert self.open.wait(10)
        self.threads.add(threading.current_thread().name)
        self.free -= EXECUTABLE
        self.events.append(f"executable {number}")
        if number in self.fails:
            raise RuntimeError("out of memory")

    @contextmanager
    def capturing(self, graph: SimpleNamespace, device: torch.device, pool: object):
        self.events.append(f"capture {graph.number}")
        self.free -= RECORDED
        yield


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
    monkeypatch.setattr(module, "_capture_stream", lambda device: stream)
    monkeypatch.setattr(module, "capturing", made.capturing)
    for name, stands_in in {
        "CUDAGraph": made.graph,
        "graph_pool_handle": lambda: "pool",
        "current_stream": lambda device: stream,
        "stream": lambda stream: nullcontext(),
        "set_device": lambda device: None,
        "mem_get_info": lambda device: (made.free, 0),
        "memory_reserved": lambda device: 0,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stands_in)
    return made


def capture(pool: GraphPool, warm_up: bool = False) -> None:
    pool.capture(lambda inputs: (), None, (), warm_up)  # type: ignore[arg-type]


def test_the_next_capture_waits_for_no_graph_that_is_made_executable(device: Device) -> None:
    pool = GraphPool(DEVICE)
    device.open.clear()
    for _ in range(3):
        capture(pool)
    assert device.events == ["capture 0", "capture 1", "capture 2"]
    device.open.set()
    pool.finish()
    assert device.events[3:] == ["executable 0", "executable 1", "executable 2"]
    assert threading.current_thread().name not in device.threads


def test_its_memory_is_what_captures_and_graphs_take(device: Device) -> None:
    pool = GraphPool(DEVICE)
    assert pool.nbytes == 0
    capture(pool)
    capture(pool)
    assert pool.nbytes >= 2 * RECORDED, "told meanwhile, too"
    pool.finish()
    assert pool.nbytes == 2 * (RECORDED + EXECUTABLE)
    device.free -= 5000  # somebody else's
    pool.finish()
    assert pool.nbytes == 2 * (RECORDED + EXECUTABLE)
    capture(pool)
    pool.finish()
    assert pool.nbytes == 3 * (RECORDED + EXECUTABLE)


def test_a_warm_up_is_none_of_its_memory(device: Device) -> None:
    pool = GraphPool(DEVICE)
    capture(pool)

    def forward(inputs: object) -> tuple:
        if "capture 1" not in device.events:
            device.free -= 7000
        return ()

    pool.capture(forward, None, (), warm_up=True)  # type: ignore[arg-type]
    pool.finish()
    assert pool.nbytes == 2 * (RECORDED + EXECUTABLE)


def test_a_graph_that_cannot_be_made_executable_is_told(device: Device) -> None:
    pool = GraphPool(DEVICE)
    device.fails = {0}
    capture(pool)
    capture(pool)
    with pytest.raises(RuntimeError, match="out of memory"):
        pool.finish()
    assert device.events[-1] == "executable 1", "nobody works on when it is told"
    capture(pool)
    pool.finish()
