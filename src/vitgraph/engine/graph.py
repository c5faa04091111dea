"""Graphs of a tower's forward, in one memory pool."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from vitgraph.capture import capturing
from vitgraph.engine.mailbox import NOTHING, Mailbox, Request
from vitgraph.models.contract import TowerBuffers

Forward = Callable[[TowerBuffers], Sequence[Tensor]]


@dataclass(frozen=True)
class CapturedGraph:
    """A captured forward.

    Attributes:
        graph: to replay.
        outputs: each `[levels, rows, width]`, the static outputs; the next replay of any graph of the pool overwrites
            them.
        seconds: wall time of warm-up and capture.
        mailbox: whose next request a replay reads; None: graphs read no requests.
    """

    graph: torch.cuda.CUDAGraph
    outputs: tuple[Tensor, ...]
    seconds: float
    mailbox: Mailbox | None = None

    def replay(self, request: Request = NOTHING) -> tuple[Tensor, ...]:
        """Launches the graph.

        Args:
            request: what it does before the forward, where it reads requests.
        """
        mailbox = self.mailbox
        if mailbox is None:
            self.graph.replay()
            return self.outputs
        mailbox.post(request)
        try:
            self.graph.replay()
        except BaseException:
            mailbox.withdraw()
            raise
        return self.outputs


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream per device: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)


class GraphPool:
    """Graphs that share one memory pool. Replays must not overlap: they share buffers and outputs.

    What a capture recorded is made executable in a thread, while the next forward is captured.

    Args:
        device: CUDA device.
        mailbox: whose requests the graphs read, if they do.
    """

    def __init__(self, device: torch.device, mailbox: Mailbox | None = None) -> None:
        self._device, self._mailbox = device, mailbox
        self._stream = _capture_stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._settled, self._before = 0, (0, 0)
        self._thread: ThreadPoolExecutor | None = None
        self._pending: list[Future[None]] = []

    @property
    def nbytes(self) -> int:
        """Device memory that the captures added."""
        return self._settled + (self._grown() if self._thread else 0)

    def capture(
        self,
        forward: Forward,
        inputs: TowerBuffers,
        outputs: tuple[Tensor, ...],
        warm_up: bool = True,
        begin: Callable[[], None] | None = None,
    ) -> CapturedGraph:
        """Captures a forward and the copy of its results into `outputs`. The buffers must hold a valid pack.

        The forward's own results are dropped, so that the next capture can use their memory. The graph may be replayed
        after `finish`.

        Args:
            forward: host code that launches the same kernels at every call.
            inputs: static buffers.
            outputs: static, each `[levels, rows, width]`.
            warm_up: run `forward` once before. Needed where kernels have yet to be compiled or chosen.
            begin: launches what comes before the forward: it reads a request of the mailbox.
        """
        start = time.perf_counter()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.stream(self._stream):
            if warm_up:
                self.finish()
                forward(inputs)
            self._stream.synchronize()
            self._thread = self._thread or self._begin()
            with capturing(graph, self._device, self._pool):
                if begin is not None:
                    begin()
                copy_outputs(outputs, forward(inputs))
        self._pending.append(self._thread.submit(graph.instantiate))
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return CapturedGraph(graph, outputs, time.perf_counter() - start, self._mailbox)

    def finish(self) -> None:
        """Waits until all graphs can be replayed.

        Raises:
            RuntimeError: one cannot, for instance for lack of memory.
        """
        if self._thread is None:
            return
        self._thread.shutdown()
        self._settled, self._thread = self.nbytes, None
        pending, self._pending = self._pending, []
        for done in pending:
            done.result()

    def _begin(self) -> ThreadPoolExecutor:
        self._before = self._memory()
        return ThreadPoolExecutor(1, "vitgraph-instantiate", partial(torch.cuda.set_device, self._device))

    def _grown(self) -> int:
        # Other processes move what is free, and the allocator does not see what the driver takes for a graph.
        free, reserved = self._memory()
        return max(self._before[0] - free, reserved - self._before[1], 0)

    def _memory(self) -> tuple[int, int]:
        """Bytes of the device that are free, and that torch's allocator holds."""
        return torch.cuda.mem_get_info(self._device)[0], torch.cuda.memory_reserved(self._device)


def copy_outputs(static: tuple[Tensor, ...], results: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Copies a forward's results into the static outputs, except those that it wrote there, and returns those."""
    for target, result in zip(static, results, strict=True):
        if result.data_ptr() != target.data_ptr():
            target.copy_(result)
    return static
