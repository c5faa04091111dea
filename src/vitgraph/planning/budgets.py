"""Token budgets: the sizes that graphs are captured for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from vitgraph.config import EncoderConfig
from vitgraph.core import Counts

MIN_STEP = 16
FINE_STEP = 64
FINENESS = 16
TOKENS_PER_ITEM = 16
MOST_ITEMS = 128
LEAST_FRAMES = 8


class CapacityRule(Protocol):
    """The part of a `TowerSpec` that sizes budgets."""

    @property
    def unit(self) -> int: ...

    def capacity(self, tokens: int, max_items: int, max_frames: int) -> Counts: ...


@dataclass(frozen=True)
class Budget:
    """One captured size.

    Attributes:
        tokens: output tokens it holds; its name in the field.
        capacity: rows of each kind it holds.
    """

    tokens: int
    capacity: Counts


def default_ladder(min_tokens: int, max_tokens: int, unit: int = 1) -> tuple[int, ...]:
    """Token counts from `min_tokens` to `max_tokens`: geometric, in steps of 16 tokens and more.

    A step is about a sixteenth of the rung, up to 64 tokens, and from 2048 tokens on a sixteenth of the power of two
    below it. So a pack of random size is padded by about 3 %. The first rung is `min_tokens` and the last one
    `max_tokens`, rounded up to a multiple of 16 (and of `unit`, for towers whose tokens come in larger units).
    """
    rungs = [_round_up(min_tokens, MIN_STEP)]
    last = _round_up(max_tokens, MIN_STEP)
    while rungs[-1] < last:
        step = _step(rungs[-1])
        # Rungs are multiples of their step, so that powers of two, the sizes of square images, are among them.
        rungs.append(min((rungs[-1] // step + 1) * step, last))
    return tuple(sorted({_round_up(tokens, unit) for tokens in rungs}))


def _step(rung: int) -> int:
    """Tokens to the next rung, at most; see `default_ladder`."""
    power_of_two = 1 << (rung // FINENESS).bit_length() - 1
    return min(_round_up(rung / FINENESS, MIN_STEP), max(FINE_STEP, power_of_two))


def make_budgets(rule: CapacityRule, config: EncoderConfig) -> tuple[Budget, ...]:
    """The budgets of a tower under `config`, ascending. Explicit ones are rounded up to the tower's unit."""
    if config.budgets is None:
        ladder = default_ladder(config.min_tokens, config.max_tokens, rule.unit)
    else:
        ladder = tuple(sorted({_round_up(tokens, rule.unit) for tokens in config.budgets}))
    return tuple(_budget(rule, tokens, config) for tokens in ladder)


def _budget(rule: CapacityRule, tokens: int, config: EncoderConfig) -> Budget:
    items = config.max_items or min(max(tokens // TOKENS_PER_ITEM, 1), MOST_ITEMS)
    frames = config.max_frames or max(items, LEAST_FRAMES)
    return Budget(tokens, rule.capacity(tokens, min(items, tokens), min(frames, tokens)))


def _round_up(tokens: float, unit: int) -> int:
    return max(math.ceil(tokens / unit), 1) * unit
