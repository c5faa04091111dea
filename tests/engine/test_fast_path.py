"""New batches on the fast path give and leave behind what they do on the way that takes any batch.

Graphs are played on the CPU here; tests/gpu has real ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attention_cases import interpreted_loops
from played import few_programs, played, rows_of, same
from vitgraph import VisionEncoder
from vitgraph.core import Grid, Pack
from vitgraph.engine.fast_path import FastPath
from vitgraph.engine.graph import CapturedGraph
from vitgraph.engine.intake import VECTOR
from vitgraph.engine.mailbox import Request
from vitgraph.errors import PatchError
from vitgraph.planning.cost import LONG_ROWS, CostModel

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled here"),
    interpreted_loops,
]

GRIDS = [Grid(1, 2 * n, 16) for n in (8, 7, 3, 8, 1, 5)]
"""Several packs, some of items that lie apart."""

Launches = list[int | None]


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    few_programs(monkeypatch)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Packs that each call of the fast path launched; None where it did not."""
    seen: Launches = []
    launch = FastPath.launch

    def watched(self: FastPath, *given) -> object:
        launched = launch(self, *given)
        seen.append(None if launched is None else len(launched))
        return launched

    monkeypatch.setattr(FastPath, "launch", watched)
    return seen


def knows(grids: list[Grid], **settings) -> VisionEncoder:
    """An encoder on whose device the metadata of these grids lies."""
    encoder = played(**settings)
    encoder.engine.warm_metadata(grids)
    return encoder


def requests_of(encoder: VisionEncoder, monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Receives those that graphs are launched with from now on."""
    posted: list[Request] = []
    mailbox = encoder.engine.ladder.intake.mailbox
    post = mailbox.post
    monkeypatch.setattr(mailbox, "post", lambda request: (posted.append(request), post(request))[1])
    return posted


def test_packs_are_what_they_are_on_the_other_way(launches: Launches, monkeypatch) -> None:
    choose, fast, slow = random.Random(0), knows(GRIDS), knows(GRIDS)
    monkeypatch.setattr(slow.engine._fast_path, "launch", lambda *_: None)
    batches = [GRIDS, *(choose.choices(GRIDS, k=choose.randint(1, 4)) for _ in range(4))]
    for number, grids in enumerate([*batches, *batches[:2]]):
        x = rows_of(fast, grids, number)
        assert same(fast.encode_patches(x, grids), slow.encode_patches(x, grids))
    assert fast.stats == slow.stats
    assert launches == [len(fast.plan(grids)) for grids in batches], "what is prepared needs no fast path"
    assert max(launches) > 1
    prepared = [list(encoder.engine._prepared._entries.items()) for encoder in (fast, slow)]
    for (key, own), (other_key, other) in zip(*prepared, strict=True):
        assert key == other_key
        assert (own.grids, own.shape) == (other.grids, other.shape)
        for replay, other_replay in zip(own.replays, other.replays, strict=True):
            assert replay.pack == other_replay.pack
            assert replay.pack.stretches.table == other_replay.pack.stretches.table
            assert (replay.tokens, replay.long) == (other_replay.tokens, other_replay.long)


def test_the_engines_own_call_takes_it_as_well(launches: Launches) -> None:
    encoder = knows(GRIDS)
    x = rows_of(encoder, GRIDS)
    want = encoder.encode_patches(x, GRIDS, mode="padded")
    got = encoder.engine.run(x, GRIDS)
    assert launches == [len(encoder.plan(GRIDS))]
    assert all(torch.equal(tokens[0], own.tokens) for (tokens, *_), own in zip(got, want, strict=True))


def test_a_batch_that_comes_again_finds_its_metadata_there(monkeypatch) -> None:
    encoder, grids = knows(GRIDS), [Grid(1, 2, 16), Grid(1, 6, 16)]
    x, posted = rows_of(encoder, grids), requests_of(encoder, monkeypatch)
    got = [encoder.encode_patches(x, grids) for _ in range(2)]
    assert [len(request.places) for request in posted] == [8, 0]
    assert same(*got)


def test_all_is_launched_before_any_pack_is_described(monkeypatch) -> None:
    encoder, events = knows(GRIDS), []
    make, replay = Pack.of_some, CapturedGraph.replay
    monkeypatch.setattr(Pack, "of_some", lambda *given: (events.append("described"), make(*given))[1])
    monkeypatch.setattr(CapturedGraph, "replay", lambda *given: (events.append("launched"), replay(*given))[1])
    encoder.encode_patches(rows_of(encoder, GRIDS), GRIDS)
    packs = len(events) // 2
    assert packs > 1
    assert events == ["launched"] * packs + ["described"] * packs


def _unaligned(x: Tensor) -> Tensor:
    memory = torch.empty(x.numel() + 1, dtype=x.dtype)
    return memory[1:].view(x.shape).copy_(x)


@pytest.mark.parametrize(
    "given",
    [
        Tensor.double,
        _unaligned,
        lambda x: x.t().contiguous().t(),
        lambda x: x.view(len(x), 3, -1),
    ],
    ids=["double", "unaligned", "not contiguous", "of three dimensions"],
)
def test_rows_that_graphs_cannot_read_go_the_other_way(given: Callable, launches: Launches) -> None:
    encoder = knows(GRIDS)
    x = rows_of(encoder, GRIDS)
    want = encoder.encode_patches(x, GRIDS, mode="padded")
    assert same(encoder.encode_patches(given(x), GRIDS), want)
    assert launches == [None]


def test_rows_that_need_gradients_are_read_and_leave_none(launches: Launches) -> None:
    encoder = knows(GRIDS)
    x = rows_of(encoder, GRIDS)
    got = encoder.encode_patches(x.clone().requires_grad_(), GRIDS)
    assert same(got, encoder.encode_patches(x, GRIDS, mode="padded"))
    assert not any(item.tokens.requires_grad for item in got)
    assert launches == [len(encoder.plan(GRIDS))]


def test_rows_that_are_no_vectors_wide_are_read_where_each_pack_has_one_stretch(launches: Launches) -> None:
    one, apart = [Grid(20, 4, 4)], [Grid(n, 4, 4) for n in (20, 3, 15, 20, 1, 9)]
    encoder = knows(one + apart, family="internvl")
    assert encoder.spec.patch_width % VECTOR
    assert max(len(pack.stretches) for pack in encoder.plan(apart)) > 1
    for grids in (one, apart):
        x = rows_of(encoder, grids)
        assert same(encoder.encode_patches(x, grids), encoder.encode_patches(x, grids, mode="padded"))
    assert launches == [1, None]


def test_metadata_that_is_not_there_goes_the_other_way(launches: Launches) -> None:
    encoder = knows(GRIDS[:3])
    x = rows_of(encoder, GRIDS)
    want = encoder.encode_patches(x, GRIDS, mode="padded")
    assert same(encoder.encode_patches(x, GRIDS), want)
    again = GRIDS[::-1]  # another batch of the same sizes
    x = rows_of(encoder, again)
    assert same(encoder.encode_patches(x, again), encoder.encode_patches(x, again, mode="padded"))
    assert launches[0] is None and launches[1] > 1


def test_metadata_that_left_the_device_is_not_taken_from_where_it_lay(launches: Launches) -> None:
    encoder, grids = knows(GRIDS, most_bytes=1 << 16), [Grid(1, 4, 4), Grid(1, 4, 6)]
    encoder.engine.warm_metadata(grids)
    composer = encoder.engine.ladder.composer
    composer._drop_all()
    encoder.engine.warm_metadata(grids[::-1])  # to other places
    x = rows_of(encoder, grids)
    assert same(encoder.encode_patches(x, grids), encoder.encode_patches(x, grids, mode="padded"))
    assert launches == [1]


def test_a_pack_without_its_graph_goes_the_other_way(launches: Launches) -> None:
    encoder = knows(GRIDS)
    *_, last = encoder.plan(GRIDS)
    missing = encoder.engine.ladder.graphs.pop(last.budget)
    posted = missing.mailbox.posted
    x = rows_of(encoder, GRIDS)
    assert same(encoder.encode_patches(x, GRIDS), encoder.encode_patches(x, GRIDS, mode="padded"))
    assert launches == [None]
    assert missing.mailbox.posted > posted, "those that have theirs are replayed"


def test_other_rows_than_the_grids_hold_are_refused_before_any_launch() -> None:
    encoder = knows(GRIDS)
    x = rows_of(encoder, GRIDS)
    posted = encoder.engine.ladder.intake.mailbox.posted
    for wrong in (x[1:], torch.cat([x, x[:1]])):
        with pytest.raises(PatchError, match=f"{len(wrong)} rows, but the grids hold {len(x)} patches"):
            encoder.encode_patches(wrong, GRIDS)
    assert encoder.engine.ladder.intake.mailbox.posted == posted
    assert encoder.encode_patches(x[:0], []) == []


def test_rows_of_another_width_are_refused_before_any_launch() -> None:
    encoder = knows(GRIDS)
    x = rows_of(encoder, GRIDS)
    posted = encoder.engine.ladder.intake.mailbox.posted
    for wrong in (x[:, :-8].contiguous(), x.flatten(), x.view(-1, x.shape[1] // 2), x.long(), x.numpy()):
        with pytest.raises(PatchError, match="pixel_values"):
            encoder.encode_patches(wrong, GRIDS)
    assert encoder.engine.ladder.intake.mailbox.posted == posted


def test_packs_that_lie_one_behind_the_other_are_read_where_they_begin(launches: Launches, monkeypatch) -> None:
    grids = [Grid(1, 24, 32), Grid(1, 22, 32)]
    encoder = knows(grids)
    x = rows_of(encoder, grids)
    want = encoder.encode_patches(x, grids, mode="padded")
    posted = requests_of(encoder, monkeypatch)
    assert same(encoder.encode_patches(x, grids), want)
    assert launches == [2]
    assert [request.address - x.data_ptr() for request in posted] == [0, x[:768].nbytes]
    assert not any(request.stretches for request in posted), "each is one stretch, which a request need not say"


def test_packs_of_long_segments_run_their_own_graph(launches: Launches, monkeypatch) -> None:
    encoder = knows(GRIDS)
    ladder, ran = encoder.engine.ladder, []
    for budget, graph in ladder.graphs.items():
        ladder.long[budget] = replace(graph)
    replay = CapturedGraph.replay
    monkeypatch.setattr(CapturedGraph, "replay", lambda own, *given: (ran.append(own), replay(own, *given))[1])
    for grids, long in (([Grid(1, 2, 16)], True), ([Grid(1, 2, 16)] * 2, False)):
        ran.clear()
        encoder.encode_patches(rows_of(encoder, grids), grids)
        (pack,) = encoder.plan(grids)
        (own,) = ran
        assert own is (ladder.long if long else ladder.graphs)[pack.budget]
        assert encoder.engine._prepared.find(tuple(grids), rows_of(encoder, grids).shape).replays[0].long == long
    assert LONG_ROWS > 64 and launches == [1, 1]


@pytest.mark.parametrize("eager_time", [(), (1.0,)])
def test_a_budget_that_is_not_settled_is_chosen_as_ever(eager_time: tuple[float, ...], launches: Launches) -> None:
    """The larger budget is the faster one, and eager may be faster still."""
    encoder, grids = knows(GRIDS), [Grid(1, 2, 16)]
    rows = tuple(budget.capacity["patch"] for budget in encoder.budgets)
    curve = {"eager_rows": (64,), "eager_time": eager_time} if eager_time else {}
    encoder.engine.planner.cost = CostModel((900.0, 500.0), (0.0, 0.0), rows, **curve)
    x = rows_of(encoder, grids)
    assert same(encoder.encode_patches(x, grids), encoder.encode_patches(x, grids, mode="padded"))
    (pack,) = encoder.plan(grids)
    assert pack.budget == (None if eager_time else 1)
    assert launches == [None if eager_time else 1]


def test_a_launch_that_fails_leaves_the_next_one_alone(monkeypatch) -> None:
    """Also a batch that was prepared, whose metadata lay there before the first launch of the one that fails."""
    encoder, grids = knows(GRIDS), [Grid(1, 2, 16)]
    x, several = rows_of(encoder, grids), rows_of(encoder, GRIDS)
    want = encoder.encode_patches(x, grids, mode="padded")
    assert same(encoder.encode_patches(x, grids), want)
    replay, launched = CapturedGraph.replay, []

    def fail_second(graph: CapturedGraph, *given) -> object:
        launched.append(graph)
        if len(launched) == 2:
            raise RuntimeError("no launch")
        return replay(graph, *given)

    with monkeypatch.context() as patch:
        patch.setattr(CapturedGraph, "replay", fail_second)
        with pytest.raises(RuntimeError, match="no launch"):
            encoder.encode_patches(several, GRIDS)
    assert same(encoder.encode_patches(x, grids), want)
    assert same(encoder.encode_patches(several, GRIDS), encoder.encode_patches(several, GRIDS, mode="padded"))
