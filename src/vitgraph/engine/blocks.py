"""Finished metadata blocks that stay on the device, for packs that come again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from torch import Tensor

MOST_BYTES = 64 << 20
MOST_NOTED = 8192


class KeptBlock:
    """One finished block.

    Attributes:
        content: uint8 on the device; None once the cache has dropped it.
        used: whether it was read, without the cache being asked, since the cache last looked for room.
    """

    __slots__ = ("content", "used")

    def __init__(self, content: Tensor) -> None:
        self.content: Tensor | None = content
        self.used = False


class BlockCache:
    """Least-recently-used blocks by what they describe. A pack's block is kept when the pack comes for the second time.

    A kept block replaces writing on the host and a transfer by one copy on the device.

    Args:
        most_bytes: device memory of all kept blocks.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._blocks: OrderedDict[Hashable, tuple[KeptBlock, int]] = OrderedDict()
        self._noted: OrderedDict[Hashable, None] = OrderedDict()
        self.nbytes = 0

    def find(self, key: Hashable) -> KeptBlock | None:
        """The kept block; None when there is none."""
        entry = self._blocks.get(key)
        if entry is None:
            return None
        self._blocks.move_to_end(key)
        return entry[0]

    def offer(self, key: Hashable, block: Tensor) -> KeptBlock | None:
        """Keeps a copy of `block` if the key was offered before; the least recently used ones make room."""
        if key not in self._noted:
            self._noted[key] = None
            if len(self._noted) > MOST_NOTED:
                self._noted.popitem(last=False)
            return None
        if block.nbytes > self._most_bytes:
            return None
        self._make_room(block.nbytes)
        kept = KeptBlock(block.clone())
        self._blocks[key] = kept, block.nbytes
        self.nbytes += block.nbytes
        return kept

    def _make_room(self, nbytes: int) -> None:
        while self._blocks and self.nbytes + nbytes > self._most_bytes:
            key, (kept, freed) = self._blocks.popitem(last=False)
            if kept.used:
                kept.used = False
                self._blocks[key] = kept, freed
                continue
            kept.content = None
            self.nbytes -= freed

    def clear(self) -> None:
        for kept, _ in self._blocks.values():
            kept.content = None
        self._blocks.clear()
        self._noted.clear()
        self.nbytes = 0
