"""Choice of an attention backend by measurement, with made-up backends; the zeroing of rows past the last segment."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from attention_cases import make_segments
from vitgraph import EncoderConfig, VisionEncoder
from vitgraph.attention import flash
from vitgraph.attention.auto import CLASSES, AutoAttention
from vitgraph.attention.base import Segments, has_own_graph
from vitgraph.attention.choices import load_times, save_times
from vitgraph.attention.sdpa import SdpaAttention
from vitgraph.attention.select import select_attention
from vitgraph.core import Grid
from vitgraph.errors import ConfigError
from vitgraph.launch import compiling, only_compiles
from vitgraph.measured import cache_folder

CPU = torch.device("cpu")


class Own(SdpaAttention):
    """The reference under the name of our kernel; counts its calls."""

    name = "triton"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
        self.calls += 1
        return super().__call__(q, k, v, segments, scale)


class Other(Own):
    """A backend that is faster for long segments."""

    name = "other"

    def version(self) -> str:
        return "1.0"


class Broken(Other):
    name = "broken"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
        raise RuntimeError("no such head dim")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("VITGRAPH_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def clock(own: Own, other: Other, crossover: int):
    """Times as if `other` won from `crossover` rows on."""
    made = iter(CLASSES)
    state = {"rows": 0, "turn": 0}

    def time(call) -> float:
        # Own, other, then backwards.
        if state["turn"] == 0:
            state["rows"] = next(made)
        is_own = state["turn"] in (0, 3)
        state["turn"] = (state["turn"] + 1) % 4
        return 100.0 if is_own else (50.0 if state["rows"] >= crossover else 99.0)

    return time


def test_the_faster_backend_runs_packs_of_one_segment_and_no_others(caplog) -> None:
    own, other = Own(), Other()
    attention = AutoAttention(own, [other], CPU, torch.float32, clock(own, other, 4096))
    assert not has_own_graph(attention, 16384), "nothing was measured yet"
    qkv = torch.randn(64, 3, 2, 8)
    segments = make_segments(64, [40, 24], 0)
    with caplog.at_level(logging.INFO, "vitgraph"):
        attention(*qkv.unbind(1), segments, 1.0)
    assert (own.calls, other.calls) == (1, 0)
    assert "4096 rows other" in caplog.text and "2048 rows triton" in caplog.text
    assert [has_own_graph(attention, rows) for rows in (256, 2048, 4096, 5000, 40000)] == [
        False, False, True, True, True,
    ]  # fmt: skip


class WarmedUp(Other):
    """Counts warm-ups, of which those in a `compiling` block."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.warm_ups, self.ahead = name, 0, 0

    def warm_up(self, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> None:
        assert (heads, head_dim, device, dtype) == (2, 8, CPU, torch.float32)
        self.warm_ups += 1
        self.ahead += only_compiles()


TIMES = {rows: {"triton": 100.0, "other": 50.0, "unused": 200.0} for rows in CLASSES}


def test_what_was_chosen_is_warmed_up_when_the_times_come_from_a_file() -> None:
    own, chosen, unused = Own(), WarmedUp("other"), WarmedUp("unused")
    attention = AutoAttention(own, [chosen, unused], CPU, torch.float32)
    save_times(attention._key(2, 8), TIMES)
    attention(*torch.randn(8, 3, 2, 8).unbind(1), make_segments(8, [8], 0), 1.0)
    assert (chosen.warm_ups, unused.warm_ups) == (1, 0)


@pytest.mark.parametrize("kept", [False, True])
def test_what_will_be_measured_or_was_chosen_is_warmed_up_while_kernels_are_compiled(kept: bool) -> None:
    own, chosen, unused = Own(), WarmedUp("other"), WarmedUp("unused")
    attention = AutoAttention(own, [chosen, unused], CPU, torch.float32)
    if kept:
        save_times(attention._key(2, 8), TIMES)
    for block in range(2):
        with compiling(CPU):
            for _ in range(3):
                attention(*torch.randn(8, 3, 2, 8).unbind(1), make_segments(8, [8], 0), 1.0)
            assert chosen.warm_ups == block, "when all is launched"
    assert (chosen.ahead, unused.ahead) == (1, 0 if kept else 1), "and once"
    assert own.calls == 6 and not has_own_graph(attention, 16384), "nothing is chosen by that"


def test_nothing_is_measured_while_kernels_are_compiled() -> None:
    own, other = Own(), Other()
    attention = AutoAttention(own, [other], CPU, torch.float32, clock(own, other, 512))
    call = [*torch.randn(8, 3, 2, 8).unbind(1)], make_segments(8, [8], 0)
    with compiling(CPU):
        attention(*call[0], call[1], 1.0)
    assert not has_own_graph(attention, 16384)
    attention(*call[0], call[1], 1.0)
    assert has_own_graph(attention, 16384)


def test_a_gain_within_the_margin_is_no_reason(caplog) -> None:
    own, other = Own(), Other()
    times = {rows: {"triton": 100.0, "other": 99.0} for rows in CLASSES}
    attention = AutoAttention(own, [other], CPU, torch.float32)
    save_times(attention._key(2, 8), times)
    attention(*torch.randn(8, 3, 2, 8).unbind(1), make_segments(8, [8], 0), 1.0)
    assert not attention.long(16384)


def test_a_backend_that_is_timed_last_on_a_slower_gpu_does_not_lose_by_that() -> None:
    own, other = Own(), Other()
    clocks = iter([100.0, 99.0, 97.0, 104.0] * len(CLASSES))
    attention = AutoAttention(own, [other], CPU, torch.float32, time=lambda call: next(clocks))
    times = attention._measure(CLASSES[0], 2, 8)
    assert times == {"triton": 100.0, "other": 97.0}


@pytest.mark.parametrize(
    "burst, again, want",
    [
        ((1000.0, 970.0), (1020.0, 1100.0), {"triton": 1020.0, "other": 1100.0}),
        ((1200.0, 1000.0), (), {"triton": 1200.0, "other": 1000.0}),
        ((100.0, 97.0), (), {"triton": 100.0, "other": 97.0}),
    ],
    ids=["close", "clear", "short"],
)
def test_long_calls_that_are_close_are_timed_again_under_load(burst, again, want: dict) -> None:
    own, other = Own(), Other()
    clocks, loads = iter([*burst, *burst[::-1]]), iter(again)
    attention = AutoAttention(own, [other], CPU, torch.float32, lambda call: next(clocks), lambda call: next(loads))
    assert attention._measure(CLASSES[0], 2, 8) == want
    assert next(loads, None) is None


def test_those_that_are_not_close_slow_down_as_the_fastest_does() -> None:
    own, other, far = Own(), Other(), Other()
    far.name = "far"
    burst = [1000.0, 1040.0, 2000.0]
    clocks, loads = iter([*burst, *burst[::-1]]), iter([1100.0, 1200.0])
    attention = AutoAttention(
        own, [other, far], CPU, torch.float32, lambda call: next(clocks), lambda call: next(loads)
    )
    assert attention._measure(CLASSES[0], 2, 8) == pytest.approx({"triton": 1100.0, "other": 1200.0, "far": 2200.0})


def test_choices_are_kept_on_disk_and_measured_once(tmp_path: Path) -> None:
    own, other = Own(), Other()
    qkv, segments = torch.randn(8, 3, 2, 8), make_segments(8, [8], 0)
    AutoAttention(own, [other], CPU, torch.float32, clock(own, other, 1024))(*qkv.unbind(1), segments, 1.0)

    def never(call) -> float:
        raise AssertionError("measured again")

    again = AutoAttention(own, [other], CPU, torch.float32, never)
    again(*qkv.unbind(1), segments, 1.0)
    assert again.long(1024) and not again.long(512)
    assert cache_folder() == tmp_path
    (entry,) = json.loads((tmp_path / "attention.json").read_text()).values()
    assert entry["1024"] == {"triton": 100.0, "other": 50.0}
    newer = AutoAttention(own, [other], CPU, torch.bfloat16)
    assert load_times(newer._key(2, 8)) is None, "another dtype is another key"


def test_a_broken_file_is_measured_again(tmp_path: Path, caplog) -> None:
    (tmp_path / "attention.json").write_text("{")
    assert load_times("key") is None
    assert "cannot be read" in caplog.text
    save_times("key", {1024: {"triton": 1.0}})
    assert load_times("key") == {1024: {"triton": 1.0}}


def test_a_backend_that_refuses_a_shape_is_left_out(caplog) -> None:
    own = Own()
    attention = AutoAttention(own, [Broken()], CPU, torch.float32, lambda call: (call(), 1.0)[1])
    attention._measure = lambda rows, heads, dim: AutoAttention._measure(attention, 64, heads, dim)  # type: ignore
    attention(*torch.randn(8, 3, 2, 8).unbind(1), make_segments(8, [8], 0), 1.0)
    assert "no such head dim" in caplog.text
    assert not attention.long(16384)


def test_the_engine_runs_both_forms(monkeypatch) -> None:
    own, other = Own(), Other()
    attention = AutoAttention(own, [other], CPU, torch.float32)
    save_times(attention._key(4, 16), {rows: {"triton": 100.0, "other": 50.0} for rows in CLASSES})
    monkeypatch.setattr("vitgraph.encoder.select_attention", lambda *_: attention)
    encoder = VisionEncoder.from_config("qwen3_vl", device="cpu", config=EncoderConfig(budgets=(64,)))
    one, two = [Grid(1, 8, 8)], [Grid(1, 8, 8), Grid(1, 4, 4)]
    x = torch.randn(80, encoder.spec.patch_width)
    several = encoder.encode_patches(x, two)
    assert other.calls == 0
    alone = encoder.encode_patches(x[:64], one)
    assert other.calls == 3, "one per layer"
    torch.testing.assert_close(alone[0].tokens, several[0].tokens, rtol=1e-5, atol=1e-5)


def test_a_wheel_that_cannot_be_imported_says_so(monkeypatch, caplog) -> None:
    def broken(name: str) -> None:
        raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(flash, "import_module", broken)
    monkeypatch.setattr(flash, "find_spec", lambda name: object())
    monkeypatch.setattr(flash, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(flash, "_fa4_import_error", flash._fa4_import_error.__wrapped__)
    monkeypatch.setattr(flash.os, "environ", {})
    assert "libcudart.so.13" in flash.Fa4Attention.missing(CPU, torch.bfloat16)
    assert "cannot be imported" in caplog.text


def test_kernels_are_kept_where_they_can_be(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(flash.os, "environ", {})
    (tmp_path / "file").touch()
    flash._keep_fa4_kernels(tmp_path / "file" / "kernels")
    assert flash.os.environ == {}
    flash._keep_fa4_kernels(tmp_path / "kernels")
    assert flash.os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"] == str(tmp_path / "kernels")
    flash._keep_fa4_kernels(tmp_path / "others")
    assert flash.os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"] == str(tmp_path / "kernels"), "set by someone"


@pytest.mark.parametrize("name", ["fa3", "fa4"])
def test_flash_wheels_that_are_not_here_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"attention='{name}' needs CUDA"):
        select_attention(name, CPU, torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel is compiled there")
@pytest.mark.parametrize("backend", [flash.Fa3Attention(), flash.Fa4Attention()], ids=["fa3", "fa4"])
def test_a_flash_wheel_is_warmed_up_by_one_segment_of_several_tiles(backend, monkeypatch) -> None:
    pytest.importorskip("triton")
    ran: list[tuple] = []

    def forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, **options: object) -> tuple[Tensor]:
        ran.append((q.shape, v.dtype, v.device, cu_seqlens_q.tolist()))
        return (torch.empty_like(q),)

    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", SimpleNamespace(_flash_attn_forward=forward))
    monkeypatch.setattr(flash, "_fa4", lambda device, head_dim: forward)
    backend.warm_up(3, 16, CPU, torch.bfloat16)
    assert ran == [((512, 3, 16), torch.bfloat16, CPU, [0, 512])] and flash.TILE[0] < 512


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel is compiled there")
@pytest.mark.parametrize("filled", [0, 5, 16, 33, 40])
def test_tails_are_zeroed_in_place(filled: int) -> None:
    pytest.importorskip("triton")
    from vitgraph.attention.tail_triton import zero_tail

    qkv = torch.full((40, 3, 5, 24), float("nan"))
    zero_tail(qkv[:, 2], torch.tensor([0, filled // 2, filled], dtype=torch.int32))
    assert (qkv[filled:, 2] == 0).all()
    assert qkv[:filled].isnan().all() and qkv[:, :2].isnan().all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel is compiled there")
@pytest.mark.parametrize("filled", [0, 5, 33, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_are_made_finite_before_the_tail_and_zero_in_it(filled: int, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    from vitgraph.attention.tail_triton import guard

    qkv = torch.randn(40, 3, 5, 24).to(dtype)
    qkv[3], qkv[4, :, 0], qkv[35] = float("nan"), float("inf"), float("-inf")
    before, largest = qkv.clone(), torch.finfo(dtype).max
    guard(qkv[:, 2], torch.tensor([0, filled // 2, filled], dtype=torch.int32))
    assert torch.equal(qkv[:, :2].isnan(), before[:, :2].isnan()), "only the values are guarded"
    want = torch.nan_to_num(before[:filled, 2].float(), nan=largest, posinf=largest, neginf=-largest).to(dtype)
    assert torch.equal(qkv[:filled, 2], want)
    assert (qkv[filled:, 2] == 0).all()
