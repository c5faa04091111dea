"""The ring of requests: read in order, never written over before it was read, and never waited for in vain.

The kernel that reads it runs in Triton's interpreter here, and compiled in tests/gpu.
"""

from __future__ import annotations

import struct

import pytest
import torch

from vitgraph.core import Stretches
from vitgraph.engine.graph import CapturedGraph
from vitgraph.engine.mailbox import (
    ENTRIES,
    HEAD,
    NOTHING,
    SPINS,
    STRETCH_WORDS,
    STRETCHES,
    Mailbox,
    Request,
)

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel is compiled here")

CPU = torch.device("cpu")


class Refused(Exception):
    pass


def refuse() -> None:
    raise Refused


def make(most_places: int = 5) -> Mailbox:
    return Mailbox(most_places, CPU, refuse)


def request(places: list[int], *pixels: int, stretches: tuple = ()) -> Request:
    table = Stretches.of(stretches).table
    return Request(struct.pack(f"={len(places)}i", *places), *pixels)._replace(stretches=table)


def fetched(mailbox: Mailbox) -> Request:
    """What the device reads next."""
    from vitgraph.engine.intake_triton import fetch

    fetch(mailbox.ring, mailbox.next, mailbox.request, mailbox.first_stretch)
    mailbox.copied.copy_(mailbox.next)  # as the kernel that composes does
    items, dtype = mailbox.request[:2].tolist()
    address, elements = mailbox.request.view(torch.int64)[1:3].tolist()
    end = mailbox.first_stretch + STRETCH_WORDS * int(mailbox.request[STRETCHES])
    table = mailbox.request[mailbox.first_stretch : end].numpy().tobytes()
    return request(mailbox.request[HEAD : HEAD + items].tolist(), dtype, address, elements)._replace(stretches=table)


def test_requests_are_read_in_order_around_the_ring() -> None:
    mailbox = make()
    for number in range(ENTRIES + 9):
        sent = request([number] * (number % 6), number % 4, (1 << 40) + number, (1 << 33) + number)
        mailbox.post(sent)
        assert fetched(mailbox) == sent
    assert int(mailbox.next) == mailbox.posted == ENTRIES + 9


def test_stretches_come_with_all_places_and_are_not_left_to_the_next_request() -> None:
    mailbox = make(5)
    every = ((7, 3), (1, 2), (20, 1), (30, 4), (1 << 30, 9))
    sent = [
        request([1, 2, 3, 4, 5], 1, 64, 19, stretches=every),
        request([6], 1, 64, 5),
        request([], 2, 64, 5, stretches=every[:2]),
        NOTHING,
    ]
    for one in sent:
        mailbox.post(one)
    assert [fetched(mailbox) for _ in sent] == sent
    assert Stretches.of(every[:2]).table == struct.pack("=4i", 3, 7, 5, 1)


def test_a_full_ring_is_waited_for_and_nothing_is_written_over() -> None:
    mailbox = make()
    for number in range(ENTRIES):
        mailbox.post(request([number]))
    with pytest.raises(Refused):
        mailbox.post(request([-1]))
    assert [fetched(mailbox) for _ in range(3)] == [request([number]) for number in range(3)]
    for number in range(3):
        mailbox.post(request([ENTRIES + number]))
    with pytest.raises(Refused):
        mailbox.post(request([-1]))
    assert [fetched(mailbox) for _ in range(ENTRIES)] == [request([3 + number]) for number in range(ENTRIES)]


def test_the_count_is_looked_at_where_the_ring_may_be_full() -> None:
    """The device writes it: each look takes a cache miss."""
    mailbox, looks = make(), []

    class Watched:
        def __getitem__(self, index: int) -> int:
            looks.append(mailbox.posted)
            return int(mailbox.copied)

    mailbox._copied = Watched()  # type: ignore[assignment]
    for _ in range(2 * ENTRIES + 1):
        mailbox.post(NOTHING)
        assert fetched(mailbox) == NOTHING
    assert looks == [ENTRIES, 2 * ENTRIES]


def test_rows_are_waited_for_until_their_graph_has_copied_them() -> None:
    mailbox = make()
    mailbox.post(NOTHING)
    with pytest.raises(Refused):
        mailbox.wait_until_copied(mailbox.posted)
    mailbox.copied[0] = 1
    mailbox.wait_until_copied(mailbox.posted)


def test_a_short_wait_for_rows_takes_no_pause() -> None:
    class Rising:
        """A count that the device raises between two looks."""

        def __init__(self) -> None:
            self.count = -1

        def __getitem__(self, _: int) -> int:
            self.count += 1
            return self.count

    mailbox = make()
    mailbox._copied = Rising()  # type: ignore[assignment]
    mailbox.wait_until_copied(SPINS - 1)
    mailbox._copied = Rising()  # type: ignore[assignment]
    with pytest.raises(Refused):
        mailbox.wait_until_copied(SPINS + 10)


def test_a_replay_that_is_not_launched_takes_its_request_back() -> None:
    class Graph:
        def __init__(self) -> None:
            self.fails = False

        def replay(self) -> None:
            if self.fails:
                raise RuntimeError("no launch")

    mailbox, graph = make(), Graph()
    captured = CapturedGraph(graph, (), 0.0, mailbox)  # type: ignore[arg-type]
    captured.replay(request([1]))
    graph.fails = True
    with pytest.raises(RuntimeError, match="no launch"):
        captured.replay(request([2, 2]))
    graph.fails = False
    captured.replay(request([3]))
    captured.replay()
    assert [fetched(mailbox) for _ in range(3)] == [request([1]), request([3]), NOTHING]
