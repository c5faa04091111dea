"""Finished metadata blocks that stay on the device, for packs that come again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

import torch
from torch import Tensor

MOST_BYTES = 64 << 20
MOST_NOTED = 8192


class BlockCache:
    """Least-recently-used blocks by what they describe. A pack's block is kept when the pack comes for the second time.

    A kept block replaces writing on the host and a transfer by one copy on the device.

    Args:
        most_bytes: device memory of all kept blocks.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._blocks: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._noted: OrderedDict[Hashable, None] = OrderedDict()
        self.nbytes = 0

    def find(self, key: Hashable) -> Tensor | None:
        """The kept block, uint8 on the device; None when there is none."""
        block = self._blocks.get(key)
        if block is not None:
            self._blocks.move_to_end(key)
        return block

    def offer(self, key: Hashable, block: Tensor) -> None:
        """Keeps a copy of `block` if the key was offered before; the least recently used ones make room."""
        if key not in self._noted:
            self._noted[key] = None
            if len(self._noted) > MOST_NOTED:
                self._noted.popitem(last=False)
            return
        if block.nbytes > self._most_bytes:
            return
        while self._blocks and self.nbytes + block.nbytes > self._most_bytes:
            self.nbytes -= self._blocks.popitem(last=False)[1].nbytes
        self._blocks[key] = block.clone()
        self.nbytes += block.nbytes

    def clear(self) -> None:
        self._blocks.clear()
        self._noted.clear()
        self.nbytes = 0


def copy_block(target: Tensor, kept: Tensor, stream: torch.cuda.Stream | None) -> None:
    """Copies a kept block into the static one, which may be longer.

    Args:
        target: static block.
        kept: from `BlockCache.find`.
        stream: the current stream on CUDA.
    """
    target[: kept.shape[0]].copy_(kept, non_blocking=True)
    if stream is not None:
        # The cache may drop it before this stream has read it, and another stream may have made it.
        kept.record_stream(stream)
