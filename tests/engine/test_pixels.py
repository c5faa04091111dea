"""Rows of several pieces on their way to the device: one run per stretch of memory, each in its place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vitgraph.engine.pixels import copy_rows, land_rows

WIDTH = 4


class Slot:
    """Stands for a staging slot: copies at once, and notes how many rows came in a run."""

    def __init__(self, rows: int) -> None:
        self.landing = torch.full((rows, WIDTH), -1.0)
        self.runs: list[int] = []

    def send(self, runs: list[tuple[int, Tensor]], stream: object = None) -> Tensor:
        for row, run in runs:
            self.runs.append(len(run))
            self.landing[row : row + len(run)] = run
        return self.landing


def pieces_of(x: Tensor) -> list[Tensor]:
    """Two that follow each other in memory, one from elsewhere, and one that lies before the first."""
    return [x[2:5], x[5:6], torch.full((2, WIDTH), 7.0), x[0:2]]


def test_pieces_land_one_after_another_in_as_few_runs_as_their_memory_allows() -> None:
    pieces, slot = pieces_of(torch.randn(6, WIDTH)), Slot(11)
    landing, filled = land_rows(pieces, slot, None)  # type: ignore[arg-type]
    assert torch.equal(landing[:filled], torch.cat(pieces))
    assert slot.runs == [4, 2, 2]
    assert (slot.landing[8:] == -1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_pieces_on_the_device_are_copied_in_place_and_cast(dtype: torch.dtype) -> None:
    pieces = [piece.to(dtype) for piece in pieces_of(torch.randn(6, WIDTH))]
    target = torch.full((11, WIDTH), -1.0)
    copy_rows(target, pieces, None)
    assert torch.equal(target[:8], torch.cat(pieces).float())
    assert (target[8:] == -1).all()
