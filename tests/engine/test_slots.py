"""Rows from the host on their way through a staging slot."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext

import pytest
import torch

from vitgraph.engine.cudart import _find_copy, copy_pinned, loaded_file
from vitgraph.engine.slots import StagingSlot


class Stream(nullcontext):  # type: ignore[type-arg]
    """Of a device on which all is done at once."""

    cuda_stream = 7

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[object] = []

    def wait_event(self, event: object) -> None:
        self.waited.append(event)


class Event:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def record(self, stream: object) -> None:
        self.calls.append("record")

    def synchronize(self) -> None:
        self.calls.append("synchronize")


def make_slot(dtype: torch.dtype = torch.float32) -> tuple[StagingSlot, Event]:
    """A slot for `[12, 4]`, and the event after what it sends."""
    slot = StagingSlot(16, (12, 4), dtype, torch.device("cpu"))
    event = Event()
    slot.__dict__.update(_landing=torch.full((12, 4), -1.0, dtype=dtype), _copies=Stream(), _arrived=event)
    return slot, event


@pytest.mark.parametrize("chunk", [1, 48, 1 << 20], ids=["a row", "a few rows", "all rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_are_staged_part_by_part_in_the_dtype_of_the_slot(chunk: int, dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr("vitgraph.engine.slots.CHUNK_BYTES", chunk)
    (slot, event), stream = make_slot(), Stream()
    rows = torch.randn(7, 4).to(dtype)
    landing = slot.send([(3, rows)], stream)  # type: ignore[arg-type]
    assert torch.equal(landing[3:10], rows.float())
    assert torch.equal(slot.pixels[3:10], rows.float())
    assert (landing[:3] == -1).all() and (landing[10:] == -1).all()
    assert event.calls == ["record"] and stream.waited == [event]
    slot.return_rows()
    assert event.calls == ["record"], "staged rows were not lent: nothing to wait for"


@pytest.mark.parametrize("found", [True, False], ids=["the runtime's copy", "torch's"])
def test_pinned_rows_travel_from_where_they_lie(found: bool, monkeypatch) -> None:
    copies = []

    def copy(target: int, source: int, nbytes: int, kind: int, stream: int) -> int:
        copies.append((source, nbytes, kind, stream))
        ctypes.memmove(target, source, nbytes)
        return 0

    monkeypatch.setattr("vitgraph.engine.cudart._find_copy", lambda: copy if found else None)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda rows: True)
    slot, event = make_slot(torch.bfloat16)
    first, second = torch.randn(3, 4).bfloat16(), torch.randn(2, 4).bfloat16()
    landing = slot.send([(1, first), (6, second)], Stream())  # type: ignore[arg-type]
    assert torch.equal(landing[1:4], first) and torch.equal(landing[6:8], second)
    assert (landing[[0, 4, 5, 8, 9, 10, 11]] == -1).all()
    assert copies == ([(first.data_ptr(), 24, 1, 7), (second.data_ptr(), 16, 1, 7)] if found else [])
    assert "pixels" not in slot.__dict__, "nothing was staged"
    slot.return_rows()
    slot.return_rows()
    assert event.calls == ["record", "synchronize"], "lent rows are waited for once"


def test_a_copy_that_fails_raises(monkeypatch) -> None:
    monkeypatch.setattr("vitgraph.engine.cudart._find_copy", lambda: lambda *_: 700)
    with pytest.raises(RuntimeError, match="could not be copied to cpu: CUDA error 700"):
        copy_pinned(torch.zeros(2, 2), torch.ones(2, 2), Stream())  # type: ignore[arg-type]


def test_libraries_are_named_as_torch_loads_them(monkeypatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert [loaded_file(name) for name in ("cudart", "cublasLt")] == ["libcudart.so.13", "libcublasLt.so.13"]


def test_a_runtime_that_is_not_found_is_told_once(monkeypatch, caplog) -> None:
    monkeypatch.setattr(torch.version, "cuda", "0.0")
    _find_copy.cache_clear()
    try:
        with caplog.at_level("WARNING", "vitgraph"):
            assert _find_copy() is None and _find_copy() is None
    finally:
        _find_copy.cache_clear()
    (record,) = caplog.records
    assert "copied by torch" in record.message and "libcudart.so.0" in record.message


def test_parts_of_the_landing_rows_are_cut_once(monkeypatch) -> None:
    monkeypatch.setattr("vitgraph.engine.slots.MOST_CUTS", 2)
    slot, _ = make_slot()
    landing = slot._landing.copy_(torch.randn(12, 4))
    first, second = slot._landing_of(0, 3), slot._landing_of(5, 3)
    assert torch.equal(first, landing[:3]) and torch.equal(second, landing[5:8])
    assert slot._landing_of(0, 3) is first and slot._landing_of(5, 3) is second
    assert torch.equal(slot._landing_of(3, 9), landing[3:])
    assert len(slot._cuts) == 1, "kept in bounds"


def test_the_driver_is_asked_once_per_address_whether_rows_are_pinned(monkeypatch) -> None:
    (slot, _), asked = make_slot(), []
    pinned, pageable = torch.randn(3, 4), torch.randn(3, 4)

    def is_pinned(rows: torch.Tensor) -> bool:
        asked.append(rows.data_ptr())
        return rows.data_ptr() == pinned.data_ptr()

    monkeypatch.setattr(torch.Tensor, "is_pinned", is_pinned)
    for rows in (pinned, pageable, pinned[:2], pageable):
        assert slot._can_lend(rows) is (rows.data_ptr() == pinned.data_ptr())
    assert asked == [pinned.data_ptr(), pageable.data_ptr(), pageable.data_ptr()]
    monkeypatch.setattr("vitgraph.engine.slots.MOST_ADDRESSES", 1)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda rows: True)
    assert slot._can_lend(pageable) and slot._pinned_at == {pageable.data_ptr()}, "kept in bounds"


@pytest.mark.parametrize(
    "rows", [torch.zeros(3, 4).double(), torch.zeros(4, 3).T, torch.zeros(3, 8)[:, :4]], ids=["dtype", "order", "gaps"]
)
def test_rows_in_another_form_are_never_lent(rows: torch.Tensor, monkeypatch) -> None:
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda rows: True)
    slot, _ = make_slot()
    assert not slot._can_lend(rows)
    assert torch.equal(slot.send([(0, rows)], Stream())[:3], rows.float())  # type: ignore[arg-type]
    assert "pixels" in slot.__dict__


def test_what_was_recorded_is_waited_for_once() -> None:
    (slot, _), event = make_slot(), Event()
    slot.event = event  # type: ignore[assignment]
    slot.wait()
    assert not event.calls, "nothing travels yet"
    for _ in range(2):
        slot.record(None)
        slot.wait()
        slot.wait()
    assert event.calls == ["record", "synchronize"] * 2
