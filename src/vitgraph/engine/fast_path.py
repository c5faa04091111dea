"""New batches on the shortest way to their graphs: what describes a pack is made once it runs.

`PackRunner` launches any pack, and these in the same way. Packs come to it as objects, though, and whatever is made
between a call and its launch is time in which the GPU may have nothing to do.
"""

from __future__ import annotations

from torch import Tensor

from vitgraph.core import STRETCH_BYTES, KnownGrid, Stretches
from vitgraph.engine.graph import CapturedGraph
from vitgraph.engine.intake import BatchSource
from vitgraph.engine.ladder import Ladder
from vitgraph.engine.mailbox import WORD, Request
from vitgraph.engine.order import RunOrder
from vitgraph.engine.prepared import PreparedReplay
from vitgraph.engine.results import Outputs
from vitgraph.engine.staging import Staging
from vitgraph.planning.packing import Planner, check_rows
from vitgraph.planning.search import SIZE, FoundGroup, Searched

Runs = tuple[int, CapturedGraph, bool]
"""What runs a pack: its budget, the graph, and whether that is the budget's second one."""


class FastPath:
    """Launches batches whose packs all have graphs, where everything that these read lies on the device.

    Args:
        ladder: has the graphs of packs.
        staging: counts what it is spared.
        order: of runs on the device.
        width: elements of a patch row.
        eager: whether packs may run eager.
    """

    def __init__(self, ladder: Ladder, staging: Staging, order: RunOrder, width: int, eager: bool) -> None:
        self._ladder, self._staging, self._order = ladder, staging, order
        self._width, self._eager = width, eager

    def launch(
        self, planner: Planner, known: list[KnownGrid], rows: Tensor
    ) -> list[tuple[PreparedReplay, Outputs]] | None:
        """Launches all packs of a batch.

        Args:
            planner: finds them.
            known: of its items.
            rows: of all its items, of any shape and dtype, on any device.

        Returns:
            Per pack what ran, and its outputs in memory of their own; None where nothing was launched: a pack has no
            graph, or rows or metadata do not lie on the device as graphs read them.

        Raises:
            PatchError: the grids hold another number of rows.
        """
        intake = self._ladder.intake
        source = None if intake is None else intake.batch_source(rows, self._width)
        found = None if source is None else planner.find(known, self._eager)
        if source is None or found is None or not found.places:
            return None
        check_rows(source.rows, found.rows)
        runs: list[Runs] = []
        for group in found.groups:
            own = self._runs(planner, group)
            if own is None:
                return None
            runs.append(own)
        outputs: list[Outputs] = []
        stream = self._order.enter()
        try:
            for group, (budget, graph, _) in zip(found.groups, runs, strict=True):
                graph.replay(_request(source, found, group))
                buffers = self._ladder.static(budget)
                buffers.arena.holds = None
                filled = buffers.outputs_of(planner.counts_of(group))
                outputs.append(tuple([output.clone() for output in filled]))
        finally:
            self._order.leave(stream)
        self._staging.spared += len(known)
        packs = planner.packs_of(found, known, None, self._eager)
        ran = [
            PreparedReplay(pack, self._ladder.static(budget), graph, long)
            for pack, (budget, graph, long) in zip(packs, runs, strict=True)
        ]
        ran[-1].buffers.arena.holds = ran[-1].pack
        return list(zip(ran, outputs, strict=True))

    def _runs(self, planner: Planner, group: FoundGroup) -> Runs | None:
        """What runs a group; None where that is no graph."""
        budget, settled, long, load = group[5:SIZE]
        if not settled:
            budget, _ = planner.placed(planner.counts_of(group), load, long, budget, self._eager)
        graph = self._ladder.long.get(budget) if long else None
        own = graph or self._ladder.graphs.get(budget)
        return None if own is None else (budget, own, graph is not None)


def _request(source: BatchSource, found: Searched, group: FoundGroup) -> Request:
    """Of a group."""
    begin, end, first, last, patches = group[:5]
    _, dtype, address, width, row_bytes = source
    stretches = found.table[first * STRETCH_BYTES : last * STRETCH_BYTES]
    if last - first == 1:
        address += Stretches.ENTRY.unpack(stretches)[1] * row_bytes
        stretches = b""
    return Request(found.places[begin * WORD : end * WORD], dtype, address, patches * width, stretches)
