"""CUDA's libraries past torch: which files it has loaded, and one kind of copy for which it takes the host longer."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

logger = logging.getLogger("vitgraph")

_HOST_TO_DEVICE = 1


def copy_pinned(target: Tensor, source: Tensor, stream: torch.cuda.Stream) -> None:
    """Queues a copy of rows in pinned memory.

    Torch does not learn of it: pinned memory that its allocator gets back before the copy has ended may go to others.

    Args:
        target: contiguous, on the device.
        source: contiguous, in pinned memory, of the same shape and dtype.
        stream: to queue it on.

    Raises:
        RuntimeError: the copy failed, or something before it.
    """
    copy = _find_copy()
    if copy is None:
        with stream:
            target.copy_(source, non_blocking=True)
        return
    status = copy(target.data_ptr(), source.data_ptr(), source.nbytes, _HOST_TO_DEVICE, stream.cuda_stream)
    if status:
        raise RuntimeError(f"rows could not be copied to {target.device}: CUDA error {status}.")


def loaded_file(library: str) -> str:
    """File name of a library of CUDA's. Torch has loaded it, and by this name the loader finds that one."""
    return f"lib{library}.so.{(torch.version.cuda or '').split('.')[0]}"


@cache
def _find_copy() -> Callable[[int, int, int, int, int], int] | None:
    """The runtime's copy; None where the library that torch uses is not found."""
    try:
        # PyDLL keeps the interpreter's lock, which takes longer to get back than the call.
        function = ctypes.PyDLL(loaded_file("cudart")).cudaMemcpyAsync
    except (OSError, AttributeError) as error:
        logger.warning("pinned rows are copied by torch, which takes the host longer: %s", error)
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
    function.restype = ctypes.c_int
    return function  # type: ignore[no-any-return]
