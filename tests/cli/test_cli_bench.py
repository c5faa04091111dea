"""`vitgraph bench`. Timings are not judged here."""

from __future__ import annotations

import json
import sys

import pytest
from PIL import Image

from vitgraph.bench.geometries import GEOMETRIES, geometry, served_geometries
from vitgraph.bench.run import choose_ways, parse_ways
from vitgraph.bench.workloads import DEFAULT_WORKLOADS, parse_workload
from vitgraph.core import Grid
from vitgraph.errors import ConfigError
from vitgraph.models.registry import find_family

QUICK = ("--runs", 2, "--warmup", 1, "--max-tokens", 128)


def _report(result):
    return json.loads(result.output.strip().splitlines()[-1])


def test_report(run, tmp_path):
    plot, report = tmp_path / "b.png", tmp_path / "b.json"
    arguments = ("--workload", "1x8x8", "--workload", "2x8x12+1x2x4x4", "--plot", plot, "--json", report)
    result = run("bench", *QUICK, *arguments)
    assert result.exit_code == 0, result.output
    facts = json.loads(report.read_text())
    rows = facts["results"]
    assert [(r["workload"], r["way"]) for r in rows] == [
        (w, way) for way in ("eager", "graph") for w in ("1x8x8", "2x8x12+1x2x4x4")
    ]
    assert {"date", "hardware", "versions", "command", "model", "dtype", "config"} <= set(facts)
    assert all(0 < r["best_ms"] <= r["median_ms"] <= r["p99_ms"] for r in rows)
    assert all(r["relative_error"] < 1e-5 for r in rows)
    assert rows[1]["packs"] == 1
    assert rows[2]["padding"] == pytest.approx(1 - 16 / 32)
    with Image.open(plot) as picture:
        assert picture.format == "PNG"


def test_against_transformers(run, tiny_qwen3):
    pytest.importorskip("transformers")
    result = run("bench", tiny_qwen3, *QUICK, "--workload", "2x8x12+1x2x4x4", "--against", "transformers")
    assert result.exit_code == 0, result.output
    rows = _report(result)["results"]
    assert [r["way"] for r in rows] == ["transformers", "eager", "graph"]
    assert all(r["relative_error"] < 1e-5 for r in rows)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--workload", "20x20"), "is not understood"),
        (("--workload", "1x7x8"), "multiples of"),
        (("--ways", "fast"), "unknown ways"),
        (("--against", "vllm"), "unknown peer"),
        (("--geometry", "qwen9"), "unknown geometry"),
        (("some/model", "--geometry", "qwen3-vl-8b"), "not both"),
        (("--device", "tpu"), "tpu"),
    ],
)
def test_mistakes(run, arguments, says):
    result = run("bench", *QUICK, *arguments)
    assert result.exit_code == 2, result.output
    assert says in result.output


def test_an_existing_report_is_kept(run, tmp_path):
    path = tmp_path / "b.json"
    path.write_text("precious")
    assert run("bench", *QUICK, "--json", path).exit_code == 2
    assert path.read_text() == "precious"


def test_plot_without_matplotlib_names_the_extra(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("bench", *QUICK, "--plot", tmp_path / "b.png")
    assert result.exit_code == 2
    assert "vitgraph[plot]" in result.output


def test_workloads():
    assert parse_workload("2x20x18").grids == (Grid(1, 20, 18),) * 2
    assert parse_workload("1x4x20x18").grids == (Grid(4, 20, 18),)
    assert parse_workload("1x4x4+2x6x8").patches == 16 + 2 * 48
    assert all(parse_workload(text).grids for text in DEFAULT_WORKLOADS)
    with pytest.raises(ConfigError):
        parse_workload("0x20x20")


def test_ways():
    assert [w.name for w in choose_ways([], cuda=False, compile=False)] == ["eager", "graph"]
    assert [w.name for w in choose_ways([], cuda=False, compile=True)] == [
        "eager",
        "graph",
        "compile",
        "compile+graph",
    ]
    assert len(choose_ways([], cuda=True, compile=False)) == 5
    assert [w.name for w in choose_ways(parse_ways("graph, eager"), cuda=False, compile=False)] == ["eager", "graph"]


@pytest.mark.parametrize("name", sorted(GEOMETRIES))
def test_served_geometries_parse(name):
    if name not in served_geometries():
        pytest.skip("its family is not registered")
    config = geometry(name)
    assert find_family(config).parse_config(config)
