"""How packs reach a graph: every graph begins by reading a request, copying the pixel rows and composing the metadata.

So the host launches one graph per pack and nothing else, where the pixel rows lie on the device.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from vitgraph.core import STRETCH_BYTES, Counts, Stretches
from vitgraph.engine.buffers import Arena, MetadataLayout, StaticBuffers
from vitgraph.engine.compose import Composer
from vitgraph.engine.mailbox import NOTHING, Mailbox, Request
from vitgraph.models.contract import TowerSpec

logger = logging.getLogger("vitgraph")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Of pixel rows that a graph copies itself; the first has code 1."""

VECTOR_BYTES, VECTOR = 16, 8
"""A pack's rows begin at a multiple of so many bytes: they are loaded in vectors. So many elements wide, or a multiple,
are rows in several stretches."""

_CODES = {dtype: code for code, dtype in enumerate(DTYPES, start=1)}


class RowSource(NamedTuple):
    """Pixel rows on the device that lie one after another.

    Attributes:
        rows: how many there are.
        dtype: its code.
        address: of the first.
        width: elements of a row.
        row_bytes: the same in bytes.
    """

    rows: int
    dtype: int
    address: int
    width: int
    row_bytes: int

    def request(self, places: bytes, table: bytes) -> Request | None:
        """The request of a pack, if its graph can copy these rows itself.

        Args:
            places: of the pack's items, as in `Request`.
            table: of the pack's `Stretches` of these rows; at least one.
        """
        end, first = Stretches.ENTRY.unpack_from(table, len(table) - STRETCH_BYTES)
        _, dtype, address, width, row_bytes = self
        if len(table) == STRETCH_BYTES:
            address += first * row_bytes
            return None if address % VECTOR_BYTES else Request(places, dtype, address, end * width)
        if address % VECTOR_BYTES or width % VECTOR:
            return None
        return Request(places, dtype, address, end * width, table)


class Intake:
    """The first kernels of every graph of one arena.

    Args:
        composer: of the metadata.
        width: elements of a pixel row.
        device: of the arena.
    """

    def __init__(self, composer: Composer, width: int, device: torch.device) -> None:
        from vitgraph.engine import intake_triton

        self._kernels = intake_triton
        self._index = device.index if device.type == "cuda" else -1
        self.composer, self._width = composer, width
        self.mailbox = Mailbox(composer.most_items, device, partial(_check, device))
        self._likes = [torch.zeros(8, dtype=dtype, device=device) for dtype in DTYPES]
        self._warm = False

    @property
    def nbytes(self) -> int:
        """Device memory that it holds."""
        return self.composer.nbytes + self.mailbox.nbytes + sum(like.nbytes for like in self._likes)

    def launch(self, buffers: StaticBuffers) -> None:
        """Queues what comes before the forward. Each launch takes one request from the mailbox.

        Args:
            buffers: of the budget, which hold whatever the request asks for.
        """
        mailbox = self.mailbox
        self._kernels.fetch(mailbox.ring, mailbox.next, mailbox.request, mailbox.first_stretch)
        self._kernels.copy_pixels(mailbox.request, mailbox.first_stretch, self._likes, buffers.inputs.pixel_values)
        self.composer.launch(mailbox.request, (mailbox.next, mailbox.copied), buffers.layout)

    def warm_up(self, buffers: StaticBuffers) -> None:
        """Compiles the kernels, which no capture can do.

        Args:
            buffers: of any budget; they stay as they are.
        """
        if not self._warm:
            self.mailbox.post(NOTHING)
            self.launch(buffers)
            self._warm = True

    def source(self, rows: Tensor) -> RowSource | None:
        """Pixel rows as requests name them, if they are such.

        Args:
            rows: of any shape and dtype, on any device.
        """
        code, shape, width = _CODES.get(rows.dtype), rows.shape, self._width
        if code is None or rows.get_device() != self._index or not rows.is_contiguous():
            return None
        if len(shape) != 2 or shape[1] != width:
            return None
        return RowSource(shape[0], code, rows.data_ptr(), width, width * rows.element_size())


def _check(device: torch.device) -> None:
    """Raises where the device failed: whoever waits for it must hear of it."""
    torch.cuda.current_stream(device).query()


def make_intake(spec: TowerSpec, layouts: Sequence[MetadataLayout], capacity: Counts, arena: Arena) -> Intake | None:
    """An intake where it is of use: on CUDA, with Triton, for a tower that has metadata.

    Args:
        spec: of the tower.
        layouts: of all budgets, ascending.
        capacity: of the largest budget.
        arena: of the graphs.
    """
    if arena.device.type != "cuda" or not spec.buffers:
        return None
    if find_spec("triton") is None:
        logger.warning("metadata is written on the host for every new combination of sizes: Triton is not installed")
        return None
    return Intake(Composer(spec, layouts, tuple(capacity), arena.block), spec.patch_width, arena.device)
