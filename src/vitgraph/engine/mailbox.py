"""Requests for graphs: the host writes them into pinned memory, and every replay begins by reading the next one.

No call of the driver goes with a request, and no event guards its memory: the device counts what it has read, where the
host can see the count.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch

ENTRIES = 256
HEAD = 6
"""Words before the places: how many places, the code of the pixel rows' dtype, their address, how many elements."""

WORD = 4
PAUSE_SECONDS = 20e-6


class Request(NamedTuple):
    """What a replay does before the forward.

    Attributes:
        places: per item of the pack where its part lies (see `Composer`); empty: the metadata stays as it is.
        dtype: code of the pixel rows' dtype, see `intake`; 0: the static pixel rows stay as they are.
        address: of the pixel rows on the device, which lie one after another.
        elements: of all pixel rows.
    """

    places: Sequence[int] = ()
    dtype: int = 0
    address: int = 0
    elements: int = 0


NOTHING = Request()
"""The forward alone, on what lies in the static buffers."""


class Mailbox:
    """A ring of requests.

    Args:
        most_places: of a request.
        device: that reads them.
        check: called while the ring is full; raises where the device will read no more.

    Attributes:
        ring: `[ENTRIES, words]` int32, pinned for CUDA.
        read: `[1]` int64, pinned for CUDA: requests that the device has read.
        next: `[1]` int64 on the device: the request that it reads next.
        request: `[words]` int32 on the device: the request that was read last.
    """

    def __init__(self, most_places: int, device: torch.device, check: Callable[[], object]) -> None:
        pinned = device.type == "cuda"
        words = -(-(HEAD + most_places) // 4) * 4
        self.ring = torch.zeros(ENTRIES, words, dtype=torch.int32, pin_memory=pinned)
        self.read = torch.zeros(1, dtype=torch.int64, pin_memory=pinned)
        self.next = torch.zeros(1, dtype=torch.int64, device=device)
        self.request = torch.zeros(words, dtype=torch.int32, device=device)
        self._bytes, self._entry = self.ring.numpy().data.cast("B"), words * WORD
        self._count = self.read.numpy().data
        self._check = check
        self._posted = self._seen = 0

    @property
    def nbytes(self) -> int:
        """Device memory that it holds."""
        return self.next.nbytes + self.request.nbytes

    def post(self, request: Request) -> None:
        """Leaves the request for the replay that is launched next; waits while the ring is full.

        Args:
            request: its places are at most `most_places`.
        """
        # One entry less than there are: the one that was counted last may still be being read.
        if self._posted - self._seen >= ENTRIES - 1:
            self._wait()
        places = request.places
        items = len(places)
        _layout(items).pack_into(
            self._bytes, self._posted % ENTRIES * self._entry,
            items, request.dtype, request.address, request.elements, *places,
        )  # fmt: skip
        self._posted += 1

    def withdraw(self) -> None:
        """Takes the last request back: its replay was not launched."""
        self._posted -= 1

    def _wait(self) -> None:
        self._seen = self._count[0]
        while self._posted - self._seen >= ENTRIES - 1:
            self._check()
            time.sleep(PAUSE_SECONDS)
            self._seen = self._count[0]


@cache
def _layout(places: int) -> struct.Struct:
    return struct.Struct(f"=2i2q{places}i")
