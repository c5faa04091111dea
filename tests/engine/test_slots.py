"""Rows from the host on their way through a staging slot."""

from __future__ import annotations

import pytest
import torch

from vitgraph.engine.slots import StagingSlot


@pytest.mark.parametrize("chunk", [1, 48, 1 << 20], ids=["a row", "a few rows", "all rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_are_staged_part_by_part_in_the_dtype_of_the_slot(chunk: int, dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr("vitgraph.engine.slots.CHUNK_BYTES", chunk)
    slot = StagingSlot(16, (12, 4), torch.float32, torch.device("cpu"))
    landing = torch.full((12, 4), -1.0)
    rows = torch.randn(7, 4).to(dtype)
    slot._send(landing[3:10], rows, 3)
    assert torch.equal(landing[3:10], rows.float())
    assert torch.equal(slot.pixels[3:10], rows.float())
    assert (landing[:3] == -1).all() and (landing[10:] == -1).all()
    slot.return_rows()  # staged rows were not lent: nothing to wait for


def test_parts_of_the_landing_rows_are_cut_once(monkeypatch) -> None:
    monkeypatch.setattr("vitgraph.engine.slots.MOST_CUTS", 2)
    slot = StagingSlot(16, (12, 4), torch.float32, torch.device("cpu"))
    landing = slot.__dict__["_landing"] = torch.randn(12, 4)
    first, second = slot._landing_of(0, 3), slot._landing_of(5, 3)
    assert torch.equal(first, landing[:3]) and torch.equal(second, landing[5:8])
    assert slot._landing_of(0, 3) is first and slot._landing_of(5, 3) is second
    assert torch.equal(slot._landing_of(3, 9), landing[3:])
    assert len(slot._cuts) == 1, "kept in bounds"


def test_the_driver_is_asked_once_per_address_whether_rows_are_pinned(monkeypatch) -> None:
    slot, asked = StagingSlot(16, (12, 4), torch.float32, torch.device("cpu")), []
    pinned, pageable, landing = torch.randn(3, 4), torch.randn(3, 4), torch.zeros(3, 4)

    def is_pinned(rows: torch.Tensor) -> bool:
        asked.append(rows.data_ptr())
        return rows.data_ptr() == pinned.data_ptr()

    monkeypatch.setattr(torch.Tensor, "is_pinned", is_pinned)
    for rows in (pinned, pageable, pinned[:2], pageable):
        slot._send(landing[: len(rows)], rows, 0)
        assert torch.equal(landing[: len(rows)], rows)
        assert slot._lent is (rows.data_ptr() == pinned.data_ptr())
        slot._lent = False
    assert asked == [pinned.data_ptr(), pageable.data_ptr(), pageable.data_ptr()]
    monkeypatch.setattr("vitgraph.engine.slots.MOST_ADDRESSES", 1)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda rows: True)
    slot._send(landing, pageable, 0)
    assert slot._pinned_at == {pageable.data_ptr()}, "kept in bounds"


def test_what_was_recorded_is_waited_for_once() -> None:
    class Event:
        def __init__(self) -> None:
            self.calls: list[str] = []

        def record(self, stream: object) -> None:
            self.calls.append("record")

        def synchronize(self) -> None:
            self.calls.append("synchronize")

    slot, event = StagingSlot(16, (12, 4), torch.float32, torch.device("cpu")), Event()
    slot.event = event  # type: ignore[assignment]
    slot.wait()
    assert not event.calls, "nothing travels yet"
    for _ in range(2):
        slot.record(None)
        slot.wait()
        slot.wait()
    assert event.calls == ["record", "synchronize"] * 2
