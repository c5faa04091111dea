"""Images that fill a budget, as budgets are timed with."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import NamedTuple

from vitgraph.core import Grid, fits, sum_counts
from vitgraph.errors import PatchError
from vitgraph.models.contract import TowerSpec
from vitgraph.planning.budgets import Budget
from vitgraph.planning.cost import load_of

USUAL_TOKENS, LARGE_TOKENS = 100, (441, 1024)
LEAST_LOAD = 1.5
"""Large images tell a slope where they load a budget so many times as usual ones: not where it holds one of these."""


class Fillings(NamedTuple):
    """What one budget is timed with.

    Attributes:
        usual: see `usual_items`.
        large: see `large_items`; empty where they tell nothing.
        long: see `long_fillings`; empty where the budget has no second graph.
    """

    usual: list[Grid]
    large: list[Grid]
    long: list[list[Grid]]


def fillings(spec: TowerSpec, budget: Budget, has_long: bool) -> Fillings:
    """All that a budget is timed with; `has_long`: in two graphs."""
    usual, large = usual_items(spec, budget), large_items(spec, budget)
    tells = load(spec, large) > LEAST_LOAD * load(spec, usual)
    return Fillings(usual, large if tells else [], long_fillings(spec, budget) if has_long else [])


def usual_items(spec: TowerSpec, budget: Budget, tokens: int = USUAL_TOKENS) -> list[Grid]:
    """Images of about this many tokens each that fill the budget as far as they can."""
    per_item = max(tokens, -(-budget.tokens // budget.capacity["item"]))
    grids: list[Grid] = []
    filled = {"token": 0}
    while filled["token"] < budget.tokens:
        grid = _image(spec, min(per_item, budget.tokens - filled["token"]))
        if grid is None:
            break
        more = sum_counts([filled, spec.counts(grid)])
        if not fits(more, budget.capacity):
            break
        grids.append(grid)
        filled = more
    return grids


def large_items(spec: TowerSpec, budget: Budget) -> list[Grid]:
    """As large images as LARGE_TOKENS lists and the budget holds, or one that fills it. Several tell more than one,
    whose tiles may just not fill the GPU."""
    fitting = [tokens for tokens in LARGE_TOKENS if tokens <= budget.tokens]
    return usual_items(spec, budget, max(fitting)) if fitting else one_item(spec, budget)


def long_items(spec: TowerSpec, budget: Budget) -> list[Grid]:
    """Equal images of at least as many tokens as the largest of LARGE_TOKENS, as many as the budget holds."""
    count = max(budget.tokens // LARGE_TOKENS[-1], 1)
    return usual_items(spec, budget, budget.tokens // count)[:count]


def one_item(spec: TowerSpec, budget: Budget) -> list[Grid]:
    """The largest near-square image that the budget holds."""
    grid = _image(spec, budget.tokens)
    return [grid] if grid is not None and fits(spec.counts(grid), budget.capacity) else []


def long_fillings(spec: TowerSpec, budget: Budget) -> list[list[Grid]]:
    """What a graph for packs of one or of long segments is timed with: `one_item`, and `long_items` where these are
    several and load it less."""
    one, several = one_item(spec, budget), long_items(spec, budget)
    are_long = len(several) > 1 and spec.is_long(sum_counts(map(spec.counts, several)))
    return [grids for grids in (one, several if are_long and load(spec, several) < load(spec, one) else []) if grids]


def load(spec: TowerSpec, grids: Sequence[Grid]) -> float:
    """The load of a pack of these items; see `CostModel`."""
    return sum(load_of(spec.counts(grid), spec.load_sets) for grid in grids)


def _image(spec: TowerSpec, tokens: int) -> Grid | None:
    """A near-square image of at most this many tokens; for towers of fixed tiles, as many tiles."""
    if spec.unit > 1:
        side = spec.merge * isqrt(spec.unit)
        grid = Grid(tokens // spec.unit, side, side)
    else:
        height = isqrt(tokens)
        grid = Grid(1, height * spec.merge, tokens // max(height, 1) * spec.merge)
    try:
        spec.check_grid(grid)
    except PatchError:
        return None
    return grid
