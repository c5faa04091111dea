"""Pixel rows into the static buffer, in one copy per run of adjacent pieces."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from vitgraph.core import Pack
from vitgraph.engine.slots import StagingSlot

PieceRows = Tensor
"""`[P_i, patch_width]` rows of one piece, or of several that follow each other, a view of the caller's memory."""

BatchRows = Tensor | Sequence[Tensor]
"""`[P, patch_width]` rows of all items of a batch one after another, or per item `[P_i, patch_width]`."""


def pixels_of(pack: Pack, rows: BatchRows) -> list[PieceRows]:
    """Rows of the pack's pieces, in row order.

    Args:
        pack: whose pieces are meant.
        rows: of its batch.
    """
    if isinstance(rows, Tensor):
        return [rows if count == rows.shape[0] else rows.narrow(0, first, count) for first, count in pack.stretches]
    found = []
    for piece in pack.pieces:
        own, count = rows[piece.item], piece.grid.patches
        found.append(own if own.shape[0] == count else own[piece.first_row : piece.first_row + count])
    return found


def copy_rows(
    target: Tensor, pieces: Sequence[PieceRows], slot: StagingSlot | None, stream: torch.cuda.Stream | None = None
) -> None:
    """Copies pieces one after another into the first rows of `target`, casting to its dtype.

    Rows on the target's device are copied directly, adjacent pieces in one copy. Host rows go through the slot to rows
    of its own on the device, on a stream of their own, so that the transfer overlaps the replay before, and then in
    stream order into `target`.

    Args:
        target: `[P, patch_width]` on the device.
        pieces: in row order; together at most P rows.
        slot: has room for them, in the target's dtype; None when no piece is on the host. Its `return_rows` must be
            called before the caller gets control back.
        stream: the current stream on CUDA, or None to look it up.
    """
    from_host: list[tuple[int, Tensor]] = []
    for row, run in _runs(pieces):
        if run.device == target.device:
            target.narrow(0, row, run.shape[0]).copy_(run, non_blocking=True)
        else:
            from_host.append((row, run))
    if from_host:
        assert slot is not None, "rows on the host need a staging slot"
        landing = slot.send(from_host, stream)
        for row, run in from_host:
            rows = slice(row, row + run.shape[0])
            target[rows].copy_(landing[rows], non_blocking=True)


def land_rows(pieces: Sequence[PieceRows], slot: StagingSlot, stream: torch.cuda.Stream | None) -> tuple[Tensor, int]:
    """Sends pieces to the device, none of which lie there.

    Args:
        pieces: in row order; at least one.
        slot, stream: see `copy_rows`.

    Returns:
        Rows on the device that begin with the pieces, one after another, and how many rows these are.
    """
    runs = _runs(pieces)
    row, last = runs[-1]
    return slot.send(runs, stream), row + last.shape[0]


def _runs(pieces: Sequence[PieceRows]) -> list[tuple[int, Tensor]]:
    """Adjacent pieces as one, and the row that each such run begins at."""
    if len(pieces) < 2:
        return [(0, piece) for piece in pieces]
    runs = _adjacent(pieces)
    return list(zip(accumulate((run.shape[0] for run in runs), initial=0), runs, strict=False))


def _adjacent(pieces: Sequence[PieceRows]) -> list[Tensor]:
    """Merges pieces that follow each other in the same storage, so that a batch in the caller's order is one copy.

    Args:
        pieces: at least one.
    """
    runs: list[Tensor] = []
    first, rows, end = pieces[0], len(pieces[0]), _end(pieces[0])
    for piece in pieces[1:]:
        if end and piece.data_ptr() == end and _same_memory(first, piece):
            rows += piece.shape[0]
            end += piece.nbytes
            continue
        runs.append(_extended(first, rows))
        first, rows, end = piece, piece.shape[0], _end(piece)
    runs.append(_extended(first, rows))
    return runs


def _end(piece: Tensor) -> int:
    """Address after the piece, or 0 when its rows do not lie one after another."""
    return piece.data_ptr() + piece.nbytes if piece.is_contiguous() else 0


def _same_memory(first: Tensor, piece: Tensor) -> bool:
    # Neighbouring addresses may still belong to two allocations.
    same_storage = first.untyped_storage().data_ptr() == piece.untyped_storage().data_ptr()
    return same_storage and first.dtype == piece.dtype and piece.is_contiguous()


def _extended(first: Tensor, rows: int) -> Tensor:
    if rows == first.shape[0]:
        return first
    return first.as_strided((rows, first.shape[1]), first.stride(), first.storage_offset())
