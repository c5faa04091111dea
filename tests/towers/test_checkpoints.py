"""Every published layout of every family: written, read back, and refused when something is wrong."""

from __future__ import annotations

import pytest
import torch

from families import awkward_grids, make, pixels, stacked
from vitgraph import VisionEncoder
from vitgraph.models.registry import families
from vitgraph.models.tiny import write_tiny_checkpoint

LAYOUTS = [
    pytest.param(family.name, index, id=f"{family.name}-{layout.name}")
    for family in families()
    for index, layout in enumerate(family.layouts(family.parse_config(family.tiny()[0])))
]


@pytest.mark.parametrize("family, layout", LAYOUTS)
def test_a_written_checkpoint_loads_to_the_same_tower(family: str, layout: int, tmp_path) -> None:
    seeded = make(family)
    loaded = VisionEncoder.from_pretrained(write_tiny_checkpoint(family, tmp_path, layout=layout), device="cpu")
    grids = awkward_grids(seeded.spec)
    x = pixels(seeded.spec, grids)
    assert torch.equal(stacked(seeded.encode_patches(x, grids)), stacked(loaded.encode_patches(x, grids)))
