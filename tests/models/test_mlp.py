"""MLPs whose weights are laid out for their GEMMs: padded, and gate and up projections side by side."""

from __future__ import annotations

import pytest
import torch

from vitgraph.layers.mlp import GatedMlp, Mlp
from vitgraph.models.weights import randomise

MAKERS = {
    "mlp": lambda: Mlp(64, 112),
    "quick gelu": lambda: Mlp(64, 112, "quick_gelu"),
    "gated": lambda: GatedMlp(64, 100, bias=True, out_dim=24),
    "gated without bias": lambda: GatedMlp(64, 100, bias=False),
    "gated quick gelu": lambda: GatedMlp(64, 72, bias=True, activation="quick_gelu"),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_padded_mlp_equals_the_plain_one(kind: str) -> None:
    plain, padded = (MAKERS[kind]().requires_grad_(False) for _ in range(2))
    randomise(plain, 1)
    padded.lay_out()
    shapes = {name: value.shape for name, value in plain.named_parameters()}
    assert {name: value.shape for name, value in padded.named_parameters()} == shapes
    padded.load_state_dict(plain.state_dict())
    x = torch.randn(5, 64)
    hidden = plain.up(x).shape[1]
    assert padded.up(x).shape == (5, 128)
    torch.testing.assert_close(padded.up(x)[:, :hidden], plain.up(x))
    assert not padded.up(x)[:, hidden:].any()
    torch.testing.assert_close(padded(x), plain(x))


def test_gate_and_up_projections_lie_side_by_side() -> None:
    plain, merged = (GatedMlp(64, 128, bias=True).requires_grad_(False) for _ in range(2))
    randomise(plain, 1)
    merged.lay_out()
    merged.load_state_dict(plain.state_dict())
    gate, up = merged.gate_proj.weight, merged.up_proj.weight
    assert gate.data_ptr() + gate.nbytes == up.data_ptr()
    x = torch.randn(5, 64)
    torch.testing.assert_close(merged(x), plain(x))


def test_aligned_widths_are_not_padded() -> None:
    mlp = Mlp(64, 192)
    mlp.lay_out()
    assert mlp.weights("fc1")[0] is mlp.fc1.weight
    assert mlp.up(torch.randn(3, 64)).shape == (3, 192)
