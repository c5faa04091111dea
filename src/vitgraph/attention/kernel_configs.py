"""Configurations of our attention kernel: shipped for the GPUs that they were measured on, measured once on others."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vitgraph.attention.base import Segments
from vitgraph.attention.choices import choice_key, measure_once
from vitgraph.attention.trial import Time, nearest_class, segments_of, usual_lengths

logger = logging.getLogger("vitgraph")

CLASSES = (256, 512, 1024, 2048, 4096, 8192, 16384)
"""Rows of a buffer that are measured."""

SHORT_HEAD = 80
SHIPPED_FOR = ("H100", "H200", "GH200")
"""GPUs, by a part of their names, that run the shipped configurations: measured on an H100; the others are its like."""


@dataclass(frozen=True)
class KernelConfig:
    """Launch settings.

    Attributes:
        block: query rows of a tile.
        keys: rows of keys and values of one step.
        warps: of a program.
        stages: of the software pipeline over keys; one would break the kernel, see `triton_varlen`.
    """

    block: int
    keys: int = 64
    warps: int = 4
    stages: int = 3

    @property
    def name(self) -> str:
        return f"{self.block} rows, {self.keys} keys, {self.warps} warps, {self.stages} stages"


SMALL, LARGE = KernelConfig(64), KernelConfig(128)
WIDE, WIDE_TWO = KernelConfig(64, 128), KernelConfig(64, 128, stages=2)
CANDIDATES = (
    SMALL,
    LARGE,
    WIDE,
    WIDE_TWO,
    KernelConfig(64, stages=2),
    KernelConfig(128, 128, 8),
    KernelConfig(128, warps=8),
)

Table = tuple[tuple[int | None, KernelConfig], ...]
"""Most rows of a buffer -> its configuration, ascending; None has no bound."""

SHIPPED: Table = (
    *((320, WIDE), (900, SMALL), (1088, WIDE_TWO), (1600, SMALL)),
    # About 18 large tiles of a head fill the GPU a little more than once.
    *((2100, LARGE), (2700, SMALL), (None, LARGE)),
)
"""For head dims up to 80, where the steps of 128 keys were measured."""

SHIPPED_LONG_HEADS: Table = ((1023, SMALL), (None, LARGE))
"""For longer heads, whose wide steps need more shared memory."""

Run = Callable[[Tensor, Tensor, Tensor, Segments, float, KernelConfig], object]
"""Runs the kernel on q, k, v, segments and scale with a configuration."""


class KernelConfigs:
    """Which configuration runs a buffer."""

    def __init__(self) -> None:
        self._tuned: dict[int, KernelConfig] = {}
        self._shipped = SHIPPED_LONG_HEADS

    def choose(self, rows: int, longest: int) -> KernelConfig:
        """The configuration for a buffer of `rows` rows whose segments are at most `longest` rows long."""
        if self._tuned:
            found = self._tuned[nearest_class(rows, list(self._tuned))]
        else:
            found = next(config for most, config in self._shipped if most is None or rows <= most)
        # Tiles longer than any segment would be cut short everywhere.
        return found if longest >= found.block else SMALL

    def tune(
        self, run: Run, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype, gpu: str, time: Time
    ) -> None:
        """Measures the candidates, or reads what was measured before; does nothing where configurations are shipped.

        Args:
            run: the kernel.
            heads, head_dim: of the tower.
            device, dtype: likewise.
            gpu: name of the device.
            time: microseconds of a call.
        """
        if any(part in gpu for part in SHIPPED_FOR):
            self._shipped = SHIPPED if head_dim <= SHORT_HEAD else SHIPPED_LONG_HEADS
            return
        if self._tuned:
            return
        key = choice_key(gpu, ["our kernel"], heads, head_dim, dtype)
        times = measure_once(key, CLASSES, lambda rows: _measure(run, rows, heads, head_dim, device, dtype, time))
        known = {config.name: config for config in CANDIDATES}
        for rows, own in times.items():
            # A file of another version may name configurations that are no more.
            names = [name for name in own if name in known]
            if names:
                self._tuned[rows] = known[min(names, key=own.__getitem__)]
        logger.info("attention kernels on %s: %s", gpu, {rows: c.name for rows, c in self._tuned.items()})


def _measure(
    run: Run, rows: int, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype, time: Time
) -> dict[str, float]:
    """Microseconds by configuration for a buffer filled with usual images."""
    q, k, v = torch.randn(rows, 3, heads, head_dim, device=device, dtype=dtype).unbind(1)
    lengths = usual_lengths(rows)
    times = {}
    for config in CANDIDATES:
        segments = segments_of(lengths, config.block, device)
        try:
            times[config.name] = time(lambda: run(q, k, v, segments, head_dim**-0.5, config))  # noqa: B023
        except RuntimeError as error:  # too much shared memory for this GPU, above all
            logger.debug("attention kernel with %s does not run: %s", config.name, error)
    return times
