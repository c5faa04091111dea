"""Counters of an engine."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


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
