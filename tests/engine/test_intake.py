"""What graphs do before the forward, against the host's way: an engine whose graphs are played on the CPU.

The kernels run in Triton's interpreter here, and compiled in tests/gpu.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from attention_cases import interpreted_loops
from families import awkward_grids
from played import BUDGETS, few_programs, plain, played, rows_of, same
from vitgraph.core import Grid, Stretches
from vitgraph.engine import intake_triton
from vitgraph.engine.intake import DTYPES, VECTOR
from vitgraph.engine.mailbox import HEAD, STRETCHES
from vitgraph.engine.staging import Staging

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled here"),
    interpreted_loops,
]


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    few_programs(monkeypatch)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "kimi_k25", "internvl"])
def test_new_and_known_combinations_give_what_the_padded_forward_gives(family: str) -> None:
    reference, encoder, choose = plain(family), played(family), random.Random(0)
    grids = [grid for grid in awkward_grids(encoder.spec) if encoder.spec.counts(grid)["token"] <= BUDGETS[0]]
    batches = [choose.choices(grids, k=choose.randint(1, 3)) for _ in range(3)]
    for number, batch in enumerate([*batches, batches[0], batches[0]]):
        x = rows_of(encoder, batch, number)
        assert same(encoder.encode_patches(x, batch), reference.encode_patches(x, batch, mode="padded"))
    mailbox = encoder.engine.ladder.static(0).arena.intake.mailbox
    assert int(mailbox.copied) == mailbox.posted
    stats = encoder.stats
    assert stats.graph_replays >= 5
    assert stats.host_metadata == 0


def test_every_item_counts_as_found_or_not() -> None:
    encoder = played()
    first, second = [Grid(1, 4, 6), Grid(1, 2, 2)], [Grid(1, 4, 6), Grid(1, 8, 2), Grid(1, 2, 2)]
    for batch in (first, first, second, first):
        encoder.encode_patches(rows_of(encoder, batch), batch)
    stats = encoder.stats
    assert (stats.metadata_misses, stats.metadata_hits) == (3, 6)


@pytest.mark.parametrize(
    "given",
    [
        lambda x: x,
        lambda x: x.half(),
        lambda x: x.bfloat16(),
        lambda x: x.double(),
        lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
        lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    ],
    ids=["float32", "float16", "bfloat16", "float64", "strided", "unaligned"],
)
def test_rows_of_any_dtype_and_layout(given) -> None:
    encoder, grids = played(), [Grid(1, 4, 6), Grid(1, 2, 2)]
    x = given(rows_of(encoder, grids))
    want = encoder.encode_patches(x, grids, mode="padded")
    for _ in range(2):
        assert same(encoder.encode_patches(x, grids), want)
    encoder.encode_patches(rows_of(encoder, [Grid(1, 8, 8)]), [Grid(1, 8, 8)])
    assert same(encoder.encode_patches(x, grids), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("elements", [1, 8, 61, 64, 67, 130, 195])
def test_rows_of_any_number_of_elements_are_copied_and_nothing_behind_them(
    elements: int, dtype: torch.dtype, monkeypatch
) -> None:
    monkeypatch.setattr(intake_triton, "BLOCK", 64)
    likes = [torch.zeros(8, dtype=like) for like in DTYPES]
    rows = torch.randn(256).to(dtype)
    out = torch.full((200, 1), -1.0)
    intake_triton.copy_pixels(asked(rows, elements), HEAD, likes, out)
    assert torch.equal(out[:elements, 0], rows[:elements].float())
    assert (out[elements:] == -1).all()


def asked(rows: Tensor, elements: int, stretches: tuple = ()) -> Tensor:
    """A request for rows, as the device has it."""
    table = torch.frombuffer(bytearray(Stretches.of(stretches).table or bytes(8)), dtype=torch.int32)
    request = torch.cat([torch.zeros(HEAD, dtype=torch.int32), table])
    request[1], request[STRETCHES] = DTYPES.index(rows.dtype) + 1, len(stretches)
    request.view(torch.int64)[1:3] = torch.tensor([rows.data_ptr(), elements])
    return request


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [16, 64, 4096])
@pytest.mark.parametrize("width", [8, 24])
def test_rows_in_stretches_are_copied_one_after_another(width: int, block: int, dtype, monkeypatch) -> None:
    monkeypatch.setattr(intake_triton, "BLOCK", block)
    likes = [torch.zeros(8, dtype=like) for like in DTYPES]
    rows = torch.randn(40, width).to(dtype)
    for stretches in (((30, 9), (0, 1), (2, 1), (5, 13)), ((3, 2), (1, 1)), tuple((i, 1) for i in range(39, 0, -2))):
        out = torch.full((30, width), -1.0)
        want = torch.cat([rows[first : first + count] for first, count in stretches]).float()
        intake_triton.copy_pixels(asked(rows, want.numel(), stretches), HEAD, likes, out)
        assert torch.equal(out[: len(want)], want)
        assert (out[len(want) :] == -1).all()


def test_what_one_encoder_knows_of_a_batch_is_not_taken_from_another() -> None:
    first, second = played(), played()
    grids = [Grid(1, 4, 6), Grid(1, 2, 2)]
    # Another order, and so other places on the device.
    for batch in (grids[::-1], grids):
        first.encode_patches(rows_of(first, batch), batch)
    x = rows_of(second, grids)
    want = second.encode_patches(x, grids, mode="padded")
    (pack,) = first.plan(grids)
    assert same(second.engine.embed(x, pack.grids), want)
    assert pack.grids.known[0] is not second.engine.planner.batch(pack.grids).known[0]


@pytest.mark.parametrize("family", ["qwen3_vl", "internvl"])
def test_rows_that_lie_apart_are_read_by_graphs_where_they_are_as_wide_as_vectors(family: str, monkeypatch) -> None:
    encoder = played(family)
    tiles = [Grid(n, 4, 4) for n in (20, 3, 15, 20, 1, 9)]
    grids = tiles if family == "internvl" else [Grid(1, 2 * n, 16) for n in (8, 7, 3, 8, 1, 5)]
    x = rows_of(encoder, grids)
    apart = sum(len(pack.stretches) > 1 for pack in encoder.plan(grids))
    assert apart
    copies: list[int] = []
    bring = Staging._bring_rows
    monkeypatch.setattr(Staging, "_bring_rows", lambda *given: (copies.append(1), bring(*given))[1])
    want = encoder.encode_patches(x, grids, mode="padded")
    copies.clear()
    for _ in range(3):
        assert same(encoder.encode_patches(x, grids), want)
    assert len(copies) == (3 * apart if encoder.spec.patch_width % VECTOR else 0)


def test_a_pack_that_lies_behind_another_is_read_where_it_begins(monkeypatch) -> None:
    encoder, grids = played(), [Grid(1, 24, 32), Grid(1, 22, 32)]
    x = rows_of(encoder, grids)
    assert [tuple(pack.stretches) for pack in encoder.plan(grids)] == [((0, 768),), ((768, 704),)]
    want = encoder.encode_patches(x, grids, mode="padded")
    monkeypatch.setattr(Staging, "_bring_rows", lambda *_: pytest.fail("copied by the host"))
    assert same(encoder.encode_patches(x, grids), want)


def test_one_item_of_a_list_is_read_by_its_graph(monkeypatch) -> None:
    encoder, grids = played(), [Grid(1, 6, 8)]
    x = rows_of(encoder, grids)
    want = encoder.encode_patches(x, grids, mode="padded")
    monkeypatch.setattr(Staging, "_bring_rows", lambda *_: pytest.fail("copied by the host"))
    assert same(encoder.engine.embed([x], grids), want)


def test_batches_in_pieces_and_in_several_packs() -> None:
    encoder = played()
    grids = [Grid(1, 2 * choose, 16) for choose in (8, 7, 3, 8, 1, 5)]
    x = rows_of(encoder, grids)
    assert len(encoder.plan(grids)) > 1
    assert any(len(pack.stretches) > 1 for pack in encoder.plan(grids))
    for given in (x, x.half().float(), x.double()):
        for _ in range(2):
            assert same(encoder.encode_patches(given, grids), encoder.encode_patches(given, grids, mode="padded"))
    got = encoder.engine.embed([own.clone() for own in x.split([grid.patches for grid in grids])], grids)
    assert same(got, encoder.encode_patches(x, grids, mode="padded"))


def test_parts_that_the_device_has_no_room_for_are_written_by_the_host(caplog) -> None:
    encoder = played(most_bytes=1 << 10)
    grids = [Grid(1, 8, 8), Grid(1, 6, 8)]
    x = rows_of(encoder, grids)
    for _ in range(2):
        assert same(encoder.encode_patches(x, grids), encoder.encode_patches(x, grids, mode="padded"))
    assert "too much memory" in caplog.text
    assert encoder.stats.host_metadata >= 2


def test_a_replay_by_hand_changes_nothing() -> None:
    encoder, grids = played(), [Grid(1, 8, 8)]
    x = rows_of(encoder, grids)
    want = [embedding.tokens for embedding in encoder.encode_patches(x, grids)]
    (budget,) = [pack.budget for pack in encoder.plan(grids)]
    outputs = encoder.engine.captured(budget).replay()
    assert torch.equal(outputs[0][0, : want[0].shape[0]], want[0])
    assert same(encoder.encode_patches(x, grids), encoder.encode_patches(x, grids, mode="padded"))
