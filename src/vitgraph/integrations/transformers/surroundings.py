"""What a module's forward finds around it while it is captured: the same as outside of a capture."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from vitgraph.integrations.transformers.host_reads import is_our_own_code

FACTORIES = {
    torch.arange,
    torch.empty,
    torch.eye,
    torch.full,
    torch.linspace,
    torch.logspace,
    torch.ones,
    torch.tril_indices,
    torch.triu_indices,
    torch.zeros,
}
"""What makes tensors without a value of the host: on the device it takes no copy."""

ASKED = "is_cuda_stream_capturing"
_patching = threading.RLock()


def is_capturing() -> bool:
    """Whether this thread captures a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@contextmanager
def unnoticed_capture() -> Iterator[None]:
    """Within it, Transformers does not notice that this thread captures a CUDA graph.

    It would take other ways: masks that say nothing are made and passed, which keeps attention from its fastest
    kernels, and position tables are resampled to the size that they have. The graph then holds another forward than
    the one that was checked.
    """
    if not is_capturing():
        yield
        return
    from transformers.utils import import_utils

    with _patching:
        original, thread = getattr(import_utils, ASKED, None), threading.get_ident()
        if original is None:
            yield
            return
        setattr(import_utils, ASKED, lambda: threading.get_ident() != thread and original())
        try:
            yield
        finally:
            setattr(import_utils, ASKED, original)


@contextmanager
def made_on(device: torch.device) -> Iterator[None]:
    """Within it, `torch.arange` and the like make their tensors on this device unless told otherwise.

    Those on the host would be copied at every use, which no graph can hold.
    """
    if device.type == "cpu":
        yield
        return
    with _MadeOn(device):
        yield


class _MadeOn(TorchFunctionMode):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        free = kwargs.get("device") is None and kwargs.get("out") is None and not kwargs.get("pin_memory")
        if free and func in FACTORIES and not is_our_own_code():
            kwargs = {**kwargs, "device": self._device}
        return func(*args, **kwargs)
