"""The Triton kernels on the CPU, through Triton's interpreter: the arithmetic and the masks, not the speed.

The same cases run compiled in tests/gpu.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from attention_cases import CASES, check, interpreted_loops, make_qkv, make_segments
from vitgraph.attention.kernel_configs import LARGE, SMALL, WIDE, KernelConfig
from vitgraph.attention.sdpa import SdpaAttention
from vitgraph.layers.block import Attention, Block
from vitgraph.layers.mlp import GatedMlp, Mlp
from vitgraph.layers.norm import RMSNorm
from vitgraph.layers.rotary import apply_rotary
from vitgraph.models.weights import randomise

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled here"),
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning", "ignore:invalid value:RuntimeWarning"),
]

SMALL_CASES = {
    "one": (100, [100]),
    "ragged": (256, [1, 64, 130, 2]),
    "half empty": (128, [20, 12]),
    "many": (144, [12] * 11),
    "empty": (64, []),
}


@interpreted_loops
@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("head_dim", [64, 72, 80, 88, 96, 112, 128])
def test_attention_equals_fp32_for_every_head_dim(head_dim: int, tma: bool) -> None:
    run_attention("ragged", head_dim, tma, SMALL)


@interpreted_loops
@pytest.mark.parametrize("config", [SMALL, LARGE, WIDE], ids=lambda config: config.name)
@pytest.mark.parametrize("case", SMALL_CASES)
def test_attention_equals_fp32_for_every_packing(case: str, config: KernelConfig) -> None:
    for tma in (False, True):
        run_attention(case, 72, tma, config)


def run_attention(case: str, head_dim: int, tma: bool, config: KernelConfig) -> None:
    from vitgraph.attention.triton_varlen import launch

    rows, lengths = SMALL_CASES[case]
    segments = make_segments(rows, lengths, config.block)
    qkv = make_qkv(rows, sum(lengths), 2, head_dim, torch.float16)
    out = launch(*qkv.unbind(1), segments.tiles, config, head_dim**-0.5, tma)
    check(out, qkv, segments, sum(lengths), 5e-3)


@interpreted_loops
def test_attention_ignores_nan_in_the_next_segment() -> None:
    from vitgraph.attention.triton_varlen import launch

    rows, lengths = SMALL_CASES["ragged"]
    segments = make_segments(rows, lengths, 64)
    qkv = make_qkv(rows, sum(lengths), 2, 72, torch.float16)
    want = launch(*qkv.unbind(1), segments.tiles, SMALL, 72**-0.5, True)
    qkv[65:195] = float("nan")
    for tma in (False, True):
        got = launch(*qkv.unbind(1), segments.tiles, SMALL, 72**-0.5, tma)
        assert got[65:195].isnan().all()
        torch.testing.assert_close(got[:65], want[:65], rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(got[195:197], want[195:197], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("case", CASES)
def test_masked_reference_equals_the_one_by_segments(case: str) -> None:
    rows, lengths = CASES[case]
    if rows > 1024:
        rows, lengths = rows // 4, [n // 4 for n in lengths]
    segments = make_segments(rows, lengths, 0)
    qkv = make_qkv(rows, sum(lengths), 2, 24, torch.float32)
    masked = SdpaAttention()(*qkv.unbind(1), segments, 24**-0.5)
    start = 0
    for length in lengths:
        q, k, v = (x[start : start + length].transpose(0, 1) for x in qkv.unbind(1))
        want = F.scaled_dot_product_attention(q, k, v).transpose(0, 1)
        torch.testing.assert_close(masked[start : start + length], want, rtol=1e-4, atol=1e-5)
        start += length
    assert (masked[start:] == 0).all()


@pytest.mark.parametrize("heads, head_dim", [(16, 72), (4, 16), (3, 128), (2, 88)])
def test_rotary_equals_its_plain_form(heads: int, head_dim: int) -> None:
    from vitgraph.layers.rotary_triton import rotate_in_place

    qkv = torch.randn(7, 3, heads, head_dim)
    angles = torch.randn(7, head_dim // 2)
    want, values = apply_rotary(qkv[:, :2], angles.cos(), angles.sin()), qkv[:, 2].clone()
    torch.testing.assert_close(rotate_in_place(qkv[:, :2], angles.cos(), angles.sin()), want)
    assert torch.equal(qkv[:, 2], values)


@pytest.mark.parametrize("activation", ["silu", "quick_gelu"])
@pytest.mark.parametrize("columns", [48, 1500])
def test_activations_equal_their_plain_form(activation: str, columns: int) -> None:
    from vitgraph.layers import activation_triton
    from vitgraph.layers.ops import activate, gate

    both = 4 * torch.randn(5, 2 * columns)
    x, up = both.chunk(2, dim=1)
    torch.testing.assert_close(activation_triton.gate(x, up, activation), gate(x, up, activation))
    want, others = activate(x.clone(), activation), up.clone()
    assert activation_triton.activate_in_place(x, activation).data_ptr() == both.data_ptr()
    torch.testing.assert_close(x, want)
    assert torch.equal(up, others)


@pytest.mark.parametrize("taps", [4, 16])
@pytest.mark.parametrize("dim", [64, 1152])
def test_adding_a_table_equals_its_plain_form(dim: int, taps: int) -> None:
    from vitgraph.layers.pos_embed import gather_table
    from vitgraph.layers.pos_embed_triton import add_table_in_place

    x, table = torch.randn(7, dim), torch.randn(30, dim)
    index, weight = torch.randint(0, 30, (7, taps), dtype=torch.int32), torch.randn(7, taps)
    want = x + gather_table(table, index, weight)
    torch.testing.assert_close(add_table_in_place(x, table, index, weight), want)


@pytest.mark.parametrize("dim", [64, 72, 1152, 3200])
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("with_bias, with_scale", [(False, False), (True, False), (False, True)])
def test_norm_equals_torch(dim: int, rms: bool, with_bias: bool, with_scale: bool) -> None:
    from vitgraph.layers.norm_triton import add_norm, norm

    x, delta = torch.randn(5, dim) * 3 + 1, torch.randn(5, dim)
    weight, norm_bias = torch.randn(dim), None if rms else torch.randn(dim)
    bias = torch.randn(dim) if with_bias else None
    scale = torch.randn(dim) if with_scale else None
    plain = RMSNorm(dim, 1e-6) if rms else torch.nn.LayerNorm(dim, eps=1e-6)
    with torch.no_grad():
        plain.weight.copy_(weight)
        if norm_bias is not None:
            plain.bias.copy_(norm_bias)
        torch.testing.assert_close(norm(x, weight, norm_bias, 1e-6), plain(x), rtol=1e-4, atol=1e-4)
        y, residual = add_norm(x, delta, weight, norm_bias, 1e-6, bias, scale)
        total = x + delta * (1 if scale is None else scale)
        torch.testing.assert_close(y, plain(total), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(residual, total + (0 if bias is None else bias))


@pytest.mark.parametrize("ahead", [False, True], ids=["launched", "compiled ahead"])
@pytest.mark.parametrize("dim", [1152, 3200])
def test_norms_of_few_rows_get_more_warps(dim: int, ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from vitgraph.layers import norm_triton

    few, many = norm_triton.FEW_ROWS, norm_triton.FEW_ROWS + 1
    launched: list[int] = []
    monkeypatch.setattr(norm_triton, "launch_kernel", lambda *args, num_warps, **options: launched.append(num_warps))
    monkeypatch.setattr(norm_triton, "only_compiles", lambda: ahead)
    for rows in (few, many):
        norm_triton.norm(torch.zeros(rows, dim), torch.zeros(dim), None, 1e-6)
    if dim > norm_triton.MOST_DIM:
        assert launched == [norm_triton.MANY_WARPS] * 2
    elif ahead:
        assert sorted(launched) == [norm_triton.FEW_WARPS] * 2 + [norm_triton.MANY_WARPS] * 2
    else:
        assert launched == [norm_triton.MANY_WARPS, norm_triton.FEW_WARPS]


@pytest.mark.parametrize("layer_scale", [None, 64], ids=["plain", "layer scale"])
@pytest.mark.parametrize("mlp", [lambda: Mlp(64, 96), lambda: GatedMlp(64, 96, bias=True)], ids=["mlp", "gated"])
def test_fused_block_equals_the_plain_one(mlp, layer_scale: int | None) -> None:
    def mix(q, k, v, segments, scale):
        return v - q * 0.1 + k * 0.2

    block = Block(partial(torch.nn.LayerNorm, 64), Attention(64, 4, mix), mlp(), layer_scale).requires_grad_(False)
    randomise(block, 1)
    x, angles = torch.randn(9, 64), torch.randn(9, 8)
    rotary = angles.cos(), angles.sin()
    torch.testing.assert_close(block._forward_fused(x, rotary, None), block(x, rotary, None), rtol=1e-4, atol=1e-4)
