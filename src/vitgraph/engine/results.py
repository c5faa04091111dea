"""From the outputs of packs to those of items."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vitgraph.core import Counts, Grid, Pack
from vitgraph.embedding import VisionEmbedding

Outputs = tuple[Tensor, ...]
"""One `[levels, rows, width]` per entry of the spec's `outputs`: the tokens `[levels, M, C]` first."""

Ran = tuple[Pack, Outputs]
"""A pack and what came out, in memory of its own."""


def embeddings(ran: Sequence[Ran], grids: Sequence[Grid]) -> list[VisionEmbedding]:
    """The items of packs, in the caller's order; their views are made when they are asked for.

    Args:
        ran: packs with their outputs.
        grids: of the items.
    """
    if len(ran) == 1 and len(ran[0][0].grids) == len(grids):
        pack, outputs = ran[0]
        return VisionEmbedding.of_spans(outputs[0], pack.spans)
    found: list[list[tuple[int, Tensor, int, int]]] = [[] for _ in grids]
    for pack, outputs in ran:
        for piece, (_, first, rows) in zip(pack.pieces, pack.spans, strict=True):
            found[piece.item].append((piece.first_frame, outputs[0], first, rows))
    return [_embedding(pieces, grid) for pieces, grid in zip(found, grids, strict=True)]


def _embedding(pieces: list[tuple[int, Tensor, int, int]], grid: Grid) -> VisionEmbedding:
    if len(pieces) == 1:
        _, tokens, first, rows = pieces[0]
        return VisionEmbedding.of_rows(tokens, first, rows, grid)
    pieces.sort(key=lambda piece: piece[0])
    joined = torch.cat([tokens.narrow(1, first, rows) for _, tokens, first, rows in pieces], dim=1)
    return VisionEmbedding.of_rows(joined, 0, joined.shape[1], grid)


def outputs_of(ran: Sequence[Ran], items: int, kinds: Sequence[str], counts: Callable[[Grid], Counts]) -> list[Outputs]:
    """Per item its outputs, in the caller's order.

    Args:
        ran: packs with their outputs.
        items: how many there are.
        kinds: what the rows of each output count.
        counts: rows of each kind that an item fills.
    """
    parts: list[list[tuple[int, Outputs]]] = [[] for _ in range(items)]
    for pack, outputs in ran:
        if len(pack.pieces) == 1:
            parts[pack.pieces[0].item].append((pack.pieces[0].first_frame, outputs))
            continue
        filled = [counts(grid) for grid in pack.grids]
        split = [x.split([c[kind] for c in filled], dim=1) for x, kind in zip(outputs, kinds, strict=True)]
        for piece, *own in zip(pack.pieces, *split, strict=True):
            parts[piece.item].append((piece.first_frame, tuple(own)))
    return [_join(item) for item in parts]


def _join(parts: list[tuple[int, Outputs]]) -> Outputs:
    """Outputs of an item from its pieces, in frame order."""
    if len(parts) == 1:
        return parts[0][1]
    in_order = [outputs for _, outputs in sorted(parts, key=lambda part: part[0])]
    return tuple(torch.cat(pieces, dim=1) for pieces in zip(*in_order, strict=True))
