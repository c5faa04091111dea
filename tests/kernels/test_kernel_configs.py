"""Configurations of the attention kernel: shipped, measured once, kept on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attention_cases import check, interpreted_loops, make_qkv, make_segments
from vitgraph.attention import auto
from vitgraph.attention.auto import AutoAttention
from vitgraph.attention.base import ANY, LONG, kernel_of
from vitgraph.attention.kernel_configs import (
    CANDIDATES,
    CLASSES,
    LARGE,
    SMALL,
    WIDE,
    WIDE_TWO,
    KernelConfig,
    KernelConfigs,
)
from vitgraph.attention.sdpa import SdpaAttention
from vitgraph.attention.trial import nearest_class, segments_of, usual_lengths
from vitgraph.attention.triton_varlen import TritonVarlenAttention

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("VITGRAPH_CACHE", str(tmp_path))


class Kernel:
    """Runs nothing; remembers what it was asked for, and how long that would take."""

    def __init__(self, best: dict[int, KernelConfig], refused: tuple[KernelConfig, ...] = ()) -> None:
        self.best, self.refused = best, refused
        self.calls: list[tuple[int, KernelConfig]] = []

    def run(self, q, k, v, segments, scale, config) -> None:
        assert segments.block == config.block
        assert int(segments.cu_seqlens[-1]) == q.shape[0]
        if config in self.refused:
            raise RuntimeError("out of shared memory")
        self.calls.append((q.shape[0], config))

    def time(self, call) -> float:
        call()
        rows, config = self.calls[-1]
        return 1.0 if self.best.get(rows, SMALL) == config else 2.0


def tuned(kernel: Kernel, gpu: str = "NVIDIA A100") -> KernelConfigs:
    configs = KernelConfigs()
    configs.tune(kernel.run, 2, 8, CPU, torch.float32, gpu, kernel.time)
    return configs


def test_shipped_configurations_are_not_measured() -> None:
    kernel = Kernel({})
    configs = tuned(kernel, "NVIDIA H100 80GB HBM3")
    assert not kernel.calls
    assert [configs.choose(rows, rows) for rows in (256, 784, 1024, 16384)] == [WIDE, SMALL, WIDE_TWO, LARGE]
    assert configs.choose(4096, 64) == SMALL, "no segment is as long as a large tile"
    long_heads = KernelConfigs()
    long_heads.tune(kernel.run, 2, 128, CPU, torch.float32, "NVIDIA H100 80GB HBM3", kernel.time)
    assert [long_heads.choose(rows, rows).keys for rows in (256, 1024, 16384)] == [64, 64, 64]


def test_other_gpus_are_measured_once(tmp_path: Path) -> None:
    wide = KernelConfig(128, 128, 8)
    kernel = Kernel({4096: wide, 8192: LARGE})
    configs = tuned(kernel)
    assert len(kernel.calls) == len(CLASSES) * len(CANDIDATES)
    assert configs.choose(4096, 4096) == configs.choose(5000, 5000) == wide
    assert configs.choose(8192, 8192) == LARGE and configs.choose(256, 256) == SMALL
    again = Kernel({})
    assert tuned(again).choose(4096, 4096) == wide and not again.calls
    other = Kernel({})
    assert tuned(other, "NVIDIA L40S").choose(4096, 4096) == SMALL and other.calls


def test_configurations_that_do_not_fit_the_gpu_are_left_out() -> None:
    kernel = Kernel(dict.fromkeys(CLASSES, LARGE), refused=(LARGE, KernelConfig(128, warps=8)))
    assert tuned(kernel).choose(4096, 4096) != LARGE


def test_trial_packs_fill_their_buffers() -> None:
    for rows in CLASSES:
        lengths = usual_lengths(rows)
        assert sum(lengths) == rows and min(lengths) > 0
        segments = segments_of(lengths, 64, CPU)
        assert segments.max_seqlen == max(lengths) and segments.form == (LONG if len(lengths) == 1 else ANY)
    assert usual_lengths(256) == [256]
    assert nearest_class(5000, CLASSES) == 4096
    assert [nearest_class(rows, auto.CLASSES) for rows in (100, 2304, 2700, 3000, 50000)] == [
        512,
        2304,
        3072,
        3072,
        16384,
    ]


@interpreted_loops
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel is compiled there")
@pytest.mark.parametrize("config", CANDIDATES, ids=lambda c: c.name)
def test_every_candidate_computes_the_same(config: KernelConfig) -> None:
    pytest.importorskip("triton")
    from vitgraph.attention.triton_varlen import _run

    segments = make_segments(160, [70, 33], config.block)
    qkv = make_qkv(160, 103, 2, 24, torch.float16)
    check(_run(*qkv.unbind(1), segments, 24**-0.5, config), qkv, segments, 103, 5e-3)


def test_kernels_are_told_apart_by_their_configuration_and_backends_without_one_by_their_block(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    own = TritonVarlenAttention()
    own.tune(16, 72, CPU, torch.bfloat16)
    for attention in (own, AutoAttention(own, [], CPU, torch.bfloat16)):
        assert attention.block(256, 256) == attention.block(784, 784)
        assert [kernel_of(attention, rows, rows) for rows in (256, 784)] == [WIDE, SMALL]
    assert kernel_of(SdpaAttention(), 256, 256) == 0
