"""Launches of Triton kernels, which can be compiled before them, several at once.

The first launch of a kernel compiles it, which takes up to a second and a half on one core, and builds what calls it,
which takes a third of a second; a tower has a dozen.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

logger = logging.getLogger("vitgraph")

MOST_THREADS = 16

_wanted: ContextVar[list[Any] | None] = ContextVar("vitgraph_kernels_to_compile", default=None)


def launch_kernel(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`kernel[grid](*args, **options)`; in a `compiling` block the kernel is compiled and does not run."""
    wanted = _wanted.get()
    if wanted is None:
        kernel[grid](*args, **options)
    else:
        wanted.append(kernel.warmup(*args, grid=grid, **options))


def only_compiles() -> bool:
    """Whether launches of this thread compile their kernels instead."""
    return _wanted.get() is not None


@contextmanager
def compiling(device: torch.device) -> Iterator[None]:
    """Kernels that the block launches do not run; when it ends they have been compiled and loaded, in threads. What
    they would have written is as it was.

    A kernel that cannot be compiled or loaded raises where it is launched for the first time after the block.

    Args:
        device: CUDA, with its index; the current one.
    """
    from triton import AsyncCompileMode

    wanted: list[Any] = []
    threads = min(MOST_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads, "vitgraph-compile") as pool:
        before = _wanted.set(wanted)
        try:
            with AsyncCompileMode(pool, ignore_errors=True):
                yield
        finally:
            _wanted.reset(before)
        for kernel in {id(kernel): kernel for kernel in wanted}.values():
            pool.submit(_load, kernel, device)


def _load(kernel: Any, device: torch.device) -> None:
    """Makes what a launch needs.

    Args:
        kernel: compiled by Triton, or its future; None where a hook of Triton's took it.
        device: see `compiling`.
    """
    try:
        with torch.cuda.device(device):
            compiled = kernel.result() if hasattr(kernel, "result") else kernel
            _ = getattr(compiled, "run", None)  # a property, which loads the kernel when it is asked for first
    except Exception as error:  # whatever it is, the launch raises it again
        logger.debug("a kernel could not be loaded beforehand: %s", error)
