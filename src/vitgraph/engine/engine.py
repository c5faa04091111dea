"""The engine: plans packs, fills static buffers, replays, splits. It knows no family."""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from threading import RLock

import torch
from torch import Tensor

from vitgraph.attention.base import VarlenAttention, tune
from vitgraph.config import EncoderConfig
from vitgraph.core import Grid, Grids, KnownGrid, Pack, sum_counts
from vitgraph.embedding import VisionEmbedding
from vitgraph.engine.fast_path import FastPath
from vitgraph.engine.gemms import make_gemms
from vitgraph.engine.graph import CapturedGraph
from vitgraph.engine.ladder import Ladder, Progress
from vitgraph.engine.measure import measure_costs
from vitgraph.engine.order import RunOrder
from vitgraph.engine.prepared import PreparedBatch, PreparedBatches, PreparedReplay
from vitgraph.engine.results import Outputs, Ran, embeddings, outputs_of
from vitgraph.engine.runner import Mode, PackRunner
from vitgraph.engine.staging import Staging
from vitgraph.engine.stats import Counters, Stats
from vitgraph.engine.timer import EngineTimer
from vitgraph.errors import EngineReleasedError
from vitgraph.layers.block import Attention
from vitgraph.layers.rotary import settle_cos_and_sin
from vitgraph.models.contract import Tower, TowerBuffers
from vitgraph.planning.budgets import Budget
from vitgraph.planning.packing import Planner, check_rows
from vitgraph.workspace import without_workspace

__all__ = ["Engine", "Mode", "Outputs", "Progress"]

logger = logging.getLogger("vitgraph")


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
        if device.type == "cpu":
            settle_cos_and_sin()
        for heads, head_dim in sorted(_attention_shapes(tower)):
            tune(attention, heads, head_dim, device, dtype)
        # What torch.compile made is not looked into.
        self.gemms = make_gemms(device, dtype) if config.graph and not config.compile else None
        self.ladder = Ladder(self.spec, self._forward_static, device, dtype, config, attention, self.gemms)
        self.planner = Planner(self.spec, self.budgets, compiled=device.type == "cuda")
        self.staging = Staging(tower, device, config.metadata_cache)
        self._counters = Counters(config.graph and config.strict)
        self._order = RunOrder(device)
        self._runner = PackRunner(
            self.spec, self._forward, self._forward_static, device, dtype, config, attention,
            self.ladder, self.staging, self._order, self._counters,
        )  # fmt: skip
        self._fast_path = FastPath(self.ladder, self.staging, self._order, not config.strict)
        self._prepared = PreparedBatches()
        self._measure_seconds = 0.0
        self._lock = RLock()
        self._one_device = device.type == "cpu" or torch.cuda.device_count() == 1
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

    def known(self, grid: Grid) -> KnownGrid:
        """What is known of a grid, for `Grids`."""
        with self._lock:
            return self.planner.known(grid)

    def warm_metadata(self, grids: Iterable[Grid] | None = None) -> None:
        """Computes the metadata of grids ahead of their first use. What is captured keeps it on the device, too.

        Args:
            grids: default: the square images of up to 32 x 32 tokens.
        """
        with self._lock, self._guard():
            stream = self._order.enter()
            given = self.staging.common_grids() if grids is None else grids
            self.staging.warm([self.planner.known(grid) for grid in given], self.ladder.composer)
            self._order.leave(stream)

    @torch.no_grad()
    def capture(self, progress: Progress | None = None) -> None:
        """Captures every budget, then times them. Does nothing on the CPU or when already captured."""
        with self._lock, self._guard():
            if self.ladder.complete:
                return
            self._order.synchronize()
            stream = self._order.enter()
            self.ladder.capture(progress)
            self._order.leave(stream)
            self.warm_metadata()
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
            PatchError: the rows of all items are others than the grids hold.
            FallbackError: with `strict=True`, when a pack cannot use a budget.
            EngineReleasedError: after `release()`.
        """
        key = tuple(grids)
        ran = None
        if mode == "auto" and isinstance(rows, Tensor):
            ran = self._run_again(key, rows)
            if ran is None:
                with self._lock:
                    grids = self.planner.batch(grids)
                ran = self._run_new(key, grids.known, rows)
        packs = self._run(rows, grids, mode, key) if ran is None else ran[0]
        kinds = [output.rows for output in self.spec.outputs]
        return outputs_of(packs, len(grids), kinds, self.planner.counts)

    def embed(
        self,
        rows: Tensor | Sequence[Tensor],
        grids: Sequence[Grid],
        mode: Mode = "auto",
        key: Hashable | None = None,
    ) -> list[VisionEmbedding]:
        """As `run`, in the form that `VisionEncoder` returns.

        Args:
            rows, grids, mode: see `run`.
            key: under which `embed_again` will find what is prepared here; default: the grids in a tuple.
        """
        return embeddings(self._run(rows, grids, mode, key), grids)

    def embed_again(self, key: Hashable, rows: Tensor) -> list[VisionEmbedding] | None:
        """As `embed` with mode "auto", for a batch whose replays are prepared: nothing is planned, looked up or sliced.

        Args:
            key: as in `embed`.
            rows: pixel rows of all items one after another.

        Returns:
            None where nothing is prepared, or the rows are not what it was prepared for.
        """
        again = self._run_again(key, rows)
        return None if again is None else embeddings(*again)

    def embed_new(self, key: Hashable | None, known: list[KnownGrid], rows: Tensor) -> list[VisionEmbedding] | None:
        """As `embed` with mode "auto", for a batch whose replays are not prepared, where everything that graphs read
        lies on the device: all is launched before anything else is made of it.

        Args:
            key: as in `embed`.
            known: of the items' grids.
            rows: of all items, not checked.

        Returns:
            None where nothing was launched: `embed` can do it.

        Raises:
            PatchError: the rows of all items are others than the grids hold.
            EngineReleasedError: after `release()`.
        """
        new = self._run_new(key, known, rows) if isinstance(rows, Tensor) else None
        return None if new is None else embeddings(*new)

    @property
    def stats(self) -> Stats:
        """A snapshot of the counters."""
        with self._lock:
            ladder, staging = self.ladder, self.staging
            return replace(
                self._counters.stats,
                fallbacks=dict(self._counters.stats.fallbacks),
                metadata_hits=staging.grids.hits + staging.spared,
                metadata_misses=staging.grids.misses,
                host_metadata=staging.written_on_host,
                python_searches=self.planner.searched_in_python,
                captured_graphs=len(ladder.graphs) + len(ladder.long),
                graph_bytes=ladder.graph_bytes,
                static_bytes=ladder.static_bytes,
                capture_seconds=ladder.capture_seconds,
                measure_seconds=self._measure_seconds,
            )

    @torch.no_grad()
    def stage(self, budget: int, grids: Sequence[Grid]) -> None:
        """Fills a budget's static metadata for items of these grids, which must fit it. Pixel rows stay as they are."""
        with self._lock, self._guard():
            stream = self._order.enter()
            self.staging.fill(self.ladder.static(budget), grids, [], stream, counted=False)
            self._order.leave(stream)

    @torch.no_grad()
    def run_unpacked(self, grids: Sequence[Grid]) -> Outputs:
        """Eager forward of items of these grids, which the largest budget must hold, on whatever pixels lie there."""
        with self._lock, self._guard():
            total = sum_counts(self.planner.counts(grid) for grid in grids)
            rows = self.ladder.static(len(self.budgets) - 1).inputs.pixel_values[: total["patch"]]
            return self._runner.run_exact(total, grids, [rows])

    def captured(self, budget: int, long: bool = False) -> CapturedGraph:
        """The graph of a captured budget. Only the budget that was filled last may be replayed by hand: the static
        buffers hold its metadata.

        Args:
            budget: its index.
            long: the one for packs of one or of long segments; see `Ladder.runs_long`.
        """
        return self.ladder.graph(budget, long)

    @torch.no_grad()
    def poison_padding(self) -> None:
        """Fills the static buffers' pixels with NaN, so that a test can show that stale rows reach no token."""
        with self._lock:
            self.ladder.poison()

    def release(self) -> None:
        """Frees graphs, their pool and the static buffers. The engine cannot run afterwards."""
        with self._lock:
            self._order.synchronize()
            self.ladder.release()
            self._prepared.clear()
            self._released = True
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    # -- one call ----------------------------------------------------------------------------------------------

    def _run(
        self, rows: Tensor | Sequence[Tensor], grids: Sequence[Grid], mode: Mode, key: Hashable | None
    ) -> list[Ran]:
        with self._lock, self._guard():
            count = rows.shape[0] if isinstance(rows, Tensor) else None
            if mode == "auto" and not self.ladder.complete and not self.config.lazy:
                check_rows(count, sum(grid.patches for grid in grids))  # a mistake shall not wait for a capture
                self.capture()
            mode = mode if self.config.graph else "eager"
            # The static rows must not come to need gradients; nothing else on the way to a replay could record any.
            if not isinstance(rows, Tensor):
                rows = [own.detach() for own in rows]
            elif rows.requires_grad:
                rows = rows.detach()
            as_one = rows if mode == "auto" and isinstance(rows, Tensor) else None
            ran: list[Ran] = []
            replays: list[PreparedReplay] = []
            eager = mode == "auto" and not self.config.strict
            # Each pack is launched before the next one is made.
            for pack in self.planner.packs(grids, mode != "eager", eager, count):
                replay = None if as_one is None else self._runner.prepare(pack)
                if replay is None:
                    ran.append((pack, self._runner.run(pack, rows, mode)))
                else:
                    replays.append(replay)
                    ran.append((pack, self._runner.replay(replay, rows)))
            self._counters.plan([pack for pack, _ in ran], len(grids))
            if as_one is not None and len(replays) == len(ran):
                self._keep(key, grids, as_one.shape, replays)
            return ran

    def _replay(self, batch: PreparedBatch, rows: Tensor) -> list[Ran]:
        ran = [(replay.pack, self._runner.replay(replay, rows)) for replay in batch.replays]
        self._counters.plan([pack for pack, _ in ran], len(batch.grids))
        return ran

    def _run_new(self, key: Hashable | None, known: list[KnownGrid], rows: Tensor) -> tuple[list[Ran], Grids] | None:
        """A batch that is not prepared, on the fast path: its packs and its grids; see `FastPath.launch`."""
        with self._lock, self._guard():
            launched = self._fast_path.launch(self.planner, known, rows)
            if launched is None:
                return None
            grids = self.planner.batch_of(known)
            replays = [replay for replay, _ in launched]
            for replay in replays:
                self._runner.note(replay)
            ran = [(replay.pack, outputs) for replay, outputs in launched]
            self._counters.plan([pack for pack, _ in ran], len(grids))
            self._keep(key, grids, rows.shape, replays)
            return ran, grids

    def _keep(
        self, key: Hashable | None, grids: Sequence[Grid], shape: torch.Size, replays: Sequence[PreparedReplay]
    ) -> None:
        batch = PreparedBatch(grids, shape, replays, self.planner.cost)
        self._prepared.keep(tuple(grids) if key is None else key, batch)

    def _run_again(self, key: Hashable, rows: Tensor | Sequence[Tensor]) -> tuple[list[Ran], Sequence[Grid]] | None:
        """A batch that is prepared: its packs and its grids."""
        if not isinstance(rows, Tensor):
            return None
        batch = self._prepared.find(key, rows.shape)
        if batch is None:
            return None
        # Gradients are not recorded below: rows that need none spare us to say so.
        if rows.requires_grad or not rows.is_floating_point():
            return None
        with self._lock:
            # All that another thread may have changed meanwhile.
            if batch.cost is not self.planner.cost or not all(map(self._runner.is_current, batch.replays)):
                self._prepared.drop(key)
                return None
            with self._guard():
                return self._replay(batch, rows), batch.grids

    @torch.no_grad()
    def _forward(self, inputs: TowerBuffers) -> Outputs:
        before = _version(inputs)
        with without_workspace(self.device), _compile_settings() if self.config.compile else nullcontext():
            result = self.tower(inputs)
        if before is None or before != _version(inputs):
            self.staging.metadata_is_only_read = False
        return result if isinstance(result, tuple) else (result,)

    def _forward_static(self, inputs: TowerBuffers) -> Outputs:
        """As `_forward`, on the static buffers of a budget: products run by the algorithms that were chosen for it."""
        if self.gemms is None:
            return self._forward(inputs)
        with self.gemms.applied():
            return self._forward(inputs)

    def _guard(self) -> AbstractContextManager[object]:
        """The right device, for who holds the lock; an error after `release()`."""
        if self._released:
            raise EngineReleasedError("this encoder was released; make a new one with from_pretrained().")
        if self._one_device or torch.cuda.current_device() == self.device.index:
            return self._lock  # it is held, and no other context manager is left and entered as fast
        return torch.cuda.device(self.device)


def _attention_shapes(tower: Tower) -> set[tuple[int, int]]:
    """Heads and head dims of the tower's attention layers."""
    return {(layer.heads, layer.head_dim) for layer in tower.modules() if isinstance(layer, Attention)}


@contextmanager
def _compile_settings() -> Iterator[None]:
    """Of torch.compile, which may compile in a forward: a module's floats are constants. As inputs of the code, as
    `dynamic=True` has them, they would have it traced a second time. And a block has too few kernels for a process per
    core that compiles them."""
    from torch._inductor import config as inductor  # takes its time

    with torch._dynamo.config.patch(specialize_float=True), inductor.patch(compile_threads=1):
        yield


def _version(inputs: TowerBuffers) -> int | None:
    """Rises whenever an operation writes to the metadata; None where nobody counts (in inference mode)."""
    tensors = inputs.metadata.values()
    return None if any(t.is_inference() for t in tensors) else sum(t._version for t in tensors)
