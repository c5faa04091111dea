"""Host metadata of Qwen3-VL and Kimi-VL equals Transformers' own functions exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import vision_utils

from families import awkward_grids, composed, make
from vitgraph.core import Grid

SINGLE_PATCH_AXES = [Grid(1, 2, 64), Grid(1, 64, 2), Grid(1, 2, 2)]


def exactly(arrays: dict[str, np.ndarray], want: dict[str, torch.Tensor]) -> None:
    assert set(arrays) == set(want)
    for name, values in want.items():
        np.testing.assert_array_equal(arrays[name], values.numpy(), err_msg=name)


@pytest.mark.parametrize("grids", ["awkward", "single cells"])
def test_qwen3_vl(grids: str) -> None:
    tower = make("qwen3_vl").tower
    sizes = awkward_grids(tower.spec) if grids == "awkward" else SINGLE_PATCH_AXES
    thw = torch.tensor(sizes)
    index, weight = vision_utils.get_vision_interpolation_indices_and_weights(thw, 8, "bilinear", True, 2)
    arrays, _ = composed(tower, sizes)
    exactly(
        arrays,
        {
            "position_ids": vision_utils.get_vision_position_ids(thw, 2),
            "interp_indices": index,
            "interp_weights": weight,
            "cu_seqlens": vision_utils.get_vision_cu_seqlens(thw),
        },
    )


@pytest.mark.parametrize("grids", ["awkward", "single cells"])
def test_kimi_vl(grids: str) -> None:
    tower = make("kimi_vl").tower
    sizes = awkward_grids(tower.spec) if grids == "awkward" else SINGLE_PATCH_AXES
    thw = torch.tensor(sizes)
    index, weight = vision_utils.get_vision_interpolation_indices_and_weights(thw, 8, "bicubic", False)
    cells, start = [], 0
    for _, h, w in sizes:
        raster = torch.arange(h * w).view(h // 2, 2, w // 2, 2) + start
        cells.append(raster.transpose(1, 2).flatten())
        start += h * w
    arrays, _ = composed(tower, sizes)
    exactly(
        arrays,
        {
            "position_ids": vision_utils.get_vision_position_ids(thw, 1),
            "interp_indices": index,
            "interp_weights": weight,
            "merge_index": torch.cat(cells),
            "cu_seqlens": vision_utils.get_vision_cu_seqlens(thw, merge_temporal=True),
        },
    )


@pytest.mark.parametrize("mode, corners", [("bilinear", True), ("bilinear", False), ("bicubic", False)])
@pytest.mark.parametrize("h, w, side", [(1, 1, 8), (3, 40, 8), (24, 24, 24), (60, 2, 48)])
def test_taps_equal_interpolate(mode: str, corners: bool, h: int, w: int, side: int) -> None:
    from vitgraph.layers.pos_embed import gather_table, table_taps

    table = torch.randn(side * side, 5)
    index, weight = (torch.from_numpy(a) for a in table_taps(h, w, side, mode, corners))
    grid = table.T.view(1, 5, side, side)
    want = torch.nn.functional.interpolate(grid, (h, w), mode=mode, align_corners=corners)[0].flatten(1).T
    torch.testing.assert_close(gather_table(table, index, weight), want, rtol=1e-4, atol=1e-4)
