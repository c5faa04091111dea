"""A made-up tower's sizes, for tests of planning."""

from __future__ import annotations

from vitgraph.core import Grid
from vitgraph.planning.cost import are_long


class Rule:
    """m = 2, one segment per frame."""

    unit = 1
    load_sets = segment_sets = (("patch", "segment"),)

    def __init__(self, splits_by_frame: bool = True) -> None:
        self.splits_by_frame = splits_by_frame

    def counts(self, grid: Grid) -> dict[str, int]:
        return {"patch": grid.patches, "token": grid.patches // 4, "item": 1, "segment": grid.t}

    def is_long(self, counts: dict[str, int]) -> bool:
        return bool(are_long((counts["patch"], counts["segment"])))

    def capacity(self, tokens: int, max_items: int, max_frames: int) -> dict[str, int]:
        return {"patch": 4 * tokens, "token": tokens, "item": max_items, "segment": max(max_items, max_frames)}
