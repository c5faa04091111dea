"""The engine: plans packs, fills static buffers, replays, splits. It knows no family."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from threading import RLock
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vitgraph.attention.base import VarlenAttention
from vitgraph.config import EncoderConfig
from vitgraph.core import Counts, Grid, Pack, Piece
from vitgraph.engine.blocks import BlockCache, copy_block
from vitgraph.engine.buffers import Arena, MetadataLayout, StaticBuffers, with_lengths
from vitgraph.engine.graph import CapturedGraph, GraphPool, copy_outputs
from vitgraph.engine.measure import measure_costs
from vitgraph.engine.pixels import PieceRows, copy_rows
from vitgraph.engine.stats import Stats
from vitgraph.engine.timer import EngineTimer
from vitgraph.errors import EngineReleasedError, FallbackError, PatchError
from vitgraph.models.contract import Tower, TowerBuffers
from vitgraph.planning.budgets import Budget, make_budgets
from vitgraph.planning.metadata import GridPlan, MetadataCache
from vitgraph.planning.packing import Planner

logger = logging.getLogger("vitgraph")

Mode = Literal["auto", "padded", "eager"]
"""How packs run: "auto" replays graphs; "padded" runs the same forward on the same padded static buffers without a
graph; "eager" runs it on buffers of exactly the pack's size."""

COMMON_SIDE = 32

Outputs = tuple[Tensor, ...]
"""One `[levels, rows, width]` per entry of the spec's `outputs`: the tokens `[levels, M, C]` first."""

Part = tuple[int, Outputs]
"""First frame of a piece within its item, and the piece's outputs."""

Progress = Callable[[int, int, str], None]
"""Called as `progress(done, total, text)` during capture."""


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
        self._attention = attention
        self.device, self.dtype = device, dtype
        self.budgets: tuple[Budget, ...] = make_budgets(self.spec, config)
        self.planner = Planner(self.spec, self.budgets)
        self._layouts = [MetadataLayout(self.spec, b.capacity, attention) for b in self.budgets]
        self._cache = MetadataCache(self.spec.counts, tower.metadata, config.metadata_cache)
        self._blocks = BlockCache()
        self._stats = Stats()
        self._lock = RLock()
        self._arena: Arena | None = None
        self._buffers: dict[int, StaticBuffers] = {}
        self._graphs: dict[int, CapturedGraph] = {}
        self._pool: GraphPool | None = None
        self._last_run: torch.cuda.Event | None = None
        self._last_stream: torch.cuda.Stream | None = None
        self._logged: set[str] = set()
        self._uses: dict[int, int] = {}
        self._released = False
        self._captured = not (config.graph and device.type == "cuda")
        if config.compile:
            for region in tower.compile_regions():
                region.compile(dynamic=True)

    # -- public ------------------------------------------------------------------------------------------------

    def plan(self, grids: Sequence[Grid]) -> list[Pack]:
        """How items of these grids would run."""
        with self._lock:
            return self.planner.plan(grids, eager=not self.config.strict)

    def warm_metadata(self, grids: Iterable[Grid] | None = None) -> None:
        """Computes the metadata of grids ahead of their first use.

        Args:
            grids: default: the square images of up to 32 x 32 tokens.
        """
        self._cache.warm(self._common_grids() if grids is None else grids)

    def _common_grids(self) -> Iterable[Grid]:
        for side in range(1, COMMON_SIDE + 1):
            grid = Grid(1, side * self.spec.merge, side * self.spec.merge)
            try:
                self.spec.check_grid(grid)
            except PatchError:
                continue
            yield grid

    @torch.no_grad()
    def capture(self, progress: Progress | None = None) -> None:
        """Captures every budget into one pool, largest first: the smaller ones then find memory to share.

        Under a `memory_limit` the smallest come first, since they gain most from a graph. Does nothing on the CPU or
        when already captured.
        """
        with self._lock, self._guard():
            if self._captured:
                return
            self.warm_metadata()
            order = list(range(len(self.budgets)))
            if self.config.memory_limit is None:
                order.reverse()
            if self._last_run is not None:
                self._last_run.synchronize()
            # Zeros are valid metadata in every layout; what another budget left there need not be.
            arena = self._static(order[0]).arena
            arena.block.zero_()
            arena.make_slots()
            warm_ups = self._warm_up_indexes(order)
            for done, index in enumerate(order):
                if progress:
                    progress(done, len(order), f"{self.budgets[index].tokens} tokens")
                if index not in self._graphs and not self._capture_one(index, warm_up=index in warm_ups):
                    break
            self._captured = True
            if self.config.measure and self._graphs:
                if progress:
                    progress(len(order), len(order), "timing")
                self._measure()
            if progress:
                progress(len(order), len(order), "done")

    def _measure(self) -> None:
        start = time.perf_counter()
        self.planner.cost = measure_costs(self.spec, self.budgets, sorted(self._graphs), EngineTimer(self))
        self._stats.measure_seconds = time.perf_counter() - start
        timed = sum(self.planner.cost.measured)
        logger.debug("timed %d of %d budgets in %.2f s", timed, len(self.budgets), self._stats.measure_seconds)

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
            if mode == "auto" and not self._captured and not self.config.lazy:
                self.capture()
            mode = mode if self.config.graph else "eager"
            exact = mode == "eager"
            packs = self.planner.plan(grids, split=not exact, eager=mode == "auto" and not self.config.strict)
            together = len(packs) == 1 and len(packs[0].pieces) == len(grids)
            if isinstance(rows, Tensor) and not together:
                rows = rows.split([grid.patches for grid in grids])
            parts: list[list[Part]] = [[] for _ in grids]
            self._count_items(packs, len(grids))
            for pack in packs:
                self._run_pack(pack, rows, mode, parts)
        return [_join(item) for item in parts]

    @property
    def stats(self) -> Stats:
        """A snapshot of the counters."""
        with self._lock:
            return replace(
                self._stats,
                fallbacks=dict(self._stats.fallbacks),
                metadata_hits=self._cache.hits,
                metadata_misses=self._cache.misses,
                captured_graphs=len(self._graphs),
                graph_bytes=self._pool.nbytes if self._pool else 0,
                static_bytes=(self._arena.nbytes if self._arena else 0) + self._blocks.nbytes,
            )

    @torch.no_grad()
    def stage(self, budget: int, grids: Sequence[Grid]) -> None:
        """Fills a budget's static metadata for items of these grids, which must fit it. Pixel rows stay as they are."""
        with self._lock, self._guard():
            self._fill(self._static(budget), [self._cache.get(grid) for grid in grids], [])

    @torch.no_grad()
    def run_unpacked(self, grids: Sequence[Grid]) -> Outputs:
        """Eager forward of items of these grids, which the largest budget must hold, on whatever pixels lie there."""
        with self._lock, self._guard():
            counts = [self.planner.counts(grid) for grid in grids]
            total = {kind: sum(c[kind] for c in counts) for kind in counts[0]}
            rows = self._static(len(self.budgets) - 1).inputs.pixel_values[: total["patch"]]
            return self._run_exact(total, grids, [rows])

    def captured(self, budget: int) -> CapturedGraph:
        """The graph of a captured budget, by its index. Only the budget that ran last may be replayed by hand: the
        static buffers hold its metadata."""
        return self._graphs[budget]

    @torch.no_grad()
    def poison_padding(self) -> None:
        """Fills the static buffers' pixels with NaN, so that a test can show that stale rows reach no token."""
        with self._lock:
            if self._arena is not None:
                self._arena.pixels.fill_(float("nan"))

    def release(self) -> None:
        """Frees graphs, their pool and the static buffers. The engine cannot run afterwards."""
        with self._lock:
            if self._last_run is not None:
                self._last_run.synchronize()
            self._graphs.clear()
            self._buffers.clear()
            self._blocks.clear()
            self._pool = self._arena = None
            self._released = True
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    # -- one pack ----------------------------------------------------------------------------------------------

    def _run_pack(self, pack: Pack, rows: Tensor | Sequence[Tensor], mode: Mode, parts: list[list[Part]]) -> None:
        """Runs one pack and hands each piece its rows of the output.

        Args:
            pack: to run.
            rows: of the pack's pieces, one after another, or of every item.
            mode: see `Mode`.
            parts: per item, filled.
        """
        pixels = _pixels_of(pack, rows)
        self._stats.packs += 1
        if pack.budget is None or mode == "eager":
            if mode != "eager":
                self._fall_back(pack)
            outputs = self._run_exact(pack.counts, pack.grids, pixels)
        else:
            self._count_replay(pack)
            outputs = self._run_padded(pack, pixels, use_graph=mode == "auto")
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

    def _run_padded(self, pack: Pack, pixels: Sequence[PieceRows], use_graph: bool) -> Outputs:
        assert pack.budget is not None
        buffers = self._static(pack.budget)
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        if stream is not None and self._last_run is not None and self._last_stream != stream:
            # Static buffers are shared: whatever stream the caller uses, a run follows the one before it.
            stream.wait_event(self._last_run)
        self._fill_pack(buffers, pack, pixels, stream)
        if use_graph and self.device.type == "cuda" and self._has_graph(pack.budget):
            outputs = self._graphs[pack.budget].replay()
            self._stats.graph_replays += 1
        else:
            inputs = self._uncaptured_inputs(buffers.inputs, pack.grids)
            outputs = copy_outputs(buffers.outputs, self._forward(inputs))
        # The next replay writes over this memory, so the caller gets a copy of the rows that are his.
        filled = zip(outputs, self.spec.outputs, strict=True)
        outputs = tuple(output[:, : pack.counts[spec.rows]].clone() for output, spec in filled)
        if stream is not None:
            self._last_run, self._last_stream = self._last_run or torch.cuda.Event(), stream
            self._last_run.record(stream)
        return outputs

    def _forward(self, inputs: TowerBuffers) -> Outputs:
        result = self.tower(inputs)
        return result if isinstance(result, tuple) else (result,)

    def _run_exact(self, total: Counts, grids: Sequence[Grid], pixels: Sequence[PieceRows]) -> Outputs:
        layout = MetadataLayout(self.spec, total, self._attention)
        arena = Arena(self.spec, total, layout.nbytes, self.device, self.dtype)
        buffers = StaticBuffers.create(self.spec, total, layout, arena)
        self._fill(buffers, [self._cache.get(grid) for grid in grids], pixels)
        return self._forward(self._uncaptured_inputs(buffers.inputs, grids))

    def _fill_pack(
        self, buffers: StaticBuffers, pack: Pack, pixels: Sequence[PieceRows], stream: torch.cuda.Stream | None
    ) -> None:
        """Fills the static buffers of the pack's budget, its metadata from the device if it is kept there."""
        key = pack.budget, pack.grids
        kept = self._blocks.find(key)
        if kept is None:
            self._fill(buffers, [self._cache.get(grid) for grid in pack.grids], pixels, stream)
            self._blocks.offer(key, buffers.block)
            return
        self._cache.count_hits(len(pack.grids))
        copy_block(buffers.block, kept, stream)
        if all(rows.device == self.device for rows in pixels):
            copy_rows(buffers.inputs.pixel_values, pixels, None)
            return
        slot = buffers.arena.next_slot()
        copy_rows(buffers.inputs.pixel_values, pixels, slot)
        slot.record(stream)

    def _fill(
        self,
        buffers: StaticBuffers,
        plans: Sequence[GridPlan],
        pixels: Sequence[PieceRows],
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        """One staged copy of all metadata, then the pixel rows, all in stream order.

        Args:
            buffers: to fill.
            plans, pixels: of the pieces, in row order.
            stream: the current stream, or None to look it up.
        """
        slot = buffers.arena.next_slot()
        buffers.layout.write(slot.arrays(buffers.layout), plans)
        buffers.block.copy_(slot.block[: buffers.layout.nbytes], non_blocking=True)
        copy_rows(buffers.inputs.pixel_values, pixels, slot)
        slot.record(stream)

    def _uncaptured_inputs(self, inputs: TowerBuffers, grids: Sequence[Grid]) -> TowerBuffers:
        """On the CPU the reference attention may use the host's segment lengths; nothing else changes."""
        if self.device.type == "cuda":
            return inputs
        lengths = {}
        plans = [self._cache.peek(grid) for grid in grids]
        for segments in self.spec.segments:
            ends = [np.diff(plan.metadata[segments.name], prepend=0) for plan in plans]
            lengths[segments.name] = tuple(int(n) for n in np.concatenate(ends))
        return with_lengths(inputs, lengths)

    # -- buffers and graphs ------------------------------------------------------------------------------------

    def _static(self, index: int) -> StaticBuffers:
        if self._arena is None:
            nbytes = max(layout.nbytes for layout in self._layouts)
            self._arena = Arena(self.spec, self.budgets[-1].capacity, nbytes, self.device, self.dtype)
        if index not in self._buffers:
            capacity, layout = self.budgets[index].capacity, self._layouts[index]
            self._buffers[index] = StaticBuffers.create(self.spec, capacity, layout, self._arena)
        return self._buffers[index]

    def _has_graph(self, index: int) -> bool:
        """Whether the budget's graph can be replayed; with `lazy`, captures it on use number `lazy_after`."""
        if index in self._graphs:
            return True
        if not self._captured:
            self._uses[index] = self._uses.get(index, 0) + 1
            if self._uses[index] < self.config.lazy_after:
                self._stats.waiting += 1
                return False
            if self._capture_one(index):
                return True
        self._captured = True  # the memory limit is reached: no later budget can be captured either
        reason = "budget not captured: memory limit reached"
        if self.config.strict:
            raise FallbackError(f"strict=True and budget {self.budgets[index].tokens} has no graph: {reason}.")
        self._count_fallback(reason)
        return False

    def _warm_up_indexes(self, order: Sequence[int]) -> set[int]:
        """Budgets that run once before capture: the largest, the smallest, and the first with each tile size.

        A warm-up compiles kernels and makes workspaces; the other budgets use the same ones.
        """
        blocks = {tuple(s.block for s in self._layouts[index].schedules): index for index in sorted(order)}
        return {order[0], order[-1], *blocks.values()}

    @torch.no_grad()
    def _capture_one(self, index: int, warm_up: bool = True) -> bool:
        """Captures one budget; False when the memory limit is reached."""
        limit = self.config.memory_limit
        self._pool = self._pool or GraphPool(self.device)
        if limit is not None and self._pool.nbytes >= limit:
            logger.warning(
                "capture stopped at budget %d: graphs hold %.0f MB, memory_limit is %.0f MB; budgets without a graph "
                "run the same padded forward",
                self.budgets[index].tokens,
                self._pool.nbytes / 1e6,
                limit / 1e6,
            )
            return False
        start = time.perf_counter()
        buffers = self._static(index)
        graph = self._pool.capture(self._forward, buffers.inputs, buffers.outputs, warm_up)
        self._graphs[index] = graph
        self._stats.capture_seconds += time.perf_counter() - start
        level = logging.INFO if self.config.verbose else logging.DEBUG
        logger.log(
            level,
            "captured %d tokens in %.1f ms, %.1f MB",
            self.budgets[index].tokens,
            graph.seconds * 1e3,
            graph.nbytes / 1e6,
        )
        return True

    # -- order on the device, errors, counters -----------------------------------------------------------------

    def _guard(self) -> AbstractContextManager[object]:
        if self._released:
            raise EngineReleasedError("this encoder was released; make a new one with from_pretrained().")
        if self.device.type != "cuda" or torch.cuda.current_device() == self.device.index:
            return nullcontext()
        return torch.cuda.device(self.device)

    def _fall_back(self, pack: Pack) -> None:
        if self.config.graph and self.config.strict:
            grids = ", ".join("x".join(map(str, piece.grid)) for piece in pack.pieces)
            raise FallbackError(f"strict=True and the items {grids} cannot use a graph: {pack.reason}.")
        self._stats.eager_packs += 1
        self._count_fallback(pack.reason)

    def _count_fallback(self, reason: str) -> None:
        self._stats.fallbacks[reason] = self._stats.fallbacks.get(reason, 0) + 1
        if reason not in self._logged:
            self._logged.add(reason)
            logger.warning("running without a graph: %s (logged once, counted in stats.fallbacks)", reason)

    def _count_replay(self, pack: Pack) -> None:
        assert pack.budget is not None
        budget = self.budgets[pack.budget].tokens
        self._stats.replays += 1
        self._stats.real_tokens += pack.counts["token"]
        self._stats.padded_tokens += budget
        if self.config.verbose:
            logger.info("pack of %d items: %s in budget %d", len(pack.pieces), dict(pack.counts), budget)

    def _count_items(self, packs: Sequence[Pack], items: int) -> None:
        self._stats.items += items
        whole = {piece.item for pack in packs for piece in pack.pieces if piece.first_frame > 0}
        self._stats.split_items += len(whole)


def _pixels_of(pack: Pack, rows: Tensor | Sequence[Tensor]) -> list[PieceRows]:
    if isinstance(rows, Tensor):
        return [rows]
    return [piece_rows(rows[piece.item], piece) for piece in pack.pieces]


def piece_rows(rows: Tensor, piece: Piece) -> PieceRows:
    """The rows of one piece within its item's rows: frames are contiguous in every row order."""
    if rows.shape[0] == piece.grid.patches:
        return rows
    start = piece.first_frame * piece.grid.h * piece.grid.w
    return rows[start : start + piece.grid.patches]


def _join(parts: list[Part]) -> Outputs:
    """Outputs of an item from its pieces, in frame order."""
    if len(parts) == 1:
        return parts[0][1]
    in_order = [outputs for _, outputs in sorted(parts, key=lambda part: part[0])]
    return tuple(torch.cat(pieces, dim=1) for pieces in zip(*in_order, strict=True))
