"""New batches on the shortest way to their graphs: what describes a pack is made once it runs.

`PackRunner` launches any pack, and these in the same way. Packs come to it as objects, though, and whatever is made
between a call and its launch is time in which the GPU may have nothing to do.
"""

from __future__ import annotations

from torch import Tensor

from vitgraph.core import PLACE_BYTES, STRETCH_BYTES, KnownGrid
from vitgraph.engine.graph import CapturedGraph
from vitgraph.engine.intake import RowSource
from vitgraph.engine.ladder import Ladder
from vitgraph.engine.mailbox import Request
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
        eager: whether packs may run eager.
    """

    def __init__(self, ladder: Ladder, staging: Staging, order: RunOrder, eager: bool) -> None:
        self._ladder, self._staging, self._order = ladder, staging, order
        self._eager = eager

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
        source = None if intake is None else intake.source(rows)
        found = None if source is None else planner.find(known, self._eager)
        if source is None or found is None or not found.places:
            return None
        check_rows(source.rows, found.rows)
        runs: list[Runs] = []
        requests: list[Request] = []
        for group in found.groups:
            own = self._runs(planner, group)
            request = _request(source, found, group)
            if own is None or request is None:
                return None
            runs.append(own)
            requests.append(request)
        outputs: list[Outputs] = []
        stream = self._order.enter()
        try:
            for group, (budget, graph, _), request in zip(found.groups, runs, requests, strict=True):
                graph.replay(request)
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
        budget, settled, long, load = group[4:SIZE]
        if not settled:
            budget, _ = planner.placed(planner.counts_of(group), load, long, budget, self._eager)
        graph = self._ladder.long.get(budget) if long else None
        own = graph or self._ladder.graphs.get(budget)
        return None if own is None else (budget, own, graph is not None)


def _request(source: RowSource, found: Searched, group: FoundGroup) -> Request | None:
    """Of a group; None where its graph cannot copy the rows itself."""
    begin, end, first, last = group[:4]
    places = found.places[begin * PLACE_BYTES : end * PLACE_BYTES]
    return source.request(places, found.table[first * STRETCH_BYTES : last * STRETCH_BYTES])
