"""The budgets of one tower with their static buffers and graphs: what is allocated and captured, and when."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from vitgraph.attention.base import VarlenAttention, has_own_graph, kernel_of
from vitgraph.config import EncoderConfig
from vitgraph.core import Counts
from vitgraph.engine.buffers import Arena, MetadataLayout, StaticBuffers
from vitgraph.engine.compose import Composer
from vitgraph.engine.gemms import Gemms
from vitgraph.engine.graph import CapturedGraph, GraphPool
from vitgraph.engine.intake import Intake, make_intake
from vitgraph.launch import compiling
from vitgraph.models.contract import TowerBuffers, TowerSpec
from vitgraph.planning.budgets import make_budgets

logger = logging.getLogger("vitgraph")

Progress = Callable[[int, int, str], None]
"""Called as `progress(done, total, text)` during capture."""

WAITING = "budget not used often enough yet"
LIMIT_REACHED = "budget not captured: memory limit reached"


class Ladder:
    """Budgets, their views of one arena, and their graphs in one pool.

    A budget has a second graph, in `long`, where the attention has another kernel for packs of one or of long
    segments; see `TowerSpec.is_long`.

    Args:
        spec: of the tower.
        forward: the tower's forward, as a tuple of outputs.
        device, dtype: of the tower.
        config: see `EncoderConfig`.
        attention: the tower's backend, which may want tile schedules.
        gemms: chooses the algorithms of the forward's products, if anything does.
    """

    def __init__(
        self,
        spec: TowerSpec,
        forward: Callable[[TowerBuffers], tuple[Tensor, ...]],
        device: torch.device,
        dtype: torch.dtype,
        config: EncoderConfig,
        attention: VarlenAttention,
        gemms: Gemms | None = None,
    ) -> None:
        self.budgets = make_budgets(spec, config)
        self.graphs: dict[int, CapturedGraph] = {}
        self.long: dict[int, CapturedGraph] = {}
        self.complete = not (config.graph and device.type == "cuda")
        self.capture_seconds = 0.0
        self._spec, self._forward, self._config = spec, forward, config
        self._device, self._dtype, self._attention, self._gemms = device, dtype, attention, gemms
        self._layouts = [MetadataLayout(spec, budget.capacity, attention) for budget in self.budgets]
        self._arena: Arena | None = None
        self._buffers: dict[int, StaticBuffers] = {}
        self._pool: GraphPool | None = None
        self._uses: dict[int, int] = {}
        # Elsewhere there is nothing to compile or to measure.
        self._settled = set() if device.type == "cuda" or gemms else set(range(len(self.budgets)))
        self._compiled: set[Hashable] = set()

    @property
    def graph_bytes(self) -> int:
        """Device memory of the graphs' pool."""
        return self._pool.nbytes if self._pool else 0

    @property
    def static_bytes(self) -> int:
        """Device memory of the static buffers."""
        return self._arena.nbytes if self._arena else 0

    @property
    def composer(self) -> Composer | None:
        """What composes metadata on the device; None where the host writes it, or nothing is allocated yet."""
        return self.intake.composer if self.intake else None

    @property
    def intake(self) -> Intake | None:
        """What brings packs to graphs; None where the host does, or nothing is allocated yet."""
        return self._arena.intake if self._arena else None

    def static(self, index: int) -> StaticBuffers:
        """The static buffers of a budget, made on first use."""
        if index not in self._buffers:
            capacity, layout = self.budgets[index].capacity, self._layouts[index]
            self._buffers[index] = StaticBuffers.create(self._spec, capacity, layout, self._make_arena())
        return self._buffers[index]

    def _make_arena(self) -> Arena:
        if self._arena is None:
            nbytes = max(layout.nbytes for layout in self._layouts)
            capacity = self.budgets[-1].capacity
            self._arena = Arena(self._spec, capacity, nbytes, self._device, self._dtype)
            self._arena.intake = make_intake(self._spec, self._layouts, capacity, self._arena)
        return self._arena

    def runs_long(self, index: int, counts: Counts) -> bool:
        """Whether a pack runs the budget's second form, with the kernel for packs of one or of long segments.

        Args:
            index: of the budget.
            counts: rows of each kind that the pack fills.
        """
        long = index in self.long if index in self.graphs else self._has_long(index)
        return long and self._spec.is_long(counts)

    def _has_long(self, index: int) -> bool:
        return has_own_graph(self._attention, self.budgets[index].capacity["patch"])

    def graph(self, index: int, long: bool = False) -> CapturedGraph:
        """A captured budget's graph; see `runs_long`."""
        return self.long[index] if long else self.graphs[index]

    def missing(self, index: int) -> str:
        """Why a budget has no graph; empty when it has one. A lazy ladder captures it on use number `lazy_after`."""
        if index in self.graphs:
            return ""
        if not self.complete:
            self._uses[index] = self._uses.get(index, 0) + 1
            if self._uses[index] < self._config.lazy_after:
                return WAITING
            self.settle(index)
            # A warm-up runs on what lies there, and the metadata of another budget is none of this one.
            self._make_arena().clear_block()
            with self._capturing() as pool:
                if self._capture(pool, index):
                    return ""
        self.complete = True  # the memory limit is reached: no later budget can be captured either
        return LIMIT_REACHED

    def capture(self, progress: Progress | None = None) -> None:
        """Captures every budget, largest first: the smaller ones then find memory to share.

        Under a `memory_limit` the smallest come first, since they gain most from a graph. Nothing may be running on the
        static buffers. Ends with a full collection of Python's garbage.
        """
        order = list(range(len(self.budgets)))
        if self._config.memory_limit is None:
            order.reverse()
        arena = self._make_arena()
        arena.make_slots()
        arena.clear_block()
        self._settle(order, progress)
        warm_ups = self._warm_ups(order)
        with self._capturing() as pool:
            for done, index in enumerate(order):
                if progress:
                    progress(done, len(order), f"{self.budgets[index].tokens} tokens")
                if index not in self.graphs and not self._capture(pool, index, warm_up=index in warm_ups):
                    break
            # A full collection looks at all that was ever imported, for a quarter of a second. What was made until here
            # brings one about: now, while the last graphs become executable, instead of in a request.
            gc.collect()
        self.complete = True

    def poison(self) -> None:
        """Fills the pixel rows with NaN."""
        if self._arena is not None:
            self._arena.pixels.fill_(float("nan"))

    def release(self) -> None:
        """Drops graphs, their pool and the static buffers."""
        self.graphs.clear()
        self.long.clear()
        self._buffers.clear()
        self._pool = self._arena = None

    def _warm_ups(self, order: Sequence[int]) -> set[int]:
        """Budgets that run once before capture: the largest, the smallest, and the first with each attention kernel.

        A warm-up loads kernels and makes workspaces; the other budgets use the same ones.
        """
        return {order[0], order[-1], *self._by_kernels(sorted(order)).values()}

    def _by_kernels(self, order: Iterable[int]) -> dict[Hashable, int]:
        """Attention kernels -> the last budget that runs them."""
        found: dict[Hashable, int] = {}
        for index in order:
            layout = self._layouts[index]
            kernels = (kernel_of(self._attention, s.rows, layout.longest[s.segments]) for s in layout.schedules)
            found[tuple(kernels)] = index
        return found

    def settle(self, index: int) -> None:
        """Compiles and measures what has yet to be for a budget, so that its forward runs the same kernels before its
        capture, in it, and without it. The metadata that lies there is lost."""
        if index not in self._settled:
            self._make_arena().clear_block()
            self._settle([index])

    def _settle(self, indices: Sequence[int], progress: Progress | None = None) -> None:
        start = time.perf_counter()
        self._settled.update(indices)
        self._compile_kernels(indices, progress)
        self._choose_algorithms(indices, progress)
        self.capture_seconds += time.perf_counter() - start

    def _compile_kernels(self, indices: Sequence[int], progress: Progress | None) -> None:
        """Compiles what these budgets launch, several kernels at once."""
        # The smallest budget of each attention kernel, for products of matrices do run.
        smallest = self._by_kernels(sorted(indices, reverse=True))
        missing = {kernels: index for kernels, index in smallest.items() if kernels not in self._compiled}
        if not missing or self._device.type != "cuda" or find_spec("triton") is None:
            return
        self._compiled.update(missing)
        if progress:
            progress(0, len(indices), "compiling kernels")
        with compiling(self._device):
            for index in missing.values():
                buffers = self.static(index)
                if buffers.arena.intake is not None:
                    buffers.arena.intake.launch(buffers)
                self._forward(buffers.inputs)

    def _choose_algorithms(self, indices: Sequence[int], progress: Progress | None = None) -> None:
        """Of the products of these budgets, by those of the smallest one, whose forward runs once."""
        if self._gemms is None:
            return
        smallest = min(indices)
        rows = {index: self.budgets[index].capacity["patch"] for index in indices}
        with self._gemms.seeing() as seen:
            self._forward(self.static(smallest).inputs)
        tell = partial(progress, 0, len(indices), "measuring GEMMs") if progress else None
        self._gemms.choose(seen, rows[smallest], rows.values(), tell)

    @contextmanager
    def _capturing(self) -> Iterator[GraphPool]:
        """What is captured in the block can be replayed after it."""
        start, intake = time.perf_counter(), self._make_arena().intake
        self._pool = pool = self._pool or GraphPool(self._device, intake.mailbox if intake else None)
        try:
            yield pool
        finally:
            pool.finish()
            self.capture_seconds += time.perf_counter() - start

    def _capture(self, pool: GraphPool, index: int, warm_up: bool = True) -> bool:
        """Captures one budget; False when the memory limit is reached."""
        tokens = self.budgets[index].tokens
        if self._limit_is_reached(pool, tokens):
            return False
        buffers = self.static(index)
        if buffers.arena.intake is not None:
            buffers.arena.intake.warm_up(buffers)
        graph = self._graph_of(pool, buffers, buffers.inputs, warm_up)
        self.graphs[index] = graph
        # Asked after the warm-up, in which the attention measures its kernels.
        if self._has_long(index):
            self.long[index] = self._graph_of(pool, buffers, buffers.long, warm_up)
        level = logging.INFO if self._config.verbose else logging.DEBUG
        logger.log(level, "captured %d tokens in %.1f ms", tokens, graph.seconds * 1e3)
        return True

    def _limit_is_reached(self, pool: GraphPool, tokens: int) -> bool:
        """Whether the budget of so many tokens gets no graph."""
        limit = self._config.memory_limit
        if limit is None:
            return False
        pool.finish()  # what is not yet executable takes more memory then
        if pool.nbytes < limit:
            return False
        logger.warning(
            "capture stopped at budget %d: graphs hold %.0f MB, memory_limit is %.0f MB; budgets without a graph "
            "run the same padded forward",
            tokens,
            pool.nbytes / 1e6,
            limit / 1e6,
        )
        return True

    def _graph_of(self, pool: GraphPool, buffers: StaticBuffers, inputs: TowerBuffers, warm_up: bool) -> CapturedGraph:
        """A graph of the forward. A capture without warm-up that fails is tried again with one: torch.compile may make
        code of its own for some sizes, whose first run measures kernels."""
        intake = buffers.arena.intake
        begin = partial(intake.launch, buffers) if intake else None
        capture = partial(pool.capture, self._forward, inputs, buffers.outputs, begin=begin)
        if not warm_up:
            try:
                return capture(warm_up=False)
            except RuntimeError as error:
                logger.debug("capture without a warm-up failed, warming up: %s", error)
        return capture()
