"""Attention inside a compiled block: one code for every size, whatever kernel the backend then chooses."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from attention_cases import make_segments
from vitgraph.attention.auto import AutoAttention
from vitgraph.attention.base import ANY, LONG, Segments
from vitgraph.attention.opaque import attend_opaquely, handle_of
from vitgraph.attention.sdpa import SdpaAttention

CPU = torch.device("cpu")


class Choosy(SdpaAttention):
    """Chooses by rows and by block, as our kernel does, and remembers what it saw."""

    name = "triton"

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, int]] = []

    def block(self, rows: int, longest: int) -> int:
        return 64 if rows <= 100 else 128

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
        self.seen.append((q.shape[0], segments.block, segments.form))
        return super().__call__(q, k, v, segments, scale)


@pytest.fixture(autouse=True)
def _fresh_compiler(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def packed(lengths: list[int], form: int = ANY) -> tuple[Tensor, Segments]:
    rows = sum(lengths) + 3
    segments = make_segments(rows, lengths, Choosy().block(rows, rows))
    return torch.randn(rows, 3, 2, 16), replace(segments, form=form)


def test_one_compiled_code_serves_every_size_and_equals_the_backend() -> None:
    own = Choosy()
    auto = AutoAttention(own, [], CPU, torch.float32, time=lambda call: 1.0)
    counter = CompileCounterWithBackend("aot_eager")

    def block(qkv: Tensor, segments: Segments) -> Tensor:
        return auto(*qkv.unbind(1), segments, 0.25) * 2

    compiled = torch.compile(block, backend=counter, dynamic=True, fullgraph=True)
    for lengths in ([40, 30], [300, 20, 7], [60], [150, 9]):
        qkv, segments = packed(lengths)
        own.seen.clear()
        got = compiled(qkv, segments)
        assert own.seen[-1] == (qkv.shape[0], segments.block, ANY)
        torch.testing.assert_close(got, block(qkv, segments))
    assert counter.frame_count == 1


def test_one_code_tells_the_backend_of_packs_of_long_segments() -> None:
    own = Choosy()
    counter = CompileCounterWithBackend("aot_eager")
    handle = handle_of(own)

    def block(qkv: Tensor, segments: Segments) -> Tensor:
        return attend_opaquely(handle, *qkv.unbind(1), segments, 0.25, segments.form)

    compiled = torch.compile(block, backend=counter, dynamic=True, fullgraph=True)
    for form in (ANY, LONG, ANY):
        qkv, segments = packed([90], form)
        compiled(qkv, segments)
        assert own.seen[-1] == (93, 64, form)
    assert counter.frame_count == 1


def test_our_kernel_has_one_code_for_packs_of_long_segments_too() -> None:
    """It does not ask whether segments are long, and an eager pack of one segment must not compile the block anew."""
    counter = CompileCounterWithBackend("eager")
    backend = Choosy()
    handle = handle_of(backend)

    def block(qkv: Tensor, segments: Segments) -> Tensor:
        return attend_opaquely(handle, *qkv.unbind(1), segments, 0.25)

    compiled = torch.compile(block, backend=counter, dynamic=True, fullgraph=True)
    for form in (ANY, LONG):
        compiled(*packed([90], form))
    assert counter.frame_count == 1


def test_a_handle_does_not_keep_its_backend() -> None:
    backend = Choosy()
    handle = handle_of(backend)
    del backend
    gc.collect()
    qkv, segments = packed([10])
    with pytest.raises(KeyError):
        attend_opaquely(handle, *qkv.unbind(1), segments, 0.25)
