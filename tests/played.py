"""An engine whose graphs are played on the CPU: their first kernels run in Triton's interpreter, then the forward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vitgraph import EncoderConfig, VisionEncoder
from vitgraph.core import Grid
from vitgraph.engine.compose import Composer
from vitgraph.engine.graph import CapturedGraph
from vitgraph.engine.intake import Intake

BUDGETS = (64, 192)


def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes its time per program, not per element."""
    from vitgraph.engine import compose_triton, intake_triton

    monkeypatch.setattr(compose_triton, "BLOCK", 1 << 13)
    monkeypatch.setattr(intake_triton, "BLOCK", 1 << 17)


class Played:
    """Stands for a graph: does on the CPU what was captured, when it is replayed."""

    def __init__(self, encoder: VisionEncoder, budget: int) -> None:
        self._engine, self._buffers = encoder.engine, encoder.engine.ladder.static(budget)

    def replay(self) -> None:
        intake = self._buffers.arena.intake
        assert intake is not None
        intake.launch(self._buffers)
        for static, result in zip(self._buffers.outputs, self._engine._forward(self._buffers.inputs), strict=True):
            static.copy_(result)


def plain(family: str = "qwen3_vl") -> VisionEncoder:
    """An encoder on the CPU whose attention, like that of graphs, knows no lengths on the host."""
    encoder = VisionEncoder.from_config(family, device="cpu", config=EncoderConfig(budgets=BUDGETS))
    encoder.engine.staging.uncaptured = lambda inputs, grids: inputs  # type: ignore[method-assign]
    return encoder


def played(family: str = "qwen3_vl", most_bytes: int = 1 << 22) -> VisionEncoder:
    """The same, and its budgets have graphs with an intake."""
    encoder = plain(family)
    engine, ladder = encoder.engine, encoder.engine.ladder
    arena = ladder._make_arena()
    kinds = tuple(encoder.budgets[-1].capacity)
    composer = Composer(encoder.spec, ladder._layouts, kinds, arena.block, most_bytes)
    arena.intake = Intake(composer, encoder.spec.patch_width, encoder.device)
    for budget in range(len(BUDGETS)):
        outputs = ladder.static(budget).outputs
        graph = Played(encoder, budget)
        ladder.graphs[budget] = CapturedGraph(graph, outputs, 0.0, arena.intake.mailbox)  # type: ignore[arg-type]
    engine._runner._on_device = True
    return encoder


def same(got: list, want: list) -> bool:
    return all(torch.equal(g.tokens, w.tokens) for g, w in zip(got, want, strict=True))


def rows_of(encoder: VisionEncoder, grids: list[Grid], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(grid.patches for grid in grids), encoder.spec.patch_width, generator=generator)
