"""`vitgraph inspect`."""

from __future__ import annotations

import json

import torch


def test_json(run, tiny_qwen3):
    result = run("inspect", tiny_qwen3, "--json", "--budgets", "64,128", "--max-items", 4, "--dtype", "float32")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.output)
    assert facts["tower"]["family"] == "qwen3_vl"
    assert facts["tower"]["width"] == 48
    assert facts["tower"]["deepstack"] == 2
    assert facts["tower"]["modalities"] == ["image", "video"]
    assert facts["budgets"]["tokens"] == [64, 128]
    assert facts["budgets"]["largest"]["item"] == 4
    buffers = {buffer["name"]: buffer for buffer in facts["buffers"]}
    assert buffers["pixel_values"] == {
        "name": "pixel_values",
        "dtype": "float32",
        "shape": [512, 1536],
        "bytes": 512 * 1536 * 4,
    }
    assert buffers["position_ids"]["shape"] == [512, 2]
    assert facts["memory"]["weights"] == facts["tower"]["parameters"] * 4
    assert facts["memory"]["static_buffers"] == sum(b["bytes"] for b in facts["buffers"])
    assert facts["memory"]["activations_estimate"] > 0


def test_tables(run, tiny_qwen3):
    result = run("inspect", tiny_qwen3, "--max-tokens", 256)
    assert result.exit_code == 0, result.output
    for text in ("qwen3_vl", "bfloat16", "pixel_values", "cu_seqlens", "largest budget: 256 tokens", "weights"):
        assert text in result.output


def test_without_graphs(run, tiny_qwen3):
    result = run("inspect", tiny_qwen3, "--no-graph")
    assert result.exit_code == 0, result.output
    assert "none: runs eager" in result.output


def test_flags_reach_the_engine(run, tiny_qwen3):
    text = '{"encoder_cudagraph_token_budgets": [64]}'
    facts = json.loads(run("inspect", tiny_qwen3, "--json", "--compilation-config", text).output)
    assert facts["budgets"]["tokens"] == [64]
    result = run("inspect", tiny_qwen3, "--attention", "magic")
    assert result.exit_code == 2
    assert "unknown attention" in result.output


def test_timing_needs_a_gpu(run, tiny_qwen3):
    if torch.cuda.is_available():
        facts = json.loads(run("inspect", tiny_qwen3, "--time", "--json", "--budgets", "64,128").output)
        assert [b["tokens"] for b in facts["costs"]["budgets"]] == [64, 128]
        return
    result = run("inspect", tiny_qwen3, "--time")
    assert result.exit_code == 2
    assert "no CUDA device" in result.output


def test_a_plot_needs_timing(run, tiny_qwen3, tmp_path):
    result = run("inspect", tiny_qwen3, "--plot", tmp_path / "costs.png")
    assert result.exit_code == 2
    assert "give both" in result.output
