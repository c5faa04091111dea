"""Composes the metadata of a pack on the device, from the parts of its items that lie there, in two Triton kernels.

The slow reference is `MetadataLayout.write`, which does the same on the host.

A *part* is what depends on one grid, in 32-bit words: rows of each kind, then per buffer and per tile schedule the
offset of its data from the part's beginning, tiles of each schedule, and rows of the longest segment; then the
data. A *request* is the number of items and, from word `FIRST_PLACE` on, where each item's part begins. Without items
the metadata stays as it is.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vitgraph.engine.mailbox import HEAD
from vitgraph.launch import launch_kernel

BLOCK = 1024
ITEMS = 32
FIRST_PLACE = tl.constexpr(HEAD)

FIELDS = 12
"""Words that describe a buffer: see `Composer`, which writes them."""

# What fills the rows past the last item.
PAD_FILL, PAD_LAST, PAD_ROW, PAD_TILES = range(4)


@triton.jit(do_not_specialize=["number"])
def _arrange_kernel(
    request_ptr,
    parts_ptr,
    layouts_ptr,
    matrix_ptr,
    next_ptr,
    copied_ptr,
    number,
    KINDS: tl.constexpr,
    BUFFERS: tl.constexpr,
    SCHEDULES: tl.constexpr,
    SETS: tl.constexpr,
    ITEMS: tl.constexpr,
):
    """Says that the kernel before it is done, which copies the request's pixel rows. Then, if the request has items:

    Writes the matrix `[items + 1, columns]`: rows before each item of each kind, then where its data begins for each
    buffer; then, for each segment set, three columns in the order of launch: tiles before the item, where its tiles
    begin, and its first row. The last row of the matrix holds all rows, tiles and rows.

    One program writes ITEMS rows. Items with longer segments are launched first, equal ones in their own order.
    """
    COLUMNS: tl.constexpr = KINDS + BUFFERS + 3 * SETS
    LONGEST: tl.constexpr = KINDS + BUFFERS + 2 * SCHEDULES
    items = tl.load(request_ptr)
    first_row = tl.program_id(0) * ITEMS
    if first_row == 0:
        tl.store(copied_ptr, tl.load(next_ptr))
    if (items > 0) & (first_row <= items):
        layout = layouts_ptr + number * (BUFFERS + SETS) * 12
        i = first_row + tl.arange(0, ITEMS)
        real = i < items
        part = tl.load(request_ptr + FIRST_PLACE + i, mask=real, other=0)
        row = matrix_ptr + i * COLUMNS

        for kind in tl.static_range(KINDS):
            before = tl.zeros([ITEMS], tl.int32)
            for start in range(0, items, ITEMS):
                j = start + tl.arange(0, ITEMS)
                other = tl.load(request_ptr + FIRST_PLACE + j, mask=j < items, other=0)
                size = tl.load(parts_ptr + other + kind, mask=j < items, other=0)
                before += tl.sum(tl.where(j[None, :] < i[:, None], size[None, :], 0), axis=1)
            tl.store(row + kind, before, mask=i <= items)
        for buffer in tl.static_range(BUFFERS):
            offset = tl.load(parts_ptr + part + KINDS + buffer, mask=real, other=0)
            tl.store(row + KINDS + buffer, part + offset, mask=real)

        longest = tl.load(parts_ptr + part + LONGEST, mask=real, other=-1)
        for segments in tl.static_range(SETS):
            description = layout + (BUFFERS + segments) * 12
            schedule = tl.load(description + 11)
            shift_kind = tl.load(description + 5)
            place = tl.zeros([ITEMS], tl.int32)
            tiles = tl.zeros([ITEMS], tl.int32)
            first = tl.zeros([ITEMS], tl.int32)
            for start in range(0, items, ITEMS):
                j = start + tl.arange(0, ITEMS)
                known = j < items
                other = tl.load(request_ptr + FIRST_PLACE + j, mask=known, other=0)
                length = tl.load(parts_ptr + other + LONGEST, mask=known, other=-1)
                own = tl.load(parts_ptr + other + KINDS + BUFFERS + SCHEDULES + schedule, mask=known, other=0)
                size = tl.load(parts_ptr + other + shift_kind, mask=known, other=0)
                earlier = j[None, :] < i[:, None]
                leads = (length[None, :] > longest[:, None]) | ((length[None, :] == longest[:, None]) & earlier)
                leads = leads & known[None, :]
                place += tl.sum(leads.to(tl.int32), axis=1)
                tiles += tl.sum(tl.where(leads, own[None, :], 0), axis=1)
                first += tl.sum(tl.where(earlier & known[None, :], size[None, :], 0), axis=1)
            column = matrix_ptr + place * COLUMNS + KINDS + BUFFERS + 3 * segments
            offset = tl.load(parts_ptr + part + KINDS + BUFFERS + schedule, mask=real, other=0)
            tl.store(column, tiles, mask=i <= items)
            tl.store(column + 1, part + offset, mask=real)
            tl.store(column + 2, first, mask=i <= items)


@triton.jit(do_not_specialize=["number"])
def _compose_kernel(
    request_ptr,
    parts_ptr,
    layouts_ptr,
    matrix_ptr,
    out_ptr,
    number,
    DESCRIPTIONS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program writes a stretch of one buffer, as 32-bit words."""
    items = tl.load(request_ptr)
    description = layouts_ptr + (number * DESCRIPTIONS + tl.program_id(1)) * 12
    rows = tl.load(description + 1)
    width = tl.load(description + 2)
    first_word = tl.program_id(0) * BLOCK
    if (items > 0) & (first_word < rows * width):
        lead = tl.load(description + 3)
        pad = tl.load(description + 4)
        start_column = tl.load(description + 6)
        source_column = tl.load(description + 7)
        shift_column = tl.load(description + 8)
        total = tl.load(matrix_ptr + items * COLUMNS + start_column)

        word = first_word + tl.arange(0, BLOCK)
        row = word // width - lead
        column = word % width
        wanted = tl.where(pad == 1, tl.minimum(row, total - 1), row)
        inside = (wanted >= 0) & (wanted < total) & (row >= 0)

        # The last item that starts at or before the row: of several that start there, only the last one has rows.
        item = tl.zeros([BLOCK], tl.int32)
        for step in tl.static_range(STEPS):
            later = item + (1 << (STEPS - 1 - step))
            start = tl.load(matrix_ptr + later * COLUMNS + start_column, mask=later < items, other=0)
            item = tl.where((later < items) & (start <= wanted), later, item)
        own = matrix_ptr + item * COLUMNS
        start = tl.load(own + start_column, mask=inside, other=0)
        source = tl.load(own + source_column, mask=inside, other=0)
        value = tl.load(parts_ptr + source + (wanted - start) * width + column, mask=inside, other=0)
        if shift_column >= 0:
            value += tl.load(own + shift_column, mask=inside, other=0)

        fill = tl.where(pad == 2, row, tl.where(pad == 0, tl.load(description + 5), 0))
        if pad == 3:
            tile = tl.load(description + 9)
            limit = tl.load(description + 10)
            begin = tl.load(matrix_ptr + items * COLUMNS + shift_column) + (row - total) * tile
            end = tl.minimum(begin + tile, limit)
            fill = tl.where(begin < limit, tl.where(column == 0, begin, tl.where(column == 1, end, 0)), 0)
        fill = tl.where(row < 0, 0, fill)
        tl.store(out_ptr + tl.load(description) + word, tl.where(inside, value, fill), mask=word < rows * width)


def launch(
    request: Tensor,
    parts: Tensor,
    layouts: Tensor,
    matrix: Tensor,
    out: Tensor,
    counts: tuple[Tensor, Tensor],
    number: int,
    kinds: int,
    buffers: int,
    schedules: int,
    words: int,
) -> None:
    """Writes every buffer of a layout, padding included; nothing where the request has no items.

    Args:
        request: of a `Mailbox`, on the device.
        parts: int32, the parts of grids.
        layouts: `[layouts, buffers + segment sets, FIELDS]` int32.
        matrix: `[most items + 1, columns]` int32, for the time between the kernels.
        out: int32, the block of metadata.
        counts: `next` and `copied` of the mailbox.
        number: of the layout.
        kinds, buffers, schedules: how many a part has.
        words: of the layout's largest buffer.
    """
    most, described = matrix.shape[0] - 1, layouts.shape[1]
    launch_kernel(
        _arrange_kernel, (triton.cdiv(most + 1, ITEMS),),
        request, parts, layouts, matrix, *counts, number,
        KINDS=kinds, BUFFERS=buffers, SCHEDULES=schedules, SETS=described - buffers, ITEMS=ITEMS,
    )  # fmt: skip
    launch_kernel(
        _compose_kernel, (triton.cdiv(words, BLOCK), described),
        request, parts, layouts, matrix, out, number,
        DESCRIPTIONS=described, COLUMNS=matrix.shape[1], STEPS=max(most - 1, 1).bit_length(), BLOCK=BLOCK,
    )  # fmt: skip
