"""GEMMs without a workspace: launches of a graph that the driver need not break up.

Given a workspace, cuBLASLt takes kernels that count their tiles in it from about 2000 rows on, and clears the counter
before each of them. On an H100, graphs of 512 to 2048 tokens with such clears in each layer take the host 43 to 93 us
to launch instead of 5 to 11, and the GPU up to 1.5 % longer. Without a workspace its kernels need no clearing.
Larger graphs gain less on an idle GPU, where a launch of 4096 tokens still takes more than 100 us.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch

VARIABLE = "CUBLASLT_WORKSPACE_SIZE"
"""Environment variable, KiB; torch 2.11 reads it at every GEMM and has no other way."""

DEFAULT_KIB = "1024"
"""What torch takes where the variable is not set. Once it was set it stays: removing it would move the environment of
threads that read it."""


class _Size:
    """The size of cuBLASLt's workspace, which all threads share: zero while anybody asks for that."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._asking = 0
        self._before: int | str = DEFAULT_KIB

    def ask(self) -> None:
        with self._lock:
            if not self._asking:
                self._before = _replace(0)
            self._asking += 1

    def stop_asking(self) -> None:
        with self._lock:
            self._asking -= 1
            if not self._asking:
                _replace(self._before)


_size = _Size()


def _replace(size: int | str) -> int | str:
    """Sets the size, and returns the one before: bytes where torch has a function for that, else KiB in text."""
    function = getattr(torch.backends.cuda, "cublaslt_workspace_size", None)
    if function is not None:
        before = int(function())
        function(size)
        return before
    text = os.environ.get(VARIABLE, DEFAULT_KIB)
    os.environ[VARIABLE] = str(size)
    return text


@contextmanager
def without_workspace(device: torch.device) -> Iterator[None]:
    """GEMMs that the block launches on a CUDA device get no workspace from cuBLASLt; elsewhere it changes nothing.

    With torch 2.11, a stream whose first GEMM runs in such a block has no workspace ever after: so the current stream
    gets its own first, unless it is captured. A stream that another thread uses for the first time meanwhile takes
    torch's slower path from then on, with torch's warning.
    """
    if device.type != "cuda":
        yield
        return
    if not torch.cuda.is_current_stream_capturing():
        one = torch.zeros(16, 16, dtype=torch.float16, device=device)
        torch.addmm(one[0], one, one)
    _size.ask()
    try:
        yield
    finally:
        _size.stop_asking()
