"""`vitgraph bench`: the same inputs through every way of running one tower."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitgraph.commands.outputs import check_writable, console, log
from vitgraph.commands.settings import with_encoder_flags
from vitgraph.config import EncoderConfig
from vitgraph.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from vitgraph.bench.run import Result
    from vitgraph.encoder import VisionEncoder

TINY = "qwen3_vl"


@with_encoder_flags()
def bench(
    config: EncoderConfig,
    model: Annotated[
        str | None, typer.Argument(help="Checkpoint folder or hub id. Default: a tiny Qwen3-VL with random weights.")
    ] = None,
    geometry: Annotated[
        str | None, typer.Option(help="Sizes of a published model with random weights, such as qwen3-vl-8b.")
    ] = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(
            help="Items per call: NxHxW is N images of H x W patches, NxTxHxW N clips; join with '+'; or 'mixed'. "
            "May be given several times. Default: 1x20x20, 8x20x20 and mixed.",
            show_default=False,
        ),
    ] = None,
    ways: Annotated[
        str,
        typer.Option(
            help="Ways to measure, separated by commas: eager, padded, graph, compile, compile+graph. "
            "Default: those that the device supports.",
            show_default=False,
        ),
    ] = "",
    against: Annotated[
        str | None, typer.Option(help="Also measure a peer with the same weights: transformers.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:N or cpu. Default: cuda if there is one.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32. Default: bfloat16 on CUDA, float32 on the CPU.")
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="Timed calls per row.")] = 30,
    warmup: Annotated[int, typer.Option(min=0, help="Untimed calls before them.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of random weights.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the JSON report to this file instead.", metavar="FILE")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Also write the report as Markdown to this file.", metavar="FILE")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write a picture of the report as PNG to this file.", metavar="FILE")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite the files of --json, --markdown and --plot.")
    ] = False,
) -> None:
    """Time one tower eager, in graphs, compiled, and against Transformers.

    Prints the median and P99 of the wall clock around one call and a device synchronisation, and the relative error
    |out - ref| / |ref| against a float32 run. Tables come first; one line of JSON comes last, unless --json names a
    file for it. --graph and --compile are set by each way.
    """
    _check_arguments(model, geometry, against, plot, (json_file, markdown), force)
    from vitgraph.bench.report import as_markdown, results_tables
    from vitgraph.bench.run import parse_ways, run_benchmark
    from vitgraph.bench.workloads import DEFAULT_WORKLOADS, parse_workload

    load = _Loader(model, geometry, device, seed)
    with log().status("loading") as status:
        results = list(
            run_benchmark(
                load,
                [parse_workload(text) for text in workload or DEFAULT_WORKLOADS],
                parse_ways(ways),
                config,
                dtype=dtype,
                against_peer=against is not None,
                runs=runs,
                warmup=warmup,
                say=lambda text: status.update(f"measuring {text}"),
            )
        )
    console().print(f"{load.name} on {_hardware_name(load.place)}, {load.dtype}; {runs} runs per row", style="bold")
    console().print(results_tables(results))
    report = _report(load, config, results)
    if plot is not None:
        _plot(results, plot, report, load)
    if markdown is not None:
        markdown.write_text(as_markdown(report, results), encoding="utf-8")
    if json_file is None:
        print(json.dumps(report))
    else:
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


class _Loader:
    """Makes encoders of one model; remembers the device and dtype of the first.

    Attributes:
        place: device that the encoders are on.
        dtype: of the encoders that are measured.
    """

    place: torch.device

    def __init__(self, model: str | None, geometry: str | None, device: str | None, seed: int) -> None:
        self.name = model or f"{geometry or f'tiny {TINY}'} (random weights)"
        self.dtype = ""
        self._model, self._geometry, self._device, self._seed = model, geometry, device, seed

    def __call__(self, config: EncoderConfig, dtype: torch.dtype | str | None) -> VisionEncoder:
        from vitgraph.bench.geometries import geometry
        from vitgraph.encoder import VisionEncoder

        if self._model is not None:
            encoder = VisionEncoder.from_pretrained(self._model, device=self._device, dtype=dtype, config=config)
        else:
            source = geometry(self._geometry) if self._geometry else TINY
            encoder = VisionEncoder.from_config(
                source, device=self._device, dtype=dtype, config=config, seed=self._seed
            )
        self.place = encoder.device
        self.dtype = self.dtype or str(encoder.dtype).removeprefix("torch.")
        return encoder


def _check_arguments(
    model: str | None,
    geometry: str | None,
    against: str | None,
    plot: Path | None,
    reports: tuple[Path | None, ...],
    force: bool,
) -> None:
    """Refuses what can be refused before any time is spent."""
    if model is not None and geometry is not None:
        raise ConfigError("give a MODEL or a --geometry, not both.")
    if against not in (None, "transformers"):
        raise ConfigError(f"unknown peer {against!r}; known: transformers.")
    for path in (plot, *reports):
        if path is not None:
            check_writable(path, force)
    if plot is not None:
        from vitgraph.bench.plot import check_plot_extra

        check_plot_extra()


def _report(load: _Loader, config: EncoderConfig, results: list[Result]) -> dict[str, Any]:
    from vitgraph.bench.report import captures_as_dicts, environment, results_as_dicts

    return {
        **environment(load.place),
        "command": shlex.join(["vitgraph", *sys.argv[1:]]),
        "model": load.name,
        "dtype": load.dtype,
        "config": asdict(config),
        "captures": captures_as_dicts(results),
        "results": results_as_dicts(results),
    }


def _plot(results: list[Result], path: Path, report: dict[str, Any], load: _Loader) -> None:
    from vitgraph.bench.plot import plot_results

    versions = report["versions"]
    footer = (
        f"{_hardware_name(load.place)}, torch {versions['torch']}, vitgraph {versions['vitgraph']}, {report['date']}"
    )
    plot_results(results, path, f"{load.name}, {load.dtype}", footer)


def _hardware_name(device: torch.device) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.get_num_threads()} threads)"
