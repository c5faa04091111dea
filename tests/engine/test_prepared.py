"""Batches that come again run as they were prepared, and only while all that they rest on is what it was."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from vitgraph import EncoderConfig, VisionEncoder
from vitgraph.core import Grid
from vitgraph.engine.engine import Engine
from vitgraph.engine.prepared import MOST_ITEMS, PreparedBatches
from vitgraph.errors import EngineReleasedError, PatchError
from vitgraph.planning.packing import EAGER_IS_FASTER, Planner

BATCHES = [[(1, 8, 8), (1, 4, 12)], [(1, 8, 8)], [(1, 4, 12), (1, 8, 8)], [(1, 12, 12)], [(1, 2, 2)] * 3]
"""Of two budgets, each one pack."""


def make(family: str = "qwen2_5_vl", **settings: object) -> VisionEncoder:
    settings = {"budgets": (24, 64), **settings}
    return VisionEncoder.from_config(family, device="cpu", config=EncoderConfig(**settings))


def rows_of(encoder: VisionEncoder, grids: list, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(t * h * w for t, h, w in grids), encoder.spec.patch_width, generator=generator)


@pytest.fixture
def replays(monkeypatch) -> list:
    """The packs that ran again, as they were prepared."""
    ran: list = []
    run_again = Engine._run_again

    def watched(self: Engine, key: object, rows: torch.Tensor) -> object:
        found = run_again(self, key, rows)
        if found is not None:
            ran.extend(pack for pack, _ in found[0])
        return found

    monkeypatch.setattr(Engine, "_run_again", watched)
    return ran


def same(got: list, want: list) -> bool:
    pairs = list(zip(got, want, strict=True))
    levels = all((g.deepstack is None) == (w.deepstack is None) for g, w in pairs)
    return (
        levels
        and all(torch.equal(g.tokens, w.tokens) and g.grid == w.grid for g, w in pairs)
        and all(torch.equal(g.deepstack, w.deepstack) for g, w in pairs if g.deepstack is not None)
    )


def warm(encoder: VisionEncoder, grids: list) -> None:
    """Until the batch is prepared, which it is when it has run."""
    encoder.encode_patches(rows_of(encoder, grids), grids)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_batches_in_turn_give_what_the_unprepared_path_gives(family: str, replays: list) -> None:
    encoder = make(family)
    for turn in range(5):
        # Repeats in a row, and each batch after each other one.
        for index in [*range(len(BATCHES)), *reversed(range(len(BATCHES)))]:
            grids, x = BATCHES[index], rows_of(encoder, BATCHES[index], turn)
            got = encoder.encode_patches(x, grids)
            assert same(got, encoder.encode_patches(x, grids, mode="padded"))
            assert same(encoder.encode_patches(x, grids), got)
    assert len(replays) > 60


def test_counters_are_the_same_either_way(replays: list) -> None:
    prepared, plain = make(), make()
    plain.engine._prepared = PreparedBatches(0)
    for encoder in (prepared, plain):
        for grids in BATCHES * 3:
            encoder.encode_patches(rows_of(encoder, grids), grids)
    assert len(replays) == 2 * len(BATCHES)
    assert replace(prepared.stats, static_bytes=0) == replace(plain.stats, static_bytes=0)


def test_a_batch_that_comes_again_counts_as_found() -> None:
    encoder = make()
    for _ in range(4):
        for grids in BATCHES:
            encoder.encode_patches(rows_of(encoder, grids), grids)
    stats = encoder.stats
    assert stats.metadata_misses == len({grid for grids in BATCHES for grid in grids})
    assert stats.metadata_hits == 4 * sum(map(len, BATCHES)) - stats.metadata_misses


@pytest.mark.parametrize(
    "form",
    [
        lambda grids: [Grid(*g) for g in grids],
        lambda grids: tuple(grids),
        lambda grids: [list(g) for g in grids],
        lambda grids: torch.tensor(grids),
        lambda grids: torch.tensor(grids).repeat(1, 2)[:, :3],
        lambda grids: torch.tensor(grids, dtype=torch.int32),
        lambda grids: [torch.tensor(g) for g in grids],
    ],
    ids=["grids", "tuple", "lists", "tensor", "strided tensor", "int32 tensor", "list of tensors"],
)
def test_grids_in_every_form_give_the_same(form, replays: list) -> None:
    encoder = make("qwen3_vl")
    for turn in range(4):
        for grids in BATCHES:
            x = rows_of(encoder, grids, turn)
            assert same(encoder.encode_patches(x, form(grids)), encoder.encode_patches(x, grids, mode="padded"))
    assert replays or form(BATCHES[0])[0].__class__ is torch.Tensor


def test_grids_that_are_overwritten_in_place_are_read_anew() -> None:
    encoder = make("qwen3_vl")
    for grid in (torch.tensor([[1, 4, 12]]), [torch.tensor([1, 4, 12])], [[1, 4, 12]]):
        x = rows_of(encoder, [(1, 4, 12)])
        for _ in range(3):
            encoder.encode_patches(x, grid)
        grid[0][1], grid[0][2] = 12, 4
        assert encoder.encode_patches(x, grid)[0].grid == (1, 12, 4)


@pytest.mark.parametrize(
    "rows, message",
    [
        (lambda x: x[:-1], "63 rows"),
        (lambda x: x[:, :-1], "expects"),
        (lambda x: x.int(), "floating point"),
        (lambda x: x.numpy(), "floating point"),
    ],
    ids=["rows", "width", "integers", "array"],
)
def test_rows_that_do_not_fit_a_prepared_batch_are_refused_as_ever(rows, message: str) -> None:
    encoder, grids = make(), [(1, 8, 8)]
    warm(encoder, grids)
    x = rows_of(encoder, grids)
    with pytest.raises(PatchError, match=message):
        encoder.encode_patches(rows(x), grids)
    assert same(encoder.encode_patches(x, grids), encoder.encode_patches(x, grids, mode="padded"))


def test_other_dtypes_shapes_and_gradients_are_served(replays: list) -> None:
    encoder, grids = make(), [(1, 8, 8)]
    warm(encoder, grids)
    x = rows_of(encoder, grids).half().float()
    want = encoder.encode_patches(x, grids, mode="padded")
    for given in (x.half(), x.double(), x.t().contiguous().t(), x.view(64, -1, 4), x.clone().requires_grad_()):
        got = encoder.encode_patches(given, grids)
        assert same(got, want)
        assert not got[0].tokens.requires_grad
    assert len(replays) == 3
    assert not encoder.engine.ladder.static(replays[0].budget).inputs.pixel_values.requires_grad


def test_results_do_not_alias_the_static_buffers() -> None:
    encoder, grids = make("qwen3_vl"), [(1, 8, 8), (1, 4, 4)]
    warm(encoder, grids)
    want = encoder.encode_patches(rows_of(encoder, grids), grids, mode="padded")
    got = encoder.encode_patches(rows_of(encoder, grids), grids)  # no view is made before the next replay
    encoder.encode_patches(rows_of(encoder, grids, seed=9), grids)
    assert same(got, want)


def test_metadata_that_lies_there_already_is_not_written(monkeypatch) -> None:
    encoder = make()
    for grids in BATCHES:
        warm(encoder, grids)
    arena = encoder.engine.ladder.static(0).arena
    before = arena.block._version
    for _ in range(3):
        encoder.encode_patches(rows_of(encoder, BATCHES[-1]), BATCHES[-1])
    assert arena.block._version == before
    encoder.encode_patches(rows_of(encoder, BATCHES[0]), BATCHES[0])
    assert arena.block._version == before + 1


def _stage(encoder: VisionEncoder) -> None:
    encoder.engine.stage(1, [Grid(1, 4, 4)])


def _stage_the_same(encoder: VisionEncoder) -> None:
    encoder.engine.stage(0, [Grid(1, 4, 4), Grid(1, 2, 2)])


def _fresh(encoder: VisionEncoder) -> None:
    grids = [(1, 6, 10)]
    encoder.encode_patches(rows_of(encoder, grids), grids)


def _padded(encoder: VisionEncoder) -> None:
    grids = [(1, 2, 20)]
    encoder.encode_patches(rows_of(encoder, grids), grids, mode="padded")


def _capture(encoder: VisionEncoder) -> None:
    encoder.engine.ladder.static(0).arena.clear_block()


def _fail(encoder: VisionEncoder) -> None:
    grids = [(1, 8, 8)]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(encoder.tower, "forward", lambda *_: (_ for _ in ()).throw(RuntimeError()))
        encoder.encode_patches(rows_of(encoder, grids), grids)


@pytest.mark.parametrize("between", [_stage, _stage_the_same, _fresh, _padded, _capture, _fail])
def test_whatever_writes_the_block_in_between_is_undone(between) -> None:
    encoder = make()
    for grids in BATCHES:
        warm(encoder, grids)
    for grids in BATCHES:
        x = rows_of(encoder, grids, 5)
        want = encoder.encode_patches(x, grids, mode="padded")
        encoder.encode_patches(x, grids)
        between(encoder)
        assert same(encoder.encode_patches(x, grids), want)


def test_pixels_poisoned_in_between_do_not_show() -> None:
    encoder = make()
    for grids in BATCHES:
        warm(encoder, grids)
        x = rows_of(encoder, grids, 5)
        want = encoder.encode_patches(x, grids)
        encoder.engine.poison_padding()
        assert same(encoder.encode_patches(x, grids), want)


def test_a_tower_that_writes_to_its_metadata_gets_it_anew_for_every_run(monkeypatch) -> None:
    encoder = make("qwen3_vl")
    forward = encoder.tower.forward

    def spoiling(buffers):
        out = forward(buffers)
        for tensor in buffers.metadata.values():
            tensor.zero_()
        return out

    monkeypatch.setattr(encoder.tower, "forward", spoiling)
    grids = [(1, 8, 8), (1, 4, 4)]
    x = rows_of(encoder, grids)
    want = encoder.encode_patches(x, grids, mode="eager")
    for _ in range(5):
        for got, expected in zip(encoder.encode_patches(x, grids), want, strict=True):
            torch.testing.assert_close(got.tokens, expected.tokens, rtol=1e-5, atol=1e-5)


def test_another_cost_model_plans_anew(replays: list) -> None:
    encoder, grids = make(), [(1, 8, 8)]
    warm(encoder, grids)
    planner = encoder.engine.planner
    # As if the larger budget had been found to be faster.
    planner.cost = replace(planner.cost, fixed=(900.0, 100.0))
    x = rows_of(encoder, grids)
    before = encoder.stats.padded_tokens
    encoder.encode_patches(x, grids)
    assert not replays
    assert encoder.stats.padded_tokens == before + 64
    encoder.engine.planner = Planner(encoder.spec, encoder.budgets)
    before = encoder.stats.padded_tokens
    encoder.encode_patches(x, grids)
    assert encoder.stats.padded_tokens == before + 24


def test_the_oldest_prepared_replays_make_room(replays: list) -> None:
    encoder = make()
    encoder.engine._prepared = PreparedBatches(2)
    for grids in BATCHES:
        warm(encoder, grids)
    assert len(encoder.engine._prepared) == 2
    for grids in BATCHES:
        x = rows_of(encoder, grids, 3)
        assert same(encoder.encode_patches(x, grids), encoder.encode_patches(x, grids, mode="padded"))


class Untouched:
    """A key that nobody should look up."""

    def __hash__(self) -> int:
        raise AssertionError("hashed")


def test_a_key_is_looked_up_only_where_rows_of_its_shape_were_prepared() -> None:
    encoder = make()
    prepared, x = encoder.engine._prepared, rows_of(encoder, BATCHES[0])
    encoder.encode_patches(x, BATCHES[0])
    other = rows_of(encoder, BATCHES[1])
    assert prepared.find(Untouched(), other.shape) is None
    with pytest.raises(AssertionError, match="hashed"):
        prepared.find(Untouched(), x.shape)
    key = tuple(BATCHES[0])
    found = prepared.find(key, x.shape)
    assert found is not None and found.shape == x.shape
    encoder.encode_patches(other, BATCHES[1])
    assert prepared.find(key, other.shape) is None, "rows of another batch"
    for _ in range(2):
        prepared.keep(key, found)
    prepared.drop(key)
    prepared.drop(key)
    assert prepared.find(Untouched(), x.shape) is None
    prepared.clear()
    assert prepared.find(Untouched(), other.shape) is None


SEVERAL = [
    [(1, 8, 8)] * 6,
    [(1, 4, 12), (1, 8, 8), (1, 2, 2), (1, 12, 12), (1, 8, 8), (1, 2, 6), (1, 12, 12)],
    [(1, 4, 4), (9, 8, 8), (1, 2, 2)],
]
"""Of several packs each: whose rows lie one after another, whose rows are mixed, and one whose clip is cut."""


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_batches_of_several_packs_are_prepared_as_well(family: str, replays: list) -> None:
    encoder = make(family)
    for grids in SEVERAL * 2:
        x = rows_of(encoder, grids)
        want = encoder.encode_patches(x, grids, mode="padded")
        packs = encoder.plan(grids)
        for turn in range(3):
            replays.clear()
            assert same(encoder.encode_patches(x, grids), want)
            assert len(replays) == len(packs) > 1 or turn == 0
            warm(encoder, BATCHES[0])
    assert any(len(pack.stretches) > 1 for pack in encoder.plan(SEVERAL[1]))


@pytest.mark.parametrize("grids", SEVERAL, ids=["equal", "mixed", "cut"])
def test_several_packs_count_the_same_either_way(grids: list) -> None:
    prepared, plain = make(), make()
    plain.engine._prepared = PreparedBatches(0)
    plain.engine._runner.prepare = lambda pack: None
    for encoder in (prepared, plain):
        for _ in range(3):
            encoder.encode_patches(rows_of(encoder, grids), grids)
    assert prepared.stats.items == 3 * len(grids)
    assert prepared.stats.packs == prepared.stats.replays == 3 * len(prepared.plan(grids))
    assert prepared.stats.graph_replays == 0, "the CPU has no graphs"
    assert (prepared.stats.python_searches, plain.stats.python_searches) == (2, 3), "once, and once by plan()"
    own = {"static_bytes": 0, "python_searches": 0}
    assert replace(prepared.stats, **own) == replace(plain.stats, **own)


def test_the_first_pack_runs_before_the_second_is_made(monkeypatch) -> None:
    encoder, grids = make(), SEVERAL[1]
    events: list[str] = []
    packs, replay = encoder.engine.planner.packs, encoder.engine._runner.replay

    def watched(*args):
        for pack in packs(*args):
            events.append("made")
            yield pack

    monkeypatch.setattr(encoder.engine.planner, "packs", watched)
    monkeypatch.setattr(encoder.engine._runner, "replay", lambda *args: (events.append("ran"), replay(*args))[1])
    x = rows_of(encoder, grids)
    assert same(encoder.encode_patches(x, grids), encoder.encode_patches(x, grids, mode="padded"))
    assert len(events) > 4
    half = len(events) // 3 * 2  # the padded run makes as many packs, and replays none
    assert events[:half] == ["made", "ran"] * (half // 2)


def test_another_graph_of_any_pack_is_noticed(replays: list) -> None:
    encoder, grids = make(), SEVERAL[0]
    warm(encoder, grids)
    *_, last = encoder.plan(grids)
    encoder.engine.ladder.graphs[last.budget] = SimpleNamespace(replay=lambda: None)  # type: ignore[assignment]
    warm(encoder, grids)
    assert not replays
    del encoder.engine.ladder.graphs[last.budget]
    for _ in range(2):
        warm(encoder, grids)
    assert replays


def test_a_batch_is_not_prepared_where_a_pack_runs_eager() -> None:
    encoder = make("qwen3_vl", budgets=(16,))
    for grids in ([(1, 20, 20)], [(1, 8, 8), (1, 20, 20)]):
        x = rows_of(encoder, grids)
        want = encoder.encode_patches(x, grids)
        for _ in range(3):
            assert same(encoder.encode_patches(x, grids), want)
    assert len(encoder.engine._prepared) == 0


def test_batches_of_very_many_items_are_not_kept() -> None:
    encoder = make("qwen3_vl")
    for items in (MOST_ITEMS, MOST_ITEMS + 1):
        warm(encoder, [(1, 2, 2)] * items)
        assert len(encoder.engine._prepared) == 1


@pytest.mark.parametrize("strict", [False, True])
def test_what_is_faster_eager_is_not_replayed_unless_it_must_be(strict: bool) -> None:
    encoder, grids = make(strict=strict), BATCHES[0]
    cost = encoder.engine.planner.cost
    encoder.engine.planner.cost = replace(cost, eager_rows=(1, 10_000), eager_time=(0.0, 0.0))
    x = rows_of(encoder, grids)
    for _ in range(2):
        assert same(encoder.encode_patches(x, grids), encoder.encode_patches(x, grids, mode="padded"))
    assert encoder.stats.fallbacks == ({} if strict else {EAGER_IS_FASTER: 2})
    assert len(encoder.engine._prepared) == int(strict)


def test_without_graphs_nothing_is_prepared() -> None:
    encoder = make(graph=False)
    warm(encoder, BATCHES[0])
    assert len(encoder.engine._prepared) == 0


def test_a_released_encoder_says_so_for_prepared_batches() -> None:
    encoder = make()
    warm(encoder, BATCHES[0])
    encoder.release()
    assert len(encoder.engine._prepared) == 0, "its views would keep the static buffers"
    with pytest.raises(EngineReleasedError):
        encoder.encode_patches(rows_of(encoder, BATCHES[0]), BATCHES[0])


def test_items_of_the_engine_come_the_same_from_a_prepared_replay(replays: list) -> None:
    encoder = make("qwen3_vl")
    grids = [Grid(1, 8, 8), Grid(1, 4, 4)]
    x = rows_of(encoder, grids)
    want = encoder.engine.run(x, grids, "padded")
    for _ in range(4):
        got = encoder.engine.run(x, grids)
        assert all(torch.equal(g, w) for a, b in zip(got, want, strict=True) for g, w in zip(a, b, strict=True))
        by_item = encoder.engine.run(list(x.split([64, 16])), grids)
        assert torch.equal(by_item[1][0], want[1][0])
    assert replays


@pytest.mark.parametrize("first", [False, True], ids=["made outside", "made inside"])
def test_inference_mode_may_begin_and_end_between_calls(first: bool, replays: list) -> None:
    encoder, grids = make(), [(1, 8, 8), (1, 2, 2)]
    x = rows_of(encoder, grids)
    want = encoder.encode_patches(x, grids, mode="padded")  # the static buffers are made outside
    for turn in range(6):
        with torch.inference_mode((turn < 3) == first):
            got = encoder.encode_patches(x, grids)
            assert same(got, want)
    assert len(replays) == 5
