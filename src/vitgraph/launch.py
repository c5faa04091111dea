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
from functools import partial
from typing import Any

import torch

logger = logging.getLogger("vitgraph")

MOST_THREADS = 16


_works: ContextVar[list[Callable[[], object]] | None] = ContextVar("vitgraph_works_while_compiling", default=None)
"""What the `compiling` block that is open has been asked to run; None outside."""


def launch_kernel(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`kernel[grid](*args, **options)`; in a `compiling` block the kernel is compiled and does not run."""
    if only_compiles():
        kernel.warmup(*args, grid=grid, **options)
    else:
        kernel[grid](*args, **options)


def only_compiles() -> bool:
    """Whether launches of this thread compile their kernels instead."""
    return _works.get() is not None


def meanwhile(work: Callable[[], object]) -> None:
    """Has `work` run at the end of the `compiling` block that is open, while threads compile what was launched before.

    It may launch kernels, which are compiled, too. What it raises is logged: who needs it later meets that again.
    """
    works = _works.get()
    assert works is not None, "only while kernels are compiled"
    works.append(work)


@contextmanager
def compiling(device: torch.device) -> Iterator[None]:
    """Kernels that the block launches do not run; when it ends they have been compiled and loaded, in threads. What
    they would have written is as it was.

    A kernel that cannot be compiled or loaded raises where it is launched for the first time after the block.

    Args:
        device: CUDA, with its index; the current one.
    """
    from triton import AsyncCompileMode

    works: list[Callable[[], object]] = []
    threads = min(MOST_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads, "vitgraph-compile") as pool:
        _try(partial(_begin, pool))
        before = _works.set(works)
        try:
            with AsyncCompileMode(_LoadingPool(pool, device), ignore_errors=True):
                yield
                for work in works:
                    _try(work)
        finally:
            _works.reset(before)


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
        kernel: compiled by Triton; None where a hook of Triton's took it.
        device: see `compiling`.
    """
    with torch.cuda.device(device):
        _ = getattr(kernel, "run", None)  # a property, which loads the kernel when it is asked for first
