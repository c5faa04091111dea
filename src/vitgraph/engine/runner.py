"""Running one pack: in its budget, on buffers of exactly its size, or as it was prepared."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Literal

import torch

from vitgraph.attention.base import VarlenAttention
from vitgraph.config import EncoderConfig
from vitgraph.core import Counts, Grid, Pack
from vitgraph.engine.buffers import Arena, MetadataLayout, StaticBuffers
from vitgraph.engine.graph import CapturedGraph, copy_outputs
from vitgraph.engine.ladder import WAITING, Ladder
from vitgraph.engine.order import RunOrder
from vitgraph.engine.pixels import BatchRows, PieceRows, pixels_of
from vitgraph.engine.prepared import PreparedReplay
from vitgraph.engine.results import Outputs
from vitgraph.engine.staging import Staging
from vitgraph.engine.stats import Counters
from vitgraph.models.contract import TowerBuffers, TowerSpec

logger = logging.getLogger("vitgraph")

Mode = Literal["auto", "padded", "eager"]
"""How packs run: "auto" replays graphs; "padded" runs the same forward on the same padded static buffers without a
graph; "eager" runs it on buffers of exactly the pack's size."""


class PackRunner:
    """Runs packs, one at a time.

    Args:
        spec: of the tower.
        forward: of the tower, as a tuple of outputs.
        static: the same on static buffers.
        device, dtype: of the tower.
        config: see `EncoderConfig`.
        attention: the tower's backend.
        ladder: budgets and graphs.
        staging: fills their buffers.
        order: of runs on the device.
        counters: count what runs.
    """

    def __init__(
        self,
        spec: TowerSpec,
        forward: Callable[[TowerBuffers], Outputs],
        static: Callable[[TowerBuffers], Outputs],
        device: torch.device,
        dtype: torch.dtype,
        config: EncoderConfig,
        attention: VarlenAttention,
        ladder: Ladder,
        staging: Staging,
        order: RunOrder,
        counters: Counters,
    ) -> None:
        self._spec, self._forward, self._static = spec, forward, static
        self._device, self._dtype, self._attention = device, dtype, attention
        self._ladder, self._staging, self._order, self._counters = ladder, staging, order, counters
        self._on_device = device.type == "cuda"
        self._verbose = config.verbose

    def run(self, pack: Pack, rows: BatchRows, mode: Mode) -> Outputs:
        """The pack's outputs, in memory of their own.

        Args:
            pack: to run.
            rows: of its batch; they need no gradient.
            mode: see `Mode`.

        Raises:
            FallbackError: with `strict=True`, when the pack cannot use a budget.
        """
        if pack.budget is None or mode == "eager":
            if mode != "eager":
                self._counters.eager(pack)
            return self.run_exact(pack.counts, pack.grids, pixels_of(pack, rows))
        outputs, captured = self._run_padded(pack, pack.budget, rows, mode == "auto" and self._on_device)
        tokens = self._ladder.budgets[pack.budget].tokens
        self._counters.replay(pack, tokens, captured)
        if self._verbose:
            _log(pack, tokens)
        return outputs

    def run_exact(self, total: Counts, grids: Sequence[Grid], pixels: Sequence[PieceRows]) -> Outputs:
        """Eager outputs, on buffers of exactly the pack's size.

        Args:
            total: rows of each kind.
            grids: of the pieces.
            pixels: of the pieces, in row order.
        """
        layout = MetadataLayout(self._spec, total, self._attention)
        arena = Arena(self._spec, total, layout.nbytes, self._device, self._dtype)
        buffers = StaticBuffers.create(self._spec, total, layout, arena)
        try:
            self._staging.fill(buffers, grids, pixels)
            inputs = buffers.inputs_of(self._spec.is_long(total))
            return self._forward(self._staging.uncaptured(inputs, grids))
        finally:
            self._staging.return_rows()

    def prepare(self, pack: Pack) -> PreparedReplay | None:
        """All that `replay` needs; None where the pack runs eager, or its budget lacks its graph."""
        if pack.budget is None:
            return None
        long = self._ladder.runs_long(pack.budget, pack.counts)
        graph = self._graph(pack.budget, long)
        if self._on_device and graph is None:
            return None
        return PreparedReplay(pack, self._ladder.static(pack.budget), graph, long)

    def is_current(self, prepared: PreparedReplay) -> bool:
        """Whether its budget's graph is what it was."""
        return prepared.graph is self._graph(prepared.pack.budget, prepared.long)

    def replay(self, prepared: PreparedReplay, rows: BatchRows) -> Outputs:
        """The pack's outputs, in memory of their own. Before the launch nothing is done per item.

        Args:
            prepared: current.
            rows: of its batch; they need no gradient.
        """
        pack = prepared.pack
        stream = self._order.enter()
        try:
            self._launch(prepared.graph, prepared.buffers, prepared.long, pack, rows, stream)
            outputs = tuple([output.clone() for output in prepared.outputs])
        finally:
            self._order.leave(stream)
            self._staging.return_rows()
        self.note(prepared)
        return outputs

    def note(self, prepared: PreparedReplay) -> None:
        """Counts a replay, and logs it if asked to."""
        self._counters.replay(prepared.pack, prepared.tokens, prepared.graph is not None)
        if self._verbose:
            _log(prepared.pack, prepared.tokens)

    def _run_padded(self, pack: Pack, budget: int, rows: BatchRows, use_graph: bool) -> tuple[Outputs, bool]:
        """The pack's outputs, and whether a graph made them."""
        buffers = self._ladder.static(budget)
        stream = self._order.enter()
        try:
            # Before the question which form runs: what is measured for a first run may decide that.
            captured = use_graph and self._has_graph(pack, budget)
            if not captured:
                self._ladder.settle(budget)
            long = self._ladder.runs_long(budget, pack.counts)
            graph = self._ladder.graph(budget, long) if captured else None
            self._launch(graph, buffers, long, pack, rows, stream)
            # The next replay writes over this memory, so the caller gets a copy of the rows that are his.
            return tuple([output.clone() for output in buffers.outputs_of(pack.counts)]), captured
        finally:
            self._order.leave(stream)
            self._staging.return_rows()

    def _launch(
        self,
        graph: CapturedGraph | None,
        buffers: StaticBuffers,
        long: bool,
        pack: Pack,
        rows: BatchRows,
        stream: torch.cuda.Stream | None,
    ) -> None:
        """Runs a pack in its budget: the graph, or without one the same forward, into the static outputs."""
        intake = buffers.arena.intake
        if graph is not None and intake is not None:
            graph.replay(self._staging.request(intake, buffers, pack, rows, stream))
            self._staging.launched(intake.mailbox)
            buffers.arena.holds = pack
            return
        self._staging.fill_pack(buffers, pack, rows, stream)
        if graph is not None:
            graph.replay()
        else:
            self._run_static(buffers, long, pack.grids)

    @torch.no_grad()
    def _run_static(self, buffers: StaticBuffers, long: bool, grids: Sequence[Grid]) -> None:
        """What a graph would do, launch by launch."""
        inputs = self._staging.uncaptured(buffers.inputs_of(long), grids)
        copy_outputs(buffers.outputs, self._static(inputs))

    def _graph(self, budget: int | None, long: bool) -> CapturedGraph | None:
        graphs = self._ladder.long if long else self._ladder.graphs
        return None if budget is None else graphs.get(budget)

    def _has_graph(self, pack: Pack, budget: int) -> bool:
        if budget in self._ladder.graphs:
            return True
        reason = self._ladder.missing(budget)
        if reason == WAITING:
            self._counters.stats.waiting += 1
        elif reason:
            self._counters.fall_back(reason, pack)
        return not reason


def _log(pack: Pack, tokens: int) -> None:
    logger.info("pack of %d items: %s in budget %d", len(pack.grids), dict(pack.counts), tokens)
