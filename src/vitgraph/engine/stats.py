"""Counters of an engine."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vitgraph.core import Pack
from vitgraph.errors import FallbackError

logger = logging.getLogger("vitgraph")


@dataclass
class Stats:
    """What an engine did since it was made.

    Attributes:
        items: items encoded.
        packs: packs run, replayed or eager.
        replays: packs that ran in a budget.
        graph_replays: replays of a captured CUDA graph (the CPU replays by calling forward).
        real_tokens: output tokens of items that were replayed.
        padded_tokens: tokens of the budgets that replayed them, real ones included.
        waiting: replays without a graph because `lazy_after` was not yet reached.
        eager_packs: packs that ran outside every budget.
        fallbacks: eager packs by reason.
        split_items: clips cut between frames because no budget held them whole.
        metadata_hits, metadata_misses: lookups of the per-grid metadata cache.
        host_metadata: packs whose metadata the host wrote, not their graph: all without a graph or without Triton, and
            those whose parts find no room on the device.
        python_searches: searches for several packs that ran in Python: all without a GPU, and those where `search.c`
            cannot be built.
        captured_graphs: graphs held.
        graph_bytes: device memory of the graphs' shared pool.
        static_bytes: device memory of the static buffers.
        capture_seconds: time spent capturing.
        measure_seconds: time spent on timing the captured budgets.
    """

    items: int = 0
    packs: int = 0
    replays: int = 0
    graph_replays: int = 0
    real_tokens: int = 0
    padded_tokens: int = 0
    waiting: int = 0
    eager_packs: int = 0
    fallbacks: dict[str, int] = field(default_factory=dict)
    split_items: int = 0
    metadata_hits: int = 0
    metadata_misses: int = 0
    host_metadata: int = 0
    python_searches: int = 0
    captured_graphs: int = 0
    graph_bytes: int = 0
    static_bytes: int = 0
    capture_seconds: float = 0.0
    measure_seconds: float = 0.0

    @property
    def padding(self) -> float:
        """Share of replayed tokens that was padding, 0 to 1."""
        return 1 - self.real_tokens / self.padded_tokens if self.padded_tokens else 0.0

    def as_dict(self) -> dict[str, Any]:
        """The counters and the padding share, ready for JSON."""
        return {**asdict(self), "padding": self.padding}


class Counters:
    """Counts what runs; logs each reason to leave the graph path once.

    Args:
        strict: raise instead of leaving it.
    """

    def __init__(self, strict: bool) -> None:
        self.stats = Stats()
        self._strict = strict
        self._logged: set[str] = set()

    def plan(self, packs: Sequence[Pack], items: int) -> None:
        """Items that came, and those that had to be cut."""
        self.stats.items += items
        self.stats.packs += len(packs)
        if len(packs) > 1:  # the pieces of an item that was cut never fit one
            self.stats.split_items += len({p.item for pack in packs for p in pack.pieces if p.first_frame > 0})

    def replay(self, pack: Pack, budget: int, on_graph: bool) -> None:
        """A pack that ran in a budget of this many tokens, on its graph or without."""
        stats = self.stats
        stats.replays += 1
        stats.graph_replays += on_graph
        stats.real_tokens += pack.counts["token"]
        stats.padded_tokens += budget

    def eager(self, pack: Pack) -> None:
        """A pack that runs outside every budget, and why.

        Raises:
            FallbackError: when that is not allowed.
        """
        self.fall_back(pack.reason, pack)
        self.stats.eager_packs += 1

    def fall_back(self, reason: str, pack: Pack) -> None:
        """A pack that cannot use a graph.

        Raises:
            FallbackError: when that is not allowed.
        """
        if self._strict:
            grids = ", ".join("x".join(map(str, grid)) for grid in pack.grids)
            raise FallbackError(f"strict=True and the items {grids} cannot use a graph: {reason}.")
        self.stats.fallbacks[reason] = self.stats.fallbacks.get(reason, 0) + 1
        if reason not in self._logged:
            self._logged.add(reason)
            logger.warning("running without a graph: %s (logged once, counted in stats.fallbacks)", reason)
