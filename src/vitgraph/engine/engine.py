"""The engine: plans packs, fills static buffers, replays, splits. It knows no family."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from threading import RLock
from typing import Literal

import torch
from torch import Tensor

from vitgraph.attention.base import VarlenAttention, tune
from vitgraph.config import EncoderConfig
from vitgraph.core import Counts, Grid, Pack, sum_counts
from vitgraph.engine.buffers import Arena, MetadataLayout, StaticBuffers
from vitgraph.engine.graph import CapturedGraph, copy_outputs
from vitgraph.engine.ladder import WAITING, Ladder, Progress
from vitgraph.engine.measure import measure_costs
from vitgraph.engine.pixels import PieceRows
from vitgraph.engine.staging import Staging, pixels_of
from vitgraph.engine.stats import Counters, Stats
from vitgraph.engine.timer import EngineTimer
from vitgraph.errors import EngineReleasedError
from vitgraph.layers.block import Attention
from vitgraph.models.contract import Tower, TowerBuffers
from vitgraph.planning.budgets import Budget
from vitgraph.planning.packing import Planner

__all__ = ["Engine", "Mode", "Outputs", "Progress"]

logger = logging.getLogger("vitgraph")

Mode = Literal["auto", "padded", "eager"]
"""How packs run: "auto" replays graphs; "padded" runs the same forward on the same padded static buffers without a
graph; "eager" runs it on buffers of exactly the pack's size."""

Outputs = tuple[Tensor, ...]
"""One `[levels, rows, width]` per entry of the spec's `outputs`: the tokens `[levels, M, C]` first."""

Part = tuple[int, Outputs]
"""First frame of a piece within its item, and the piece's outputs."""


class Engine:
    """Runs one tower through budgets.

    Args:
        tower: weights on `device` in `dtype`.
        device, dtype: of the tower.
        config: see `EncoderConfig`.
        attention: the tower's backend, which may want tile schedules.
    """

    def __init__(
        self,
        tower: Tower,
        device: torch.device,
        dtype: torch.dtype,
        config: EncoderConfig,
        attention: VarlenAttention,
    ) -> None:
        self.tower, self.spec, self.config = tower, tower.spec, config
        self.device, self.dtype = device, dtype
        for heads, head_dim in sorted(_attention_shapes(tower)):
            tune(attention, heads, head_dim, device, dtype)
        self.ladder = Ladder(self.spec, self._forward, device, dtype, config, attention)
        self.planner = Planner(self.spec, self.budgets)
        self.staging = Staging(tower, device, config.metadata_cache)
        self._attention = attention
        self._counters = Counters(config.graph and config.strict)
        self._measure_seconds = 0.0
        self._lock = RLock()
        self._last_run: torch.cuda.Event | None = None
        self._last_stream: torch.cuda.Stream | None = None
        self._released = False
        if config.compile:
            for region in tower.compile_regions():
                region.compile(dynamic=True)

    # -- public ------------------------------------------------------------------------------------------------

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """Ascending."""
        return self.ladder.budgets

    def plan(self, grids: Sequence[Grid]) -> list[Pack]:
        """How items of these grids would run."""
        with self._lock:
            return self.planner.plan(grids, eager=not self.config.strict)

    def warm_metadata(self, grids: Iterable[Grid] | None = None) -> None:
        """Computes the metadata of grids ahead of their first use.

        Args:
            grids: default: the square images of up to 32 x 32 tokens.
        """
        self.staging.warm(grids)

    @torch.no_grad()
    def capture(self, progress: Progress | None = None) -> None:
        """Captures every budget, then times them. Does nothing on the CPU or when already captured."""
        with self._lock, self._guard():
            if self.ladder.complete:
                return
            self.warm_metadata()
            if self._last_run is not None:
                self._last_run.synchronize()
            self.ladder.capture(progress)
            budgets = len(self.budgets)
            if self.config.measure and self.ladder.graphs:
                if progress:
                    progress(budgets, budgets, "timing")
                self._measure()
            if progress:
                progress(budgets, budgets, "done")

    def _measure(self) -> None:
        start = time.perf_counter()
        captured = sorted(self.ladder.graphs)
        self.planner.cost = measure_costs(self.spec, self.budgets, captured, EngineTimer(self))
        self._measure_seconds = time.perf_counter() - start
        timed = sum(self.planner.cost.measured)
        logger.debug("timed %d of %d budgets in %.2f s", timed, len(self.budgets), self._measure_seconds)

    @torch.no_grad()
    def run(self, rows: Tensor | Sequence[Tensor], grids: Sequence[Grid], mode: Mode = "auto") -> list[Outputs]:
        """Encodes items.

        Args:
            rows: pixel rows of all items one after another, `[P, patch_width]`, or per item `[P_i, patch_width]`; on
                the host or on the device, any float dtype.
            grids: per item.
            mode: see `Mode`.

        Returns:
            Per item its outputs on the device, in memory of their own: the tokens `[levels, M_i, C]`, then the extra
            outputs that the tower declares.

        Raises:
            FallbackError: with `strict=True`, when a pack cannot use a budget.
            EngineReleasedError: after `release()`.
        """
        with self._lock, self._guard():
            if mode == "auto" and not self.ladder.complete and not self.config.lazy:
                self.capture()
            mode = mode if self.config.graph else "eager"
            exact = mode == "eager"
            packs = self.planner.plan(grids, split=not exact, eager=mode == "auto" and not self.config.strict)
            self._counters.plan(packs, len(grids))
            together = len(packs) == 1 and len(packs[0].pieces) == len(grids)
            if isinstance(rows, Tensor) and not together:
                rows = rows.split([grid.patches for grid in grids])
            parts: list[list[Part]] = [[] for _ in grids]
            for pack in packs:
                self._split(pack, self._run_pack(pack, pixels_of(pack, rows), mode), parts)
        return [_join(item) for item in parts]

    @property
    def stats(self) -> Stats:
        """A snapshot of the counters."""
        with self._lock:
            ladder, staging = self.ladder, self.staging
            return replace(
                self._counters.stats,
                fallbacks=dict(self._counters.stats.fallbacks),
                metadata_hits=staging.grids.hits,
                metadata_misses=staging.grids.misses,
                captured_graphs=len(ladder.graphs) + len(ladder.alone),
                graph_bytes=ladder.graph_bytes,
                static_bytes=ladder.static_bytes + staging.blocks.nbytes,
                capture_seconds=ladder.capture_seconds,
                measure_seconds=self._measure_seconds,
            )

    @torch.no_grad()
    def stage(self, budget: int, grids: Sequence[Grid]) -> None:
        """Fills a budget's static metadata for items of these grids, which must fit it. Pixel rows stay as they are."""
        with self._lock, self._guard():
            self.staging.fill(self.ladder.static(budget), grids, [])

    @torch.no_grad()
    def run_unpacked(self, grids: Sequence[Grid]) -> Outputs:
        """Eager forward of items of these grids, which the largest budget must hold, on whatever pixels lie there."""
        with self._lock, self._guard():
            total = sum_counts(self.planner.counts(grid) for grid in grids)
            rows = self.ladder.static(len(self.budgets) - 1).inputs.pixel_values[: total["patch"]]
            return self._run_exact(total, grids, [rows])

    def captured(self, budget: int, alone: bool = False) -> CapturedGraph:
        """The graph of a captured budget. Only the budget that was filled last may be replayed by hand: the static
        buffers hold its metadata.

        Args:
            budget: its index.
            alone: the one for packs of one segment; see `Ladder.runs_alone`.
        """
        return self.ladder.graph(budget, alone)

    @torch.no_grad()
    def poison_padding(self) -> None:
        """Fills the static buffers' pixels with NaN, so that a test can show that stale rows reach no token."""
        with self._lock:
            self.ladder.poison()

    def release(self) -> None:
        """Frees graphs, their pool and the static buffers. The engine cannot run afterwards."""
        with self._lock:
            if self._last_run is not None:
                self._last_run.synchronize()
            self.ladder.release()
            self.staging.blocks.clear()
            self._released = True
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    # -- one pack ----------------------------------------------------------------------------------------------

    def _run_pack(self, pack: Pack, pixels: Sequence[PieceRows], mode: Mode) -> Outputs:
        """The pack's outputs, in memory of their own.

        Args:
            pack: to run.
            pixels: of its pieces, in row order.
            mode: see `Mode`.
        """
        if pack.budget is None or mode == "eager":
            if mode != "eager":
                self._counters.eager(pack)
            return self._run_exact(pack.counts, pack.grids, pixels)
        tokens = self.budgets[pack.budget].tokens
        self._counters.replay(pack, tokens)
        if self.config.verbose:
            logger.info("pack of %d items: %s in budget %d", len(pack.pieces), dict(pack.counts), tokens)
        return self._run_padded(pack, pack.budget, pixels, use_graph=mode == "auto" and self.device.type == "cuda")

    def _run_padded(self, pack: Pack, budget: int, pixels: Sequence[PieceRows], use_graph: bool) -> Outputs:
        buffers = self.ladder.static(budget)
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        if stream is not None and self._last_run is not None and self._last_stream != stream:
            # Static buffers are shared: whatever stream the caller uses, a run follows the one before it.
            stream.wait_event(self._last_run)
        self.staging.fill_pack(buffers, pack, pixels, stream)
        # Asked before the question which form runs: a first capture may decide that.
        captured = use_graph and self._has_graph(pack, budget)
        alone = self.ladder.runs_alone(budget, self.spec.is_long(pack.counts))
        if captured:
            outputs = self.ladder.graph(budget, alone).replay()
            self._counters.stats.graph_replays += 1
        else:
            inputs = self.staging.uncaptured(buffers.inputs_of(alone), pack.grids)
            outputs = copy_outputs(buffers.outputs, self._forward(inputs))
        # The next replay writes over this memory, so the caller gets a copy of the rows that are his.
        filled = zip(outputs, self.spec.outputs, strict=True)
        outputs = tuple(output[:, : pack.counts[spec.rows]].clone() for output, spec in filled)
        if stream is not None:
            self._last_run, self._last_stream = self._last_run or torch.cuda.Event(), stream
            self._last_run.record(stream)
        return outputs

    def _has_graph(self, pack: Pack, budget: int) -> bool:
        reason = self.ladder.missing(budget)
        if reason == WAITING:
            self._counters.stats.waiting += 1
        elif reason:
            self._counters.fall_back(reason, pack)
        return not reason

    def _run_exact(self, total: Counts, grids: Sequence[Grid], pixels: Sequence[PieceRows]) -> Outputs:
        layout = MetadataLayout(self.spec, total, self._attention)
        arena = Arena(self.spec, total, layout.nbytes, self.device, self.dtype)
        buffers = StaticBuffers.create(self.spec, total, layout, arena)
        self.staging.fill(buffers, grids, pixels)
        inputs = buffers.inputs_of(self.spec.is_long(total))
        return self._forward(self.staging.uncaptured(inputs, grids))

    def _forward(self, inputs: TowerBuffers) -> Outputs:
        result = self.tower(inputs)
        return result if isinstance(result, tuple) else (result,)

    def _split(self, pack: Pack, outputs: Outputs, parts: list[list[Part]]) -> None:
        """Hands each piece its rows of the outputs, per item."""
        if len(pack.pieces) == 1:
            parts[pack.pieces[0].item].append((pack.pieces[0].first_frame, outputs))
            return
        counts = [self.planner.counts(grid) for grid in pack.grids]
        split = [
            output.split([c[spec.rows] for c in counts], dim=1)
            for output, spec in zip(outputs, self.spec.outputs, strict=True)
        ]
        for piece, *own in zip(pack.pieces, *split, strict=True):
            parts[piece.item].append((piece.first_frame, tuple(own)))

    def _guard(self) -> AbstractContextManager[object]:
        """The right device; an error after `release()`."""
        if self._released:
            raise EngineReleasedError("this encoder was released; make a new one with from_pretrained().")
        if self.device.type != "cuda" or torch.cuda.current_device() == self.device.index:
            return nullcontext()
        return torch.cuda.device(self.device)


def _attention_shapes(tower: Tower) -> set[tuple[int, int]]:
    """Heads and head dims of the tower's attention layers."""
    return {(layer.heads, layer.head_dim) for layer in tower.modules() if isinstance(layer, Attention)}


def _join(parts: list[Part]) -> Outputs:
    """Outputs of an item from its pieces, in frame order."""
    if len(parts) == 1:
        return parts[0][1]
    in_order = [outputs for _, outputs in sorted(parts, key=lambda part: part[0])]
    return tuple(torch.cat(pieces, dim=1) for pieces in zip(*in_order, strict=True))
