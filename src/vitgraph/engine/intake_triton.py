"""The first two things that a graph does: it reads a request, and copies its pixel rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitgraph.engine.mailbox import STRETCH_WORDS, STRETCHES
from vitgraph.launch import launch_kernel

BLOCK = 4096
COUNT = tl.constexpr(STRETCHES)


@triton.jit
def _fetch_kernel(
    ring_ptr,
    next_ptr,
    request_ptr,
    ENTRIES: tl.constexpr,
    WORDS: tl.constexpr,
    FIRST_STRETCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program reads the next entry of the ring, which lies in the host's memory, and counts it."""
    number = tl.load(next_ptr)
    word = tl.arange(0, BLOCK)
    entry = ring_ptr + (number % ENTRIES) * WORDS
    stretches = tl.load(entry + COUNT, volatile=True)
    before = word < FIRST_STRETCH
    tl.store(request_ptr + word, tl.load(entry + word, mask=before, volatile=True), mask=before)
    if stretches > 0:
        rest = (word >= FIRST_STRETCH) & (word < WORDS)
        tl.store(request_ptr + word, tl.load(entry + word, mask=rest, volatile=True), mask=rest)
    tl.debug_barrier()  # no warp may find the next number instead
    tl.store(next_ptr, number + 1)


@triton.jit
def _copy(like_ptr, address, elements, first, out_ptr, BYTES: tl.constexpr, BLOCK: tl.constexpr):
    """Copies BLOCK elements from an address, cast to the type of `out_ptr`; the address is a multiple of 16."""
    # Counted from a pointer whose alignment is known: from a bare address nothing would be loaded in vectors.
    source = like_ptr + (address - like_ptr.to(tl.int64)) // 16 * (16 // BYTES)
    at = first + tl.arange(0, BLOCK)
    whole = elements // 8 * 8
    values = tl.load(source + at, mask=at < whole)
    tl.store(out_ptr + at, values.to(out_ptr.dtype.element_ty), mask=at < whole)
    if first + BLOCK > whole:
        rest = whole + tl.arange(0, 8)
        last = tl.load(source + rest, mask=rest < elements)
        tl.store(out_ptr + rest, last.to(out_ptr.dtype.element_ty), mask=rest < elements)


@triton.jit
def _copy_stretches(
    like_ptr,
    address,
    table_ptr,
    stretches,
    elements,
    first,
    out_ptr,
    BYTES: tl.constexpr,
    WIDTH: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As `_copy`, for rows in stretches: of each, the row that follows it and where it begins in the source. The width
    of rows is a multiple of 8."""
    source = like_ptr + (address - like_ptr.to(tl.int64)) // 16 * (16 // BYTES)
    at = first + tl.arange(0, BLOCK)
    number = tl.arange(0, MOST)
    ends = tl.load(table_ptr + 2 * number, mask=number < stretches, other=2147483647)
    stretch = tl.sum((ends.to(tl.int64) * WIDTH <= first).to(tl.int32))
    row = tl.load(table_ptr + 2 * stretch - 2, mask=stretch > 0, other=0).to(tl.int64)
    last = tl.minimum(first + BLOCK, elements)
    while row * WIDTH < last:
        end = tl.load(table_ptr + 2 * stretch).to(tl.int64)
        begin = tl.load(table_ptr + 2 * stretch + 1).to(tl.int64)
        own = (at >= row * WIDTH) & (at < end * WIDTH)
        values = tl.load(source + (begin - row) * WIDTH + at, mask=own)
        tl.store(out_ptr + at, values.to(out_ptr.dtype.element_ty), mask=own)
        row = end
        stretch += 1


@triton.jit
def _pixels_kernel(
    request_ptr,
    long_ptr,
    bf16_ptr,
    fp16_ptr,
    fp32_ptr,
    out_ptr,
    FIRST_STRETCH: tl.constexpr,
    WIDTH: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program copies BLOCK elements of the request's pixel rows. The codes are those of `intake.DTYPES`."""
    dtype = tl.load(request_ptr + 1)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    elements = tl.load(long_ptr + 2)
    if (dtype != 0) & (first < elements):
        address = tl.load(long_ptr + 1)
        stretches = tl.load(request_ptr + COUNT)
        table = request_ptr + FIRST_STRETCH
        if stretches > 0:
            if dtype == 1:
                _copy_stretches(bf16_ptr, address, table, stretches, elements, first, out_ptr, 2, WIDTH, MOST, BLOCK)
            elif dtype == 2:
                _copy_stretches(fp16_ptr, address, table, stretches, elements, first, out_ptr, 2, WIDTH, MOST, BLOCK)
            else:
                _copy_stretches(fp32_ptr, address, table, stretches, elements, first, out_ptr, 4, WIDTH, MOST, BLOCK)
        elif dtype == 1:
            _copy(bf16_ptr, address, elements, first, out_ptr, 2, BLOCK)
        elif dtype == 2:
            _copy(fp16_ptr, address, elements, first, out_ptr, 2, BLOCK)
        else:
            _copy(fp32_ptr, address, elements, first, out_ptr, 4, BLOCK)


def fetch(ring: Tensor, following: Tensor, request: Tensor, first_stretch: int) -> None:
    """Reads the next request of a `Mailbox`; the arguments are its attributes."""
    entries, words = ring.shape
    launch_kernel(
        _fetch_kernel, (1,),
        ring, following, request,
        ENTRIES=entries, WORDS=words, FIRST_STRETCH=first_stretch, BLOCK=triton.next_power_of_2(words),
    )  # fmt: skip


def copy_pixels(request: Tensor, first_stretch: int, likes: Sequence[Tensor], out: Tensor) -> None:
    """Copies the pixel rows of the request that was read, if it names any, and casts them.

    Args:
        request: of a `Mailbox`.
        first_stretch: its word where the stretches begin.
        likes: one tensor of each dtype that rows may have, in the order of their codes.
        out: `[P, patch_width]`, contiguous, with room for all rows.
    """
    blocks, most = triton.cdiv(out.numel(), BLOCK), (request.shape[0] - first_stretch) // STRETCH_WORDS
    launch_kernel(
        _pixels_kernel, (blocks,),
        request, request.view(torch.int64), *likes, out,
        FIRST_STRETCH=first_stretch, WIDTH=out.shape[1], MOST=triton.next_power_of_2(most), BLOCK=BLOCK,
    )  # fmt: skip
