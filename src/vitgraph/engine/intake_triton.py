"""The first two things that a graph does: it reads a request, and copies its pixel rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _fetch_kernel(ring_ptr, next_ptr, request_ptr, ENTRIES: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """One program reads the next entry of the ring, which lies in the host's memory, and counts it."""
    number = tl.load(next_ptr)
    word = tl.arange(0, BLOCK)
    entry = ring_ptr + (number % ENTRIES) * WORDS
    tl.store(request_ptr + word, tl.load(entry + word, mask=word < WORDS, volatile=True), mask=word < WORDS)
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
def _pixels_kernel(request_ptr, long_ptr, bf16_ptr, fp16_ptr, fp32_ptr, out_ptr, BLOCK: tl.constexpr):
    """One program copies BLOCK elements of the request's pixel rows. The codes are those of `intake.DTYPES`."""
    dtype = tl.load(request_ptr + 1)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    elements = tl.load(long_ptr + 2)
    if (dtype != 0) & (first < elements):
        address = tl.load(long_ptr + 1)
        if dtype == 1:
            _copy(bf16_ptr, address, elements, first, out_ptr, 2, BLOCK)
        elif dtype == 2:
            _copy(fp16_ptr, address, elements, first, out_ptr, 2, BLOCK)
        else:
            _copy(fp32_ptr, address, elements, first, out_ptr, 4, BLOCK)


def fetch(ring: Tensor, following: Tensor, request: Tensor) -> None:
    """Reads the next request of a `Mailbox`; the arguments are its attributes."""
    entries, words = ring.shape
    _fetch_kernel[(1,)](ring, following, request, ENTRIES=entries, WORDS=words, BLOCK=triton.next_power_of_2(words))


def copy_pixels(request: Tensor, likes: Sequence[Tensor], out: Tensor) -> None:
    """Copies the pixel rows of the request that was read, if it names any, and casts them.

    Args:
        request: of a `Mailbox`.
        likes: one tensor of each dtype that rows may have, in the order of their codes.
        out: `[P, patch_width]`, contiguous, with room for all rows.
    """
    blocks = triton.cdiv(out.numel(), BLOCK)
    _pixels_kernel[(blocks,)](request, request.view(torch.int64), *likes, out, BLOCK=BLOCK)
