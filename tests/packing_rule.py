"""A made-up tower's sizes and costs, for tests of planning."""

from __future__ import annotations

from hypothesis import strategies as st

from vitgraph.config import EncoderConfig
from vitgraph.core import Grid
from vitgraph.planning.budgets import make_budgets
from vitgraph.planning.cost import CostModel, are_long


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


RULE = Rule(splits_by_frame=False)


@st.composite
def models(draw: st.DrawFn) -> tuple[tuple, CostModel]:
    """A ladder and measured-looking costs for it: a floor, a rate, and noise that may make a larger budget cheaper."""
    tokens = sorted(draw(st.sets(st.integers(4, 800), min_size=1, max_size=8)))
    budgets = make_budgets(RULE, EncoderConfig(budgets=tuple(tokens)))
    floor, rate = draw(st.floats(0, 2000)), draw(st.floats(0.1, 10))
    noise = draw(st.lists(st.floats(0.7, 1.3), min_size=len(budgets), max_size=len(budgets)))
    fixed = tuple((floor + rate * b.tokens) * n for b, n in zip(budgets, noise, strict=True))
    slope = (draw(st.floats(0, 1e-3)),) * len(budgets)
    rows = tuple(b.capacity["patch"] for b in budgets)
    gains = draw(st.lists(st.floats(0.5, 1.0), min_size=len(budgets), max_size=len(budgets)))
    long = tuple(s * gain for s, gain in zip(slope, gains, strict=True)) if draw(st.booleans()) else ()
    beside = (draw(st.floats(-400, 300)),) * len(budgets) if long and draw(st.booleans()) else ()
    return budgets, CostModel(fixed, slope, rows, long_slope=long, long_fixed=beside)


grids = st.builds(lambda t, h, w: Grid(t, 2 * h, 2 * w), st.integers(1, 4), st.integers(1, 12), st.integers(1, 12))
