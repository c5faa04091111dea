"""Launches of Triton kernels, which can be compiled before them, several at once.

The first launch of a kernel compiles it, which takes up to a second and a half on one core, and builds what calls it,
which takes a third of a second; a tower has a dozen.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

logger = logging.getLogger("vitgraph")

MOST_THREADS = 16


@dataclass
class _Block:
    """What a `compiling` block has been asked for."""

    kernels: list[Any] = field(default_factory=list)
    works: list[Callable[[], object]] = field(default_factory=list)


_block: ContextVar[_Block | None] = ContextVar("vitgraph_kernels_to_compile", default=None)


def launch_kernel(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`kernel[grid](*args, **options)`; in a `compiling` block the kernel is compiled and does not run."""
    block = _block.get()
    if block is None:
        kernel[grid](*args, **options)
    else:
        block.kernels.append(kernel.warmup(*args, grid=grid, **options))


def only_compiles() -> bool:
    """Whether launches of this thread compile their kernels instead."""
    return _block.get() is not None


def meanwhile(work: Callable[[], object]) -> None:
    """Has `work` run at the end of the `compiling` block that is open, while threads compile what was launched before.

    It may launch kernels, which are compiled, too. What it raises is logged: who needs it later meets that again.
    """
    block = _block.get()
    assert block is not None, "only while kernels are compiled"
    block.works.append(work)


@contextmanager
def compiling(device: torch.device) -> Iterator[None]:
    """Kernels that the block launches do not run; when it ends they have been compiled and loaded, in threads. What
    they would have written is as it was.

    A kernel that cannot be compiled or loaded raises where it is launched for the first time after the block.

    Args:
        device: CUDA, with its index; the current one.
    """
    from triton import AsyncCompileMode

    block = _Block()
    threads = min(MOST_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads, "vitgraph-compile") as pool:
        _try(partial(_begin, pool))
        before = _block.set(block)
        try:
            with AsyncCompileMode(_LoadingPool(pool, device), ignore_errors=True):
                yield
                for work in block.works:
                    _try(work)
        finally:
            _block.reset(before)
        # Those that had been compiled before the block.
        for kernel in {id(kernel): kernel for kernel in block.kernels}.values():
            pool.submit(_try, partial(_load, kernel, device))


def _begin(pool: ThreadPoolExecutor) -> None:
    """Both of what the first kernel would do before its compilation: Triton hashes itself, and builds its driver."""
    from triton.runtime import cache, driver

    hashed = pool.submit(cache.triton_key)
    driver.active.get_current_device()
    hashed.result()


class _LoadingPool(Executor):
    """Compiles in a pool's threads, each of which loads what it compiled."""

    def __init__(self, pool: ThreadPoolExecutor, device: torch.device) -> None:
        self._pool, self._device = pool, device

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return self._pool.submit(self._compile, fn, *args, **kwargs)

    def _compile(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        kernel = fn(*args, **kwargs)
        _try(partial(_load, kernel, self._device))
        return kernel


def _try(work: Callable[[], object]) -> None:
    try:
        work()
    except Exception as error:  # whatever it is, the launch meets it again
        logger.debug("what could be done ahead of a launch failed: %s", error)


def _load(kernel: Any, device: torch.device) -> None:
    """Makes what a launch needs.

    Args:
        kernel: compiled by Triton, or its future; None where a hook of Triton's took it.
        device: see `compiling`.
    """
    with torch.cuda.device(device):
        compiled = kernel.result() if hasattr(kernel, "result") else kernel
        _ = getattr(compiled, "run", None)  # a property, which loads the kernel when it is asked for first
