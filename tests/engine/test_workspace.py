"""The size of cuBLASLt's workspace is zero inside a block, and what it was before afterwards."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from threading import Barrier, Thread

import pytest
import torch

from vitgraph import workspace

SIZES = {"function": 4096 * 1024, "variable": "4096"}
Read = Callable[[], object]


@pytest.fixture(params=sorted(SIZES))
def read(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Read]:
    """Reads the size, set by torch's function or by the environment variable of older releases."""
    if request.param == "function":
        sizes = [SIZES["function"]]

        def size(new: int | None = None) -> int:
            sizes.append(sizes[-1] if new is None else new)
            return int(sizes[-1])

        monkeypatch.setattr(torch.backends.cuda, "cublaslt_workspace_size", size, raising=False)
        yield size
    else:
        monkeypatch.delattr(torch.backends.cuda, "cublaslt_workspace_size", raising=False)
        monkeypatch.setenv(workspace.VARIABLE, str(SIZES["variable"]))
        yield lambda: os.environ[workspace.VARIABLE]


def test_the_size_is_zero_while_anybody_asks(read: Read) -> None:
    before = read()
    size = workspace._Size()
    size.ask()
    size.ask()
    assert int(str(read())) == 0
    size.stop_asking()
    assert int(str(read())) == 0, "another one still asks"
    size.stop_asking()
    assert read() == before


def test_threads_that_overlap_leave_the_size_as_it_was(read: Read) -> None:
    before, size, inside = read(), workspace._Size(), Barrier(8)

    def ask() -> None:
        for _ in range(50):
            size.ask()
            inside.wait()
            size.stop_asking()

    threads = [Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read() == before


def test_an_unset_variable_becomes_the_default_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.backends.cuda, "cublaslt_workspace_size", raising=False)
    monkeypatch.setenv(workspace.VARIABLE, "1")
    monkeypatch.delenv(workspace.VARIABLE)
    size = workspace._Size()
    size.ask()
    size.stop_asking()
    assert os.environ[workspace.VARIABLE] == workspace.DEFAULT_KIB


def test_the_cpu_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "_replace", lambda size: pytest.fail("nothing to set"))
    with workspace.without_workspace(torch.device("cpu")):
        pass


def test_a_failure_inside_restores_the_size(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    before = read()
    with pytest.raises(ValueError, match="inside"), workspace.without_workspace(torch.device("cuda")):
        assert int(str(read())) == 0
        raise ValueError("inside")
    assert read() == before
