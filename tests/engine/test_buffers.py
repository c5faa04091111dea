"""Placement, composition and padding of metadata."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitgraph.attention.base import tile_bound, write_tiles
from vitgraph.engine.buffers import ALIGNMENT, MetadataLayout
from vitgraph.models.contract import BufferSpec, TowerSpec, cu_seqlens_buffer
from vitgraph.planning.metadata import GridPlan

SPEC = TowerSpec(
    family="test",
    modalities=("image",),
    patch_width=4,
    merge=1,
    temporal_patch=1,
    width=4,
    buffers=(
        BufferSpec("ids", "int32", "patch", (2,)),
        BufferSpec("weights", "float32", "patch", pad="one"),
        BufferSpec("order", "int32", "token", pad="identity_tail", offset="token"),
        cu_seqlens_buffer(),
    ),
)
CAPACITY = {"patch": 10, "token": 6, "item": 3, "segment": 4}
ITEMS = [
    {
        "ids": np.array([[1, 2], [3, 4]], np.int32),
        "weights": np.array([0.5, 0.25], np.float32),
        "order": np.array([1, 0], np.int32),
        "cu_seqlens": np.array([2], np.int32),
    },
    {
        "ids": np.array([[5, 6], [7, 8], [9, 9]], np.int32),
        "weights": np.array([2, 3, 4], np.float32),
        "order": np.array([1, 0], np.int32),
        "cu_seqlens": np.array([1, 3], np.int32),
    },
]
_COUNTS = [{"patch": 2, "token": 2, "item": 1, "segment": 1}, {"patch": 3, "token": 2, "item": 1, "segment": 2}]


PLANS = [GridPlan(counts, metadata) for counts, metadata in zip(_COUNTS, ITEMS, strict=True)]


def test_items_follow_each_other_shifted_and_padded_as_declared() -> None:
    layout = MetadataLayout(SPEC, CAPACITY)
    block = np.full(layout.nbytes, 0xAB, np.uint8)
    layout.write(layout.arrays(block), PLANS)
    got = layout.arrays(block)
    assert got["ids"].tolist() == [[1, 2], [3, 4], [5, 6], [7, 8], [9, 9]] + [[0, 0]] * 5
    assert got["weights"].tolist() == [0.5, 0.25, 2, 3, 4, 1, 1, 1, 1, 1]
    assert got["order"].tolist() == [1, 0, 3, 2, 4, 5]
    assert got["cu_seqlens"].tolist() == [0, 2, 3, 5, 5]


def test_an_empty_pack_is_all_padding() -> None:
    layout = MetadataLayout(SPEC, CAPACITY)
    block = np.full(layout.nbytes, 0xAB, np.uint8)
    layout.write(layout.arrays(block), [])
    got = layout.arrays(block)
    assert got["cu_seqlens"].tolist() == [0] * 5
    assert got["order"].tolist() == list(range(6))


def test_buffers_are_aligned_apart_and_the_same_for_torch() -> None:
    layout = MetadataLayout(SPEC, CAPACITY)
    assert all(slot.offset % ALIGNMENT == 0 for slot in layout.slots)
    ends = [slot.offset + slot.nbytes for slot in layout.slots]
    assert all(end <= after.offset for end, after in zip(ends, layout.slots[1:], strict=False))
    block = torch.zeros(layout.nbytes, dtype=torch.uint8)
    layout.write(layout.arrays(block.numpy()), PLANS)
    for name, array in layout.arrays(block.numpy()).items():
        assert layout.tensors(block)[name].numpy().tolist() == array.tolist()


@given(st.lists(st.integers(0, 70), max_size=8), st.integers(0, 100), st.sampled_from([4, 16, 64]))
def test_tile_schedule_covers_every_row_once(lengths: list[int], spare: int, block: int) -> None:
    cu = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32)
    rows = int(cu[-1]) + spare
    tiles = np.full((tile_bound(rows, len(lengths), block), 4), -7, np.int32)
    write_tiles(cu, rows, block, tiles)
    seen = np.zeros(rows, int)
    for first, end, key_first, key_end in tiles:
        seen[first:end] += 1
        assert end - first <= block
        for row in range(first, end):
            segment = np.searchsorted(cu[1:], row, side="right")
            expected = (cu[segment], cu[segment + 1]) if row < cu[-1] else (0, 0)
            assert (key_first, key_end) == expected
    assert (seen == 1).all()
