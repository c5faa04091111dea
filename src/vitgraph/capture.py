"""The one place that opens a CUDA graph capture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, device: torch.device, pool: Any) -> Iterator[None]:
    """Captures what the block launches on the current stream.

    `torch.cuda.graph` would also collect garbage and empty the cache of the allocator. A capture that fails leaves the
    process as it was.

    Args:
        graph: empty.
        device: with its index.
        pool: from `torch.cuda.graph_pool_handle`.

    Raises:
        RuntimeError: the block did what no graph can hold.
    """
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        yield
    finally:
        try:
            graph.capture_end()
        except RuntimeError:
            # An end that fails leaves the generator and the allocator in the capture. A copy of its state is not.
            generator = torch.cuda.default_generators[device.index]
            generator.graphsafe_set_state(generator.clone_state())
            torch._C._cuda_endAllocateToPool(device.index, pool)
            raise
