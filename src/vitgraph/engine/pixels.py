"""Copying pixel rows into the static buffer: few copies, none of them from pageable memory."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

PieceRows = Tensor
"""`[P_i, patch_width]` rows of one piece, a view of the caller's memory."""


def copy_rows(target: Tensor, pieces: Sequence[PieceRows], staging: Tensor) -> None:
    """Copies pieces one after another into the first rows of `target`, casting to its dtype.

    Rows on the target's device are copied directly, adjacent pieces in one copy. Host rows are cast into the pinned
    `staging` rows first and then sent in one asynchronous copy per run of host pieces.

    Args:
        target: `[P, patch_width]` on the device.
        pieces: in row order; together at most P rows.
        staging: `[>= P, patch_width]` on the host, pinned for CUDA, in the target's dtype.
    """
    row = 0
    for run in _adjacent(pieces):
        rows = len(run)
        if run.device == target.device:
            target[row : row + rows].copy_(run, non_blocking=True)
        else:
            staging[row : row + rows].copy_(run)
            target[row : row + rows].copy_(staging[row : row + rows], non_blocking=True)
        row += rows


def _adjacent(pieces: Sequence[PieceRows]) -> list[Tensor]:
    """Merges pieces that follow each other in the same storage."""
    runs: list[Tensor] = []
    for piece in pieces:
        last = runs[-1] if runs else None
        if last is not None and _follows(last, piece):
            runs[-1] = last.as_strided((len(last) + len(piece), piece.shape[1]), last.stride(), last.storage_offset())
        else:
            runs.append(piece)
    return runs


def _follows(last: Tensor, piece: Tensor) -> bool:
    return (
        last.device == piece.device
        and last.dtype == piece.dtype
        and last.is_contiguous()
        and piece.is_contiguous()
        and last.untyped_storage().data_ptr() == piece.untyped_storage().data_ptr()
        and last.storage_offset() + last.numel() == piece.storage_offset()
    )
