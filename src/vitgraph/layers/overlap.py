"""Side branches of a tower on a second stream, so that small GEMMs run beside the blocks."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

MOST_ROWS = 2048
"""Above this many rows a branch fills the GPU by itself."""


class SideBranches:
    """Runs modules beside the current stream; their results may be read after `join`.

    Works eagerly and under capture. Small inputs on CUDA only; otherwise a branch runs in line.

    Args:
        device: of the tower.
        rows: rows of the branches' inputs.
    """

    def __init__(self, device: torch.device, rows: int) -> None:
        self._stream = _side_stream(device) if device.type == "cuda" and rows <= MOST_ROWS else None
        self._inputs: list[Tensor] = []

    def run(self, module: nn.Module, x: Tensor, out: Tensor) -> None:
        """`module(x, out)`, started once everything before it is done."""
        if self._stream is None:
            module(x, out)
            return
        # Until the join, the main stream must not reuse the memory that the branch reads.
        self._inputs.append(x)
        self._stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(self._stream):
            module(x, out)

    def join(self) -> None:
        """Makes the current stream wait for every branch."""
        if self._stream is not None and self._inputs:
            torch.cuda.current_stream(self._inputs[0].device).wait_stream(self._stream)
            self._inputs.clear()


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
