"""Checkpoint layouts: which checkpoint keys make which tower parameter, in both directions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vitgraph.layers.rotary import half_split_to_interleaved, interleaved_to_half_split


class Transform:
    """From the tensors of a checkpoint to one parameter and back. The plain one passes a single tensor on."""

    def load(self, sources: list[Tensor]) -> Tensor:
        (tensor,) = sources
        return tensor

    def save(self, parameter: Tensor) -> list[Tensor]:
        return [parameter]


@dataclass(frozen=True)
class Flatten(Transform):
    """Convolution kernel or table `[*shape]` -> matrix: everything but the last or the first axis is flattened.

    `shape` is the checkpoint's; `keep_last` keeps the last axis (a table of vectors), else the first (a kernel).
    """

    shape: tuple[int, ...]
    keep_last: bool = False

    def load(self, sources: list[Tensor]) -> Tensor:
        (tensor,) = sources
        return tensor.flatten(0, -2) if self.keep_last else tensor.flatten(1)

    def save(self, parameter: Tensor) -> list[Tensor]:
        return [parameter.reshape(self.shape)]


@dataclass(frozen=True)
class HalfSplitQkv(Transform):
    """Fused qkv whose q and k rows are paired (2i, 2i+1) -> the same rows paired (i, i + Dh/2)."""

    heads: int

    def load(self, sources: list[Tensor]) -> Tensor:
        q, k, v = sources[0].chunk(3)
        return torch.cat([interleaved_to_half_split(q, self.heads), interleaved_to_half_split(k, self.heads), v])

    def save(self, parameter: Tensor) -> list[Tensor]:
        q, k, v = parameter.chunk(3)
        return [torch.cat([half_split_to_interleaved(q, self.heads), half_split_to_interleaved(k, self.heads), v])]


@dataclass(frozen=True)
class Fuse(Transform):
    """Several tensors, each `rows` long, stacked along the first axis (q, k, v into qkv)."""

    rows: tuple[int, ...]

    def load(self, sources: list[Tensor]) -> Tensor:
        return torch.cat(sources)

    def save(self, parameter: Tensor) -> list[Tensor]:
        return list(parameter.split(list(self.rows)))


@dataclass(frozen=True)
class Rule:
    """One line of a layout.

    Attributes:
        pattern: regular expression that a tower parameter's whole name must match.
        sources: checkpoint keys that make it; `\\1` and so on refer to the pattern's groups.
        transform: how.
    """

    pattern: str
    sources: tuple[str, ...]
    transform: Transform = Transform()


@dataclass(frozen=True)
class Layout:
    """How one published checkpoint layout stores a tower. The first matching rule of a parameter wins.

    Attributes:
        name: for messages.
        prefixes: keys that start with one of these belong to the vision side; all others are left alone.
        rules: see `Rule`.
        unused: regular expressions of vision-side keys that are known and that the tower does not use.
    """

    name: str
    prefixes: tuple[str, ...]
    rules: tuple[Rule, ...]
    unused: tuple[str, ...] = ()

    def sources(self, parameter: str) -> tuple[tuple[str, ...], Transform]:
        """Checkpoint keys and transform of one tower parameter."""
        for rule in self.rules:
            match = re.fullmatch(rule.pattern, parameter)
            if match:
                return tuple(match.expand(source) for source in rule.sources), rule.transform
        raise AssertionError(f"layout {self.name!r} has no rule for tower parameter {parameter!r}")

    def owns(self, key: str) -> bool:
        """Whether a checkpoint key is on the vision side and expected to be used."""
        return key.startswith(self.prefixes) and not any(re.fullmatch(p, key) for p in self.unused)

    def export(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A tower's parameters under the checkpoint's keys and shapes."""
        tensors: dict[str, Tensor] = {}
        for parameter, value in state.items():
            keys, transform = self.sources(parameter)
            tensors.update(zip(keys, transform.save(value), strict=True))
        return tensors


def best_layout(layouts: Iterable[Layout], parameters: Iterable[str], keys: set[str]) -> Layout:
    """The layout that finds most of its keys among `keys`; the first one on a tie."""
    names = list(parameters)
    return max(layouts, key=lambda layout: sum(k in keys for name in names for k in layout.sources(name)[0]))
