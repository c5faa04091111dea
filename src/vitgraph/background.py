"""Work that begins before anybody needs it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


def in_threads(name: str, *works: Callable[[], Result]) -> tuple[Future[Result], ...]:
    """Each in a thread that ends with it.

    Args:
        name: of the threads.
        works: at least one.
    """
    pool = ThreadPoolExecutor(len(works), name)
    begun = tuple(map(pool.submit, works))
    pool.shutdown(wait=False)
    return begun
