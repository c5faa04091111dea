"""The benchmark: the same inputs through every way of running one tower."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from vitgraph.bench.curve import costs_as_dict
from vitgraph.bench.reference import reference_forward, reference_model
from vitgraph.bench.timing import Timing, time_call
from vitgraph.bench.workloads import Workload, random_patches
from vitgraph.config import EncoderConfig
from vitgraph.embedding import VisionEmbedding
from vitgraph.errors import ConfigError

if TYPE_CHECKING:
    from vitgraph.encoder import VisionEncoder
    from vitgraph.engine.engine import Mode

PEER = "transformers"


@dataclass(frozen=True)
class Way:
    """One way of running: settings of the encoder and the mode of its calls.

    Attributes:
        name: as flags and tables spell it.
        about: what it measures, in a line.
        graph, compile: settings that it overrides.
        mode: mode of `encode_patches`.
        cuda_only: whether it is the same as another way on the CPU.
    """

    name: str
    about: str
    graph: bool
    compile: bool
    mode: Mode
    cuda_only: bool = False


WAYS = (
    Way("eager", "packed into buffers of exactly the pack's size", False, False, "eager"),
    Way("padded", "packed into padded static buffers, no graph", True, False, "padded", cuda_only=True),
    Way("graph", "packed into padded static buffers, graphs replayed (CPU: forward called)", True, False, "auto"),
    Way("compile", "as eager, blocks compiled", False, True, "eager"),
    Way("compile+graph", "as graph, blocks compiled before capture", True, True, "auto"),
)
WAY_NAMES = tuple(way.name for way in WAYS)


class Loader(Protocol):
    """Makes an encoder; every call gives the same weights."""

    def __call__(self, config: EncoderConfig, dtype: torch.dtype | str | None) -> VisionEncoder: ...


@dataclass(frozen=True)
class Capture:
    """What capturing a ladder cost.

    Attributes:
        graphs: captured budgets.
        seconds: warm-up (and compilation) and capture of all of them.
        graph_bytes: device memory of the graphs' pool.
        static_bytes: device memory of the static buffers.
        measure_seconds: timing of the captured budgets.
        costs: what that gave; see `curve.costs_as_dict`.
    """

    graphs: int
    seconds: float
    graph_bytes: int
    static_bytes: int
    measure_seconds: float
    costs: dict[str, Any]


@dataclass(frozen=True)
class Result:
    """One row of the report.

    Attributes:
        workload, way: names.
        items: images or clips per call.
        patches: patch rows per call.
        timing: in milliseconds.
        padding: share of computed tokens that was padding, 0 to 1.
        packs: packs per call, or None for the peer.
        error: |out - ref| / |ref| against the fp32 reference.
        capture: graphs captured before the first call, or None for a way without graphs.
    """

    workload: str
    way: str
    items: int
    patches: int
    timing: Timing
    padding: float
    packs: int | None
    error: float
    capture: Capture | None = None

    @property
    def items_per_second(self) -> float:
        return self.items / self.timing.median * 1e3


def parse_ways(text: str) -> list[str]:
    """Names of ways separated by commas.

    Raises:
        ConfigError: for an unknown name.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = sorted(set(names) - set(WAY_NAMES))
    if unknown:
        raise ConfigError(f"unknown ways {', '.join(unknown)}; known: {', '.join(WAY_NAMES)}.")
    return names


def choose_ways(names: Sequence[str], cuda: bool, compile: bool) -> list[Way]:
    """The named ways; without names, those that make sense on the device.

    Args:
        names: of `WAY_NAMES`; may be empty.
        cuda: whether a GPU runs them.
        compile: also the compiled ways, where the device would leave them out.
    """
    if names:
        return [way for way in WAYS if way.name in names]
    return [way for way in WAYS if (cuda or not way.cuda_only) and (cuda or compile or not way.compile)]


def run_benchmark(
    load: Loader,
    workloads: Sequence[Workload],
    ways: Sequence[str],
    config: EncoderConfig,
    dtype: str | None = None,
    against_peer: bool = False,
    runs: int = 30,
    warmup: int = 5,
    say: Callable[[str], None] = lambda _text: None,
) -> Iterator[Result]:
    """Yields results as they are measured. One encoder lives at a time, beside the reference.

    Args:
        load: makes encoders.
        workloads: what one call encodes.
        ways: names of `WAYS`; empty means those that make sense on the device.
        config: settings that every way starts from; its `graph` is set by each way, and so is its `compile`.
        dtype: of the measured encoders; default as `VisionEncoder`.
        against_peer: measure Transformers too, and take its fp32 run as the reference instead of our own.
        runs, warmup: calls per row of the report.
        say: called with what comes next.
    """
    say("reference in float32")
    first = load(replace(config, graph=False, compile=False), dtype)
    for workload in workloads:
        for grid in workload.grids:
            first.spec.check_grid(grid)
    bench = _Bench(workloads, first, runs, warmup)
    peer = reference_model(first.tower) if against_peer else None
    bench.references = _references(load, first, peer, bench)
    if peer is not None:
        say(PEER)
        yield from bench.measure_peer(peer)
    chosen = choose_ways(ways, first.device.type == "cuda", config.compile)
    del first, peer
    for way in chosen:
        say(way.name)
        with load(replace(config, graph=way.graph, compile=way.compile), dtype) as encoder:
            if way.graph and way.mode == "auto" and not config.lazy:
                encoder.capture()
            yield from bench.measure(way, encoder)
        del encoder


class _Bench:
    """Inputs and references of every workload, and the measuring of one encoder on them."""

    def __init__(self, workloads: Sequence[Workload], encoder: VisionEncoder, runs: int, warmup: int) -> None:
        self.workloads = workloads
        self.device = encoder.device
        width = encoder.spec.patch_width
        # Rounded to the encoder's dtype first, so that the fp32 reference sees the same values.
        self.inputs = [
            random_patches(w, width, seed).to(self.device, encoder.dtype) for seed, w in enumerate(workloads)
        ]
        self.references: list[Tensor] = []
        self._runs, self._warmup = runs, warmup

    def measure(self, way: Way, encoder: VisionEncoder) -> Iterator[Result]:
        capture = _capture_of(encoder)
        for workload, pixels, reference in zip(self.workloads, self.inputs, self.references, strict=True):

            def call(pixels: Tensor = pixels, workload: Workload = workload) -> list[VisionEmbedding]:
                return encoder.encode_patches(pixels, workload.grids, mode=way.mode)

            output = flatten_embeddings(call())
            before = encoder.stats
            call()
            after = encoder.stats
            padded = after.padded_tokens - before.padded_tokens
            real = after.real_tokens - before.real_tokens
            yield self._result(
                workload,
                way.name,
                time_call(call, self.device, self._runs, self._warmup),
                relative_error(output, reference),
                padding=1 - real / padded if padded else 0.0,
                packs=after.packs - before.packs,
                capture=capture,
            )

    def measure_peer(self, model: nn.Module) -> Iterator[Result]:
        for workload, pixels, reference in zip(self.workloads, self.inputs, self.references, strict=True):

            def call(pixels: Tensor = pixels, workload: Workload = workload) -> list[Tensor]:
                return reference_forward(model, pixels, workload.grids)

            error = relative_error(torch.cat(call(), dim=1), reference)
            timing = time_call(call, self.device, self._runs, self._warmup)
            yield self._result(workload, PEER, timing, error, padding=0.0, packs=None)

    def _result(
        self,
        workload: Workload,
        way: str,
        timing: Timing,
        error: float,
        padding: float,
        packs: int | None,
        capture: Capture | None = None,
    ) -> Result:
        items = len(workload.grids)
        return Result(workload.name, way, items, workload.patches, timing, padding, packs, error, capture)


def _capture_of(encoder: VisionEncoder) -> Capture | None:
    stats = encoder.stats
    if not stats.captured_graphs:
        return None
    return Capture(
        stats.captured_graphs,
        stats.capture_seconds,
        stats.graph_bytes,
        stats.static_bytes,
        stats.measure_seconds,
        costs_as_dict(encoder.engine.planner.cost, encoder.budgets),
    )


def _references(load: Loader, source: VisionEncoder, peer: nn.Module | None, bench: _Bench) -> list[Tensor]:
    """Per workload `[levels, M, C]` in float32, from the very weights that are measured."""
    pairs = list(zip(bench.workloads, bench.inputs, strict=True))
    if peer is not None:
        exact_peer = reference_model(source.tower).float()
        return [torch.cat(reference_forward(exact_peer, x.float(), w.grids), dim=1) for w, x in pairs]
    with load(EncoderConfig(graph=False, attention="sdpa"), torch.float32) as exact:
        with torch.no_grad():
            for mine, theirs in zip(exact.tower.parameters(), source.tower.parameters(), strict=True):
                mine.copy_(theirs)
        return [_one_by_one(exact, w, x.float()) for w, x in pairs]


def _one_by_one(encoder: VisionEncoder, workload: Workload, pixels: Tensor) -> Tensor:
    rows = pixels.split([grid.patches for grid in workload.grids])
    alone = [encoder.encode_patches(x, [grid], mode="eager")[0] for x, grid in zip(rows, workload.grids, strict=True)]
    return flatten_embeddings(alone)


def flatten_embeddings(embeddings: Iterable[VisionEmbedding]) -> Tensor:
    """All items in order, `[levels, M, C]`: tokens, then the deepstack maps."""
    parts = []
    for embedding in embeddings:
        tokens = embedding.tokens[None]
        parts.append(tokens if embedding.deepstack is None else torch.cat([tokens, embedding.deepstack]))
    return torch.cat(parts, dim=1)


def relative_error(output: Tensor, reference: Tensor) -> float:
    """|output - reference| / |reference|, Frobenius norms in float32."""
    reference = reference.float()
    return float((output.float() - reference).norm() / reference.norm())
