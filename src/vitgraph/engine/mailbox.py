"""Requests for graphs: the host writes them into pinned memory, and every replay begins by reading the next one.

No call of the driver goes with a request, and no event guards its memory: the device counts what it has read, where the
host can see the count.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import torch

from vitgraph.core import STRETCH_BYTES

ENTRIES = 256
WORD = 4
_HEAD = struct.Struct("=2i2q2i")
HEAD = _HEAD.size // WORD
STRETCHES = HEAD - 2
"""Words before the places: how many of these, the code of the pixel rows' dtype, their address, how many elements, in
word STRETCHES how many stretches, and one that is empty."""

STRETCH_WORDS = STRETCH_BYTES // WORD

PAUSE_SECONDS, MOST_SECONDS = 20e-6, 10.0
SPINS = 500
"""Looks at the count before the first pause: rows are copied in less time than the shortest pause takes."""


class Request(NamedTuple):
    """What a replay does before the forward.

    Attributes:
        places: per item of the pack where its part lies (see `Composer`), int32; empty: the metadata stays as it is.
        dtype: code of the pixel rows' dtype, see `intake`; 0: the static pixel rows stay as they are.
        address: of the pixel rows on the device, which lie one after another.
        elements: of all pixel rows.
        stretches: where they do not lie one after another: `table` of their `Stretches`.
    """

    places: bytes = b""
    dtype: int = 0
    address: int = 0
    elements: int = 0
    stretches: bytes = b""


NOTHING = Request()
"""The forward alone, on what lies in the static buffers."""


class Mailbox:
    """A ring of requests.

    Args:
        most_places: of a request, and most stretches.
        device: that reads them.
        check: called while the ring is full; raises where the device will read no more.

    Attributes:
        ring: `[ENTRIES, words]` int32, pinned for CUDA.
        copied: `[1]` int64, pinned for CUDA: requests that the device has read, and whose pixel rows it has copied.
        next: `[1]` int64 on the device: the request that it reads next.
        request: `[words]` int32 on the device: the request that was read last.
        posted: requests so far.
        first_stretch: the word of a request where its stretches begin, behind room for all places.
    """

    def __init__(self, most_places: int, device: torch.device, check: Callable[[], object]) -> None:
        pinned = device.type == "cuda"
        self.first_stretch = HEAD + most_places
        words = -(-(self.first_stretch + STRETCH_WORDS * most_places) // 4) * 4
        self.ring = torch.zeros(ENTRIES, words, dtype=torch.int32, pin_memory=pinned)
        self.copied = torch.zeros(1, dtype=torch.int64, pin_memory=pinned)
        self.next = torch.zeros(1, dtype=torch.int64, device=device)
        self.request = torch.zeros(words, dtype=torch.int32, device=device)
        self._bytes, self._entry = self.ring.numpy().data.cast("B"), words * WORD
        self._copied = self.copied.numpy().data
        self._check = check
        self.posted = self._seen = 0

    def __del__(self) -> None:
        # Pinned memory goes to others at once, and replays that were launched still read it and write counts there.
        with suppress(Exception):
            end = time.monotonic() + MOST_SECONDS
            while self._copied[0] < self.posted and time.monotonic() < end:
                self._pause()

    @property
    def nbytes(self) -> int:
        """Device memory that it holds."""
        return self.next.nbytes + self.request.nbytes

    def post(self, request: Request) -> None:
        """Leaves the request for the replay that is launched next; waits while the ring is full.

        Args:
            request: of at most `most_places` places and stretches.
        """
        # The count is looked at when it must be: what the device wrote has left the host's caches.
        while self.posted - self._seen >= ENTRIES and self.posted - self._look() >= ENTRIES:
            self._pause()
        places, dtype, address, elements, stretches = request
        entry = self.posted % ENTRIES * self._entry
        count = len(stretches) // STRETCH_BYTES
        _HEAD.pack_into(self._bytes, entry, len(places) // WORD, dtype, address, elements, count, 0)
        if count:
            at = entry + self.first_stretch * WORD
            self._bytes[at : at + len(stretches)] = stretches
        entry += _HEAD.size
        self._bytes[entry : entry + len(places)] = places
        self.posted += 1

    def withdraw(self) -> None:
        """Takes the last request back: its replay was not launched."""
        self.posted -= 1

    def wait_until_copied(self, number: int) -> None:
        """Until the pixel rows of the first `number` requests have been copied: their memory may be written again."""
        for _ in range(SPINS):
            if self._copied[0] >= number:
                return
        while self._copied[0] < number:
            self._pause()

    def _look(self) -> int:
        """Requests that the device has read."""
        self._seen = int(self._copied[0])
        return self._seen

    def _pause(self) -> None:
        self._check()
        time.sleep(PAUSE_SECONDS)
