"""The ring of requests: read in order, never written over before it was read, and never waited for in vain.

The kernel that reads it runs in Triton's interpreter here, and compiled in tests/gpu.
"""

from __future__ import annotations

import pytest
import torch

from vitgraph.engine.graph import CapturedGraph
from vitgraph.engine.mailbox import ENTRIES, HEAD, NOTHING, Mailbox, Request

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel is compiled here")

CPU = torch.device("cpu")


class Refused(Exception):
    pass


def refuse() -> None:
    raise Refused


def make(most_places: int = 5) -> Mailbox:
    return Mailbox(most_places, CPU, refuse)


def fetched(mailbox: Mailbox) -> Request:
    """What the device reads next."""
    from vitgraph.engine.intake_triton import fetch

    fetch(mailbox.ring, mailbox.read, mailbox.next, mailbox.request)
    items, dtype = mailbox.request[:2].tolist()
    address, elements = mailbox.request.view(torch.int64)[1:3].tolist()
    return Request(mailbox.request[HEAD : HEAD + items].tolist(), dtype, address, elements)


def test_requests_are_read_in_order_around_the_ring() -> None:
    mailbox = make()
    for number in range(ENTRIES + 9):
        sent = Request([number] * (number % 6), number % 4, (1 << 40) + number, (1 << 33) + number)
        mailbox.post(sent)
        assert fetched(mailbox) == sent
    assert int(mailbox.read) == int(mailbox.next) == ENTRIES + 9


def test_a_full_ring_is_waited_for_and_nothing_is_written_over() -> None:
    mailbox = make()
    for number in range(ENTRIES - 1):
        mailbox.post(Request([number]))
    with pytest.raises(Refused):
        mailbox.post(Request([-1]))
    read = [fetched(mailbox).places for _ in range(3)]
    assert read == [[0], [1], [2]]
    for number in range(3):
        mailbox.post(Request([ENTRIES - 1 + number]))
    with pytest.raises(Refused):
        mailbox.post(Request([-1]))
    assert [fetched(mailbox).places for _ in range(ENTRIES - 1)] == [[3 + number] for number in range(ENTRIES - 1)]


def test_rows_are_waited_for_until_their_graph_has_copied_them() -> None:
    mailbox = make()
    mailbox.post(NOTHING)
    with pytest.raises(Refused):
        mailbox.wait_until_copied(mailbox.posted)
    mailbox.copied[0] = 1
    mailbox.wait_until_copied(mailbox.posted)


def test_a_replay_that_is_not_launched_takes_its_request_back() -> None:
    class Graph:
        def __init__(self) -> None:
            self.fails = False

        def replay(self) -> None:
            if self.fails:
                raise RuntimeError("no launch")

    mailbox, graph = make(), Graph()
    captured = CapturedGraph(graph, (), 0.0, 0, mailbox)  # type: ignore[arg-type]
    captured.replay(Request([1]))
    graph.fails = True
    with pytest.raises(RuntimeError, match="no launch"):
        captured.replay(Request([2, 2]))
    graph.fails = False
    captured.replay(Request([3]))
    captured.replay()
    assert [fetched(mailbox) for _ in range(3)] == [Request([1]), Request([3]), Request([], *NOTHING[1:])]
