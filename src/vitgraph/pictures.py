"""A picture of packing: every pack as the row of tokens that one replay computes, real ones and padding.

Pixels of the picture unless stated otherwise. A pack is drawn as columns of `CELLS` tokens, left to right; each token
shows the part of its image that it covers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vitgraph.core import Counts, Grid, Pack, Piece

CELLS = 8
MARGIN = 24
LEFT = 168
THUMB = 84
LEAST_THUMB = 12
TEXT = 15
LABEL_GAP = 8
ROW_GAP = 26
WIDTH = 1180
MAX_CELL = 16
BACKGROUND = (252, 251, 248)
INK = (38, 40, 44)
FAINT = (120, 122, 126)
PADDING = (226, 223, 216)
HATCH = (186, 181, 170)
PALETTE = (
    (31, 122, 109),
    (214, 119, 66),
    (84, 98, 178),
    (190, 148, 42),
    (160, 72, 110),
    (76, 140, 190),
    (110, 130, 60),
    (130, 100, 80),
)


@dataclass(frozen=True)
class Exhibit:
    """What the picture shows of one item: the image, or the frames of a clip (one per temporal patch is enough)."""

    label: str
    frames: Sequence[Image.Image]


@dataclass(frozen=True)
class PackFacts:
    """A pack beside the counts that label it.

    Attributes:
        pack: its pieces.
        capacity: tokens of its budget; the real tokens when it runs eager.
        tokens: real tokens per piece, in row order.
    """

    pack: Pack
    capacity: int
    tokens: tuple[int, ...]

    @property
    def padding(self) -> float:
        """Share of the capacity that no item fills, 0 to 1."""
        return 1 - sum(self.tokens) / self.capacity

    @property
    def title(self) -> str:
        return "eager" if self.pack.budget is None else f"budget {self.capacity}"


def describe_pack(pack: Pack, budget_tokens: Sequence[int], piece_counts: Sequence[Counts]) -> PackFacts:
    """Facts of a pack from the budgets' sizes and the counts of its pieces."""
    tokens = tuple(counts["token"] for counts in piece_counts)
    capacity = sum(tokens) if pack.budget is None else budget_tokens[pack.budget]
    return PackFacts(pack, capacity, tokens)


def draw_packing(packs: Sequence[PackFacts], exhibits: Sequence[Exhibit], title: str, path: Path) -> None:
    """Writes a PNG with one band per pack.

    Args:
        packs: top to bottom.
        exhibits: by item index.
        title: one line above.
        path: the file.
    """
    columns = max(-(-p.capacity // CELLS) for p in packs)
    cell = max(2, min(MAX_CELL, (WIDTH - LEFT - 2 * MARGIN) // columns))
    band = THUMB + 8 + CELLS * cell + 6 + TEXT + ROW_GAP
    top = MARGIN + 58
    width = max(WIDTH, LEFT + 2 * MARGIN + columns * cell)
    canvas = Image.new("RGB", (width, top + band * len(packs) + MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, MARGIN - 6), title, fill=INK, font=_font(21))
    _draw_legend(draw, cell)
    for index, facts in enumerate(packs):
        _draw_pack(canvas, draw, (MARGIN, top + band * index), cell, index, facts, exhibits)
    canvas.save(path)


def _draw_legend(draw: ImageDraw.ImageDraw, cell: int) -> None:
    y = MARGIN + 26
    text = f"each small square is one token, {CELLS} to a column, showing the part of the picture that it covers;"
    draw.text((MARGIN, y), text, fill=FAINT, font=_font(TEXT))
    x = MARGIN + int(draw.textlength(text, font=_font(TEXT))) + 10
    _hatch(draw, (x, y + 1, x + 26, y + 15))
    draw.text((x + 33, y), "padding", fill=FAINT, font=_font(TEXT))


def _draw_pack(
    canvas: Image.Image,
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    cell: int,
    index: int,
    facts: PackFacts,
    exhibits: Sequence[Exhibit],
) -> None:
    x, y = corner
    bar_top = y + THUMB + 8
    items = len(facts.tokens)
    draw.text((x, bar_top - 2), f"pack {index}", fill=INK, font=_font(18))
    lines = (
        facts.title,
        f"{items} item{'s' * (items != 1)}, {sum(facts.tokens)} tokens",
        f"{facts.padding:.1%} padding",
    )
    for number, line in enumerate(lines):
        draw.text((x, bar_top + 23 + 18 * number), line, fill=FAINT, font=_font(TEXT))
    start = 0
    bar_left = x + LEFT
    for piece, tokens in zip(facts.pack.pieces, facts.tokens, strict=True):
        colour = PALETTE[piece.item % len(PALETTE)]
        # Whole columns: a column that two items share belongs to the second one's stretch.
        stretch = (bar_left + start // CELLS * cell, bar_left + (start + tokens) // CELLS * cell)
        _draw_tokens(canvas, (bar_left, bar_top), cell, start, tokens, piece, exhibits[piece.item])
        _draw_thumbnail(canvas, draw, stretch, y, piece, exhibits[piece.item], colour)
        under = bar_top + CELLS * cell + 2
        # A small item may lie in columns that it shares with its neighbours: then it has no stretch of its own.
        if stretch[1] - stretch[0] >= cell:
            draw.rectangle((stretch[0] + 1, under, stretch[1] - 2, under + 2), fill=colour)
        _draw_label(draw, stretch, under + 5, piece, exhibits[piece.item])
        start += tokens
    _draw_padding(draw, (bar_left, bar_top), cell, start, facts.capacity)


def _draw_tokens(
    canvas: Image.Image,
    corner: tuple[int, int],
    cell: int,
    start: int,
    tokens: int,
    piece: Piece,
    exhibit: Exhibit,
) -> None:
    """The piece's tokens as small squares cut from its frames, in row order."""
    squares = _token_squares(piece.grid, tokens, cell - 1 if cell > 3 else cell, exhibit, piece.first_frame)
    for number, square in enumerate(squares):
        column, row = divmod(start + number, CELLS)
        canvas.paste(square, (corner[0] + column * cell, corner[1] + row * cell))


def _token_squares(grid: Grid, tokens: int, side: int, exhibit: Exhibit, first_frame: int) -> list[Image.Image]:
    rows, columns = _token_sides(grid, tokens)
    squares: list[Image.Image] = []
    for frame in range(max(1, tokens // (rows * columns))):
        image = exhibit.frames[min(first_frame + frame, len(exhibit.frames) - 1)]
        small = image.convert("RGB").resize((columns * side, rows * side), Image.Resampling.BOX)
        squares += [
            small.crop((c * side, r * side, (c + 1) * side, (r + 1) * side))
            for r in range(rows)
            for c in range(columns)
        ]
    assert len(squares) >= tokens, f"{len(squares)} squares for {tokens} tokens of {grid}"
    return squares[:tokens]


def _token_sides(grid: Grid, tokens: int) -> tuple[int, int]:
    """Rows and columns of tokens in one frame: the grid over the merge side, as far as the count tells it."""
    for merge in range(1, min(grid.h, grid.w) + 1):
        rows, columns = -(-grid.h // merge), -(-grid.w // merge)
        if rows * columns * grid.t == tokens or rows * columns == tokens:
            return rows, columns
    return 1, -(-tokens // grid.t)


def _draw_thumbnail(
    canvas: Image.Image,
    draw: ImageDraw.ImageDraw,
    stretch: tuple[int, int],
    y: int,
    piece: Piece,
    exhibit: Exhibit,
    colour: tuple[int, int, int],
) -> None:
    """The picture above its tokens, no wider than they are; frames of a clip one beside another."""
    frames = exhibit.frames[piece.first_frame : piece.first_frame + piece.grid.t]
    x, room = stretch[0] + 1, (stretch[1] - stretch[0] - 4) // max(len(frames), 1) - 3
    if room < LEAST_THUMB:
        return
    for frame in frames:
        thumb = frame.convert("RGB")
        thumb.thumbnail((room, THUMB), Image.Resampling.LANCZOS)
        top = y + THUMB - thumb.height
        canvas.paste(thumb, (x, top))
        draw.rectangle((x, top, x + thumb.width - 1, top + thumb.height - 1), outline=colour, width=2)
        x += thumb.width + 3


def _draw_label(draw: ImageDraw.ImageDraw, stretch: tuple[int, int], y: int, piece: Piece, exhibit: Exhibit) -> None:
    """The longest label that fits under the stretch, or none."""
    t, h, w = piece.grid
    size = f"{h}x{w}" if t == 1 else f"{t}x{h}x{w}"
    for text in (f"{exhibit.label}  {size}", f"#{piece.item}  {size}", size, f"#{piece.item}"):
        if draw.textlength(text, font=_font(TEXT - 2)) <= stretch[1] - stretch[0] - LABEL_GAP:
            draw.text((stretch[0] + 1, y), text, fill=INK, font=_font(TEXT - 2))
            return


def _draw_padding(draw: ImageDraw.ImageDraw, corner: tuple[int, int], cell: int, start: int, end: int) -> None:
    """Hatched squares for the tokens from `start` to `end`."""
    side = cell - 2 if cell > 3 else cell - 1
    for number in range(start, end):
        column, row = divmod(number, CELLS)
        x, y = corner[0] + column * cell, corner[1] + row * cell
        _hatch(draw, (x, y, x + side, y + side))


def _hatch(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int]) -> None:
    left, top, right, bottom = box
    draw.rectangle(box, fill=PADDING)
    height = bottom - top
    for x in range(left - height, right, 5):
        a, b = max(x, left), min(x + height, right)
        draw.line((a, bottom - (a - x), b, bottom - (b - x)), fill=HATCH)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
