"""On a GPU: every attention backend against fp32, with ragged segments and NaN in the padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vitgraph.attention.base import Segments, tile_bound, write_tiles
from vitgraph.attention.sdpa import SdpaAttention
from vitgraph.attention.select import select_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CASES = {
    "one": (400, [400]),
    "ragged": (1024, [1, 64, 333, 2, 129, 65]),
    "half empty": (512, [100, 60]),
    "many": (2304, [36] * 60),
    "long": (2560, [2500]),
    "empty": (128, []),
}


@pytest.mark.parametrize("head_dim", [64, 72, 80, 88, 96, 112, 128])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["triton", "varlen", "sdpa"])
def test_backend_equals_fp32(backend: str, case: str, head_dim: int) -> None:
    rows, lengths = CASES[case]
    device = torch.device("cuda")
    attention = select_attention(backend, device, torch.bfloat16)
    cu = np.zeros(len(lengths) + 4, np.int32)
    cu[1 : len(lengths) + 1] = np.cumsum(lengths)
    cu[len(lengths) + 1 :] = sum(lengths)
    block, tiles = attention.block(rows, rows), None
    if block:
        schedule = np.empty((tile_bound(rows, len(cu) - 1, block), 4), np.int32)
        write_tiles(cu, rows, block, schedule)
        tiles = torch.from_numpy(schedule).cuda()
    segments = Segments(torch.from_numpy(cu).cuda(), rows, tiles=tiles, block=block)
    qkv = torch.randn(rows, 3, 4, head_dim, device=device, dtype=torch.bfloat16)
    qkv[sum(lengths) :] = float("nan")
    q, k, v = qkv.unbind(1)
    scale = head_dim**-0.5
    out = attention(q, k, v, segments, scale)
    want = SdpaAttention()(q.float(), k.float(), v.float(), segments, scale)
    assert out.shape == q.shape
    assert (out[sum(lengths) :] == 0).all()
    if lengths:
        assert ((out.float() - want).norm() / want.norm()).item() < 5e-3


@pytest.mark.parametrize("head_dim", [64, 72, 80, 128])
def test_the_kernel_without_tensor_descriptors_equals_the_one_with_them(head_dim: int) -> None:
    from vitgraph.attention.triton_varlen import has_tma, launch

    if not has_tma(torch.device("cuda")):
        pytest.skip("no tensor descriptors on this device")
    rows, lengths = CASES["ragged"]
    cu = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    schedule = np.empty((tile_bound(rows, len(lengths), 64), 4), np.int32)
    write_tiles(cu, rows, 64, schedule)
    tiles = torch.from_numpy(schedule).cuda()
    q, k, v = torch.randn(rows, 3, 4, head_dim, device="cuda", dtype=torch.bfloat16).unbind(1)
    plain, described = (launch(q, k, v, tiles, 64, head_dim**-0.5, tma=tma) for tma in (False, True))
    assert ((plain - described).float().norm() / plain.float().norm()).item() < 5e-3
