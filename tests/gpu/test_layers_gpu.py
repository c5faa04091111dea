"""On a GPU: each fused kernel of the block against its plain form."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitgraph.layers.block import Attention, Block
from vitgraph.layers.gemm import linear_gelu_tanh
from vitgraph.layers.mlp import GatedMlp, Mlp
from vitgraph.layers.norm import RMSNorm
from vitgraph.layers.ops import (
    activate,
    add_norm,
    add_table,
    fused_norm,
    gate,
    layer_norm,
    rotate_qk,
)
from vitgraph.layers.pos_embed import gather_table
from vitgraph.layers.rotary import apply_rotary
from vitgraph.models.weights import randomise

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


@pytest.mark.parametrize("heads, head_dim", [(16, 72), (4, 16), (12, 128), (25, 128)])
def test_rotary_equals_its_plain_form_bitwise(heads: int, head_dim: int) -> None:
    qkv = torch.randn(37, 3, heads, head_dim, device="cuda", dtype=torch.bfloat16)
    angles = torch.randn(37, head_dim // 2, device="cuda")
    want = apply_rotary(qkv[:, :2], angles.cos(), angles.sin())
    untouched = qkv[:, 2].clone()
    got = rotate_qk(qkv[:, :2], angles.cos(), angles.sin())
    assert error(got, want) < 1e-3
    assert torch.equal(qkv[:, 2], untouched)


@pytest.mark.parametrize("dim", [64, 1152, 1280, 1536, 3200])
@pytest.mark.parametrize("kind", [nn.LayerNorm, RMSNorm])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows", [33, 1000], ids=["few rows", "many rows"])
def test_norm_equals_torch(kind: type, dim: int, with_bias: bool, rows: int) -> None:
    norm = kind(dim, eps=1e-6).cuda().to(torch.bfloat16).requires_grad_(False)
    randomise(norm, 0)
    x = 3 * torch.randn(rows, dim, device="cuda", dtype=torch.bfloat16) + 1
    delta = torch.randn(rows, dim, device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(dim, device="cuda", dtype=torch.bfloat16) if with_bias else None
    alone = fused_norm(x, norm)
    y, residual = add_norm(x, delta, norm, bias)
    norm.float()
    assert error(alone, norm(x.float())) < 4e-3
    total = x.float() + delta.float()
    assert error(y, norm(total)) < 4e-3
    assert torch.equal(residual, (total if bias is None else total + bias.float()).to(torch.bfloat16))


@pytest.mark.parametrize("taps, dim", [(4, 1152), (16, 1536), (4, 64)])
def test_adding_a_table_equals_its_plain_form(taps: int, dim: int) -> None:
    x = torch.randn(37, dim, device="cuda", dtype=torch.bfloat16)
    table = torch.randn(50, dim, device="cuda", dtype=torch.bfloat16)
    index = torch.randint(0, 50, (37, taps), device="cuda", dtype=torch.int32)
    weight = torch.rand(37, taps, device="cuda")
    want = x + gather_table(table, index, weight).to(x.dtype)
    assert error(add_table(x, table, index, weight), want) < 1e-3


@pytest.mark.parametrize("activation", ["silu", "quick_gelu"])
def test_activations_equal_their_plain_form(activation: str) -> None:
    both = 4 * torch.randn(37, 2 * 3456, device="cuda", dtype=torch.bfloat16)
    x, up = both.chunk(2, dim=1)
    slope = 1.702 if activation == "quick_gelu" else 1.0
    want = x.float() * torch.sigmoid(slope * x.float())
    assert error(gate(x, up, activation), want * up.float()) < 4e-3
    assert error(activate(x.clone(), activation), want) < 4e-3


@pytest.mark.parametrize("make", [lambda: Mlp(128, 208), lambda: GatedMlp(128, 208, bias=True)], ids=["mlp", "gated"])
def test_an_mlp_that_is_laid_out_equals_the_plain_one(make) -> None:
    plain, laid_out = (make().cuda().to(torch.bfloat16).requires_grad_(False) for _ in range(2))
    randomise(plain, 0)
    laid_out.lay_out()
    laid_out.load_state_dict(plain.state_dict())
    x = torch.randn(33, 128, device="cuda", dtype=torch.bfloat16)
    assert error(laid_out(x), plain(x)) < 1e-2


@pytest.mark.parametrize("dim", [1152, 4608, 6144])
def test_layer_norm_of_mergers_equals_torch(dim: int) -> None:
    norm = nn.LayerNorm(dim, eps=1e-6).cuda().to(torch.bfloat16).requires_grad_(False)
    randomise(norm, 0)
    x = 3 * torch.randn(33, dim, device="cuda", dtype=torch.bfloat16) + 1
    got = layer_norm(x, norm)
    assert error(got, norm.float()(x.float())) < 4e-3


def test_gelu_epilogue_is_the_tanh_form() -> None:
    x = torch.randn(50, 1152, device="cuda", dtype=torch.bfloat16)
    linear = nn.Linear(1152, 4304, device="cuda", dtype=torch.bfloat16)
    want = F.gelu(linear.float()(x.float()), approximate="tanh")
    linear.to(torch.bfloat16)
    assert error(linear_gelu_tanh(x, linear.weight, linear.bias), want) < 5e-3


@pytest.mark.parametrize("mlp", [lambda: Mlp(128, 208), lambda: GatedMlp(128, 208, bias=True)], ids=["mlp", "gated"])
@pytest.mark.parametrize("norm", [nn.LayerNorm, RMSNorm])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layer_scale", [None, 128], ids=["plain", "layer scale"])
def test_fused_block_equals_the_plain_one(norm, mlp, bias: bool, layer_scale: int | None) -> None:
    def mix(q, k, v, segments, scale):
        return v - q * 0.1 + k * 0.2

    attn = Attention(128, 4, mix, qkv_bias=bias, proj_bias=bias)
    block = Block(lambda: norm(128, eps=1e-6), attn, mlp(), layer_scale)
    block = block.cuda().to(torch.bfloat16).requires_grad_(False)
    randomise(block, 1)
    x = torch.randn(70, 128, device="cuda", dtype=torch.bfloat16)
    angles = torch.randn(70, 16, device="cuda")
    rotary = angles.cos(), angles.sin()
    kept = x.clone()
    fused = block(x, rotary, None)
    assert torch.equal(x, kept), "a block must not write into its input"
    want = block.float().forward(x.float(), rotary, None)
    assert error(fused, want) < 2e-2
