"""On a GPU: every attention backend against fp32, with ragged segments and NaN in the padding."""

from __future__ import annotations

import pytest
import torch

from attention_cases import CASES, check, make_qkv, make_segments
from vitgraph.attention.kernel_configs import CANDIDATES, SHORT_HEAD, SMALL, KernelConfig
from vitgraph.attention.select import FLASH, select_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("head_dim", [64, 72, 80, 88, 96, 112, 128])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["triton", "fa3", "fa4", "varlen", "sdpa"])
def test_backend_equals_fp32(backend: str, case: str, head_dim: int) -> None:
    if backend in FLASH and (missing := FLASH[backend].missing(torch.device("cuda"), torch.bfloat16)):
        pytest.skip(missing)
    rows, lengths = CASES[case]
    attention = select_attention(backend, torch.device("cuda"), torch.bfloat16)
    segments = make_segments(rows, lengths, attention.block(rows, rows), "cuda")
    qkv = make_qkv(rows, sum(lengths), 4, head_dim, torch.bfloat16, "cuda")
    out = attention(*qkv.unbind(1), segments, head_dim**-0.5)
    check(out, qkv, segments, sum(lengths), 5e-3)


@pytest.mark.parametrize("backend", ["triton", *FLASH])
def test_nan_stays_in_its_segment(backend: str) -> None:
    if backend in FLASH and (missing := FLASH[backend].missing(torch.device("cuda"), torch.bfloat16)):
        pytest.skip(missing)
    rows, lengths = CASES["ragged"]
    attention = select_attention(backend, torch.device("cuda"), torch.bfloat16)
    segments = make_segments(rows, lengths, attention.block(rows, rows), "cuda")
    qkv = make_qkv(rows, sum(lengths), 4, 72, torch.bfloat16, "cuda")
    want = attention(*qkv.clone().unbind(1), segments, 72**-0.5)
    start, end = sum(lengths[:2]), sum(lengths[:3])
    qkv[start:end] = float("nan")
    got = attention(*qkv.unbind(1), segments, 72**-0.5)
    assert got[start:end].isnan().all()
    got[start:end] = want[start:end]
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("head_dim", [64, 72, 80, 128])
def test_the_kernel_without_tensor_descriptors_equals_the_one_with_them(head_dim: int) -> None:
    from vitgraph.attention.triton_varlen import has_tma, launch

    if not has_tma(torch.device("cuda")):
        pytest.skip("no tensor descriptors on this device")
    rows, lengths = CASES["ragged"]
    segments = make_segments(rows, lengths, 64, "cuda")
    q, k, v = torch.randn(rows, 3, 4, head_dim, device="cuda", dtype=torch.bfloat16).unbind(1)
    plain, described = (launch(q, k, v, segments.tiles, SMALL, head_dim**-0.5, tma) for tma in (False, True))
    assert ((plain - described).float().norm() / plain.float().norm()).item() < 5e-3


@pytest.mark.parametrize("config", CANDIDATES, ids=lambda config: config.name)
@pytest.mark.parametrize("tma", [True, False], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("head_dim", [64, 72, 128])
def test_every_candidate_configuration_equals_fp32(head_dim: int, tma: bool, config: KernelConfig) -> None:
    from triton.runtime.errors import OutOfResources

    from vitgraph.attention.triton_varlen import has_tma, launch

    if tma and not has_tma(torch.device("cuda")):
        pytest.skip("no tensor descriptors on this device")
    rows, lengths = CASES["ragged"]
    segments = make_segments(rows, lengths, config.block, "cuda")
    qkv = make_qkv(rows, sum(lengths), 4, head_dim, torch.bfloat16, "cuda")
    try:
        out = launch(*qkv.unbind(1), segments.tiles, config, head_dim**-0.5, tma)
    except OutOfResources as error:
        assert head_dim > SHORT_HEAD, "the shipped configurations must fit"
        pytest.skip(str(error))
    check(out, qkv, segments, sum(lengths), 5e-3)
