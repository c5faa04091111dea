"""The order of runs on the device: one after another, whatever streams their callers use."""

from __future__ import annotations

import torch

_raw_handle = getattr(torch._C, "_cuda_getCurrentRawStream", None)


class RunOrder:
    """Lets each run wait for the one before it: static buffers are shared.

    Args:
        device: on the CPU there is nothing to order.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_device = device.type == "cuda"
        self._done: torch.cuda.Event | None = None
        self._stream: torch.cuda.Stream | None = None
        self._handle: int | None = None

    def enter(self) -> torch.cuda.Stream | None:
        """The current stream, which waits for the run before if that used another one; None on the CPU."""
        if not self._on_device:
            return None
        # Making a Stream object takes longer than the rest of this.
        handle = current_handle(self._device)
        if handle != self._handle:
            self._stream, self._handle = torch.cuda.current_stream(self._device), handle
            if self._done is not None:
                self._stream.wait_event(self._done)
        return self._stream

    def leave(self, stream: torch.cuda.Stream | None) -> None:
        """Notes the end of a run.

        Args:
            stream: from `enter`.
        """
        if stream is not None:
            self._done = self._done or torch.cuda.Event()
            self._done.record(stream)

    def synchronize(self) -> None:
        """Until the last run is done."""
        if self._done is not None:
            self._done.synchronize()


def current_handle(device: torch.device) -> int:
    """Handle of the current stream of a CUDA device."""
    if _raw_handle is not None:
        return int(_raw_handle(device.index))
    return int(torch.cuda.current_stream(device).cuda_stream)
