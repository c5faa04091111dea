"""Metadata composed on the device equals what the host writes, for every family and budget.

The kernel runs in Triton's interpreter here, and compiled in tests/gpu.
"""

from __future__ import annotations

import random

import pytest
import torch

from attention_cases import interpreted_loops
from composing import Composing, check
from families import awkward_grids, make
from vitgraph.core import Grid, sum_counts
from vitgraph.models.registry import families

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel is compiled here"),
    interpreted_loops,
]

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes its time per program, not per word."""
    from vitgraph.engine import compose_triton

    monkeypatch.setattr(compose_triton, "BLOCK", 1 << 14)


MUCH = 1 << 20


def composing(family: str, grids: list[Grid], most_bytes: int = MUCH, spare: int = 70) -> Composing:
    """Two budgets: one that the grids fill exactly, and one with room."""
    tower = make(family).tower
    total = sum_counts(tower.spec.counts(grid) for grid in grids)
    return Composing(tower, [total, {kind: n + spare for kind, n in total.items()}], CPU, most_bytes)


@pytest.mark.parametrize("family", [family.name for family in families()])
def test_composed_metadata_is_what_the_host_writes(family: str) -> None:
    grids = awkward_grids(make(family).spec)
    made = composing(family, grids)
    check(made, grids, 0)
    check(made, grids[::-1], 1)
    check(made, [grids[0]] * 2, 1)


def test_combinations_of_grids_that_came_before_and_new_ones() -> None:
    choose = random.Random(0)
    known = [Grid(choose.randint(1, 3), 2 * choose.randint(1, 8), 2 * choose.randint(1, 8)) for _ in range(12)]
    made = composing("qwen2_5_vl", known)
    for _ in range(6):
        check(made, choose.choices(known, k=choose.randint(1, len(known) // 2)), choose.randint(0, 1))


def test_parts_that_no_longer_fit_make_room_together() -> None:
    grids = [Grid(1, 2 * side, 2 * side) for side in range(1, 9)]
    parts = composing("qwen3_vl", grids)
    check(parts, grids, 0)
    made = composing("qwen3_vl", grids, most_bytes=parts.composer.used_bytes * 2 // 3)
    for batch in (grids[:4], grids[4:6], grids[2:5], grids[:4], grids[5:7]):
        check(made, batch, 1)
    assert made.composed(grids, 0) is None, "more than there is room for at once"
    check(made, grids[:3], 0)
