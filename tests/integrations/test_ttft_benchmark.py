"""The benchmark of the time to the first token runs where there is no GPU, on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "transformers_ttft.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("transformers_ttft", SCRIPT)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tiny_prints_a_table_and_writes_json(script, tmp_path, capsys) -> None:
    script.main(["--tiny", "--runs", "1", "--json", str(tmp_path / "out.json")])
    report = json.loads((tmp_path / "out.json").read_text())
    assert {"date", "hardware", "versions", "runs"} <= set(report)
    assert [row["workload"] for row in report["rows"]] == ["1 image", "4 images", "16 frames"]
    printed = capsys.readouterr().out
    for row in report["rows"]:
        assert row["same_token"] and row["fallbacks"] == {}
        assert min(row[key] for key in row if key.startswith(("first", "tower", "language"))) > 0
        assert row["workload"] in printed and f"{row['first_token_before']:.1f} -> " in printed
    assert [row["prompt_tokens"] for row in report["rows"]] == [32 + 11, 32 + 4 * 11, 32 + 8 * 6]


@pytest.mark.parametrize("size, billions", [("2b", 2.13), ("8b", 8.77)])
def test_the_models_have_their_published_sizes(script, size: str, billions: float) -> None:
    model = script.make_model(size, torch.device("meta"))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_full_size_is_refused(script, capsys) -> None:
    with pytest.raises(SystemExit):
        script.main([])
    assert "no CUDA device; --tiny runs on the CPU" in capsys.readouterr().err
