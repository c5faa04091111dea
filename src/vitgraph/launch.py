"""Launches of Triton kernels, which can be compiled before them, several at once.

The first launch of a kernel compiles it, which takes up to a second and a half on one core, and builds what calls it,
which takes a third of a second; a tower has a dozen.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch

from vitgraph.background import in_threads

logger = logging.getLogger("vitgraph")

MOST_THREADS = 16

POINTER_ALIGNMENT = 16
"""Bytes: Triton compiles a kernel of its own for pointers that are no multiple of it."""


@cache
def begin() -> tuple[Future[object], ...]:
    """Has threads do what the first kernel of a process waits for: Triton hashes itself, and builds its driver. Called
    early, while a checkpoint is read, it is done when kernels are compiled."""
    import triton.runtime  # noqa: F401 - here, as threads that import at once wait for each other

    return in_threads("vitgraph-triton", _hash_triton, _build_driver)


def _hash_triton() -> object:
    from triton.runtime import cache as triton_cache

    return triton_cache.triton_key()


def _build_driver() -> object:
    from triton.runtime import driver

    return driver.active


@dataclass
class _Block:
    """What a `compiling` block has been asked for: forms of kernels, and what else to run."""

    forms: set[Hashable] = field(default_factory=set)
    works: list[Callable[[], object]] = field(default_factory=list)


_block: ContextVar[_Block | None] = ContextVar("vitgraph_kernels_to_compile", default=None)


def launch_kernel(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`kernel[grid](*args, **options)`; in a `compiling` block the kernel is compiled and does not run."""
    block = _block.get()
    if block is None:
        kernel[grid](*args, **options)
        return
    # Asking Triton for a kernel that a thread compiles takes longer than a launch; the blocks of a tower ask in turn.
    form = (id(kernel), *map(_form, args), *((name, _form(value)) for name, value in options.items()))
    if form not in block.forms:
        block.forms.add(form)
        kernel.warmup(*args, grid=grid, **options)


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
        for begun in begin():
            _try(begun.result)
        before = _block.set(block)
        try:
            with AsyncCompileMode(_LoadingPool(pool, device), ignore_errors=True):
                yield
                for work in block.works:
                    _try(work)
        finally:
            _block.reset(before)


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


def _form(argument: Any) -> Hashable:
    """Of an argument, at least what Triton compiles another kernel for."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % POINTER_ALIGNMENT == 0
    if hasattr(argument, "block_shape"):  # a tensor descriptor
        return _form(argument.base), tuple(argument.shape), tuple(argument.strides), tuple(argument.block_shape)
    return type(argument), argument


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
