"""The values that travel through vitgraph: host data only.

Legend used everywhere: P patch rows (before merge), M tokens (after merge), S attention segments, I items,
H heads, Dh head dim, D hidden width, C output width.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple, overload

Counts = Mapping[str, int]
"""How many rows of each kind ("patch", "token", "item", "segment", "window", ...) something has or holds."""

NOWHERE = b""

PLACE_BYTES = 4

TOLD = (1 << 31) - 1
"""More rows than any budget holds that is searched compiled."""

MOST_PATCHES = (1 << 31) - 1
"""Of a batch: requests say in an int32 where rows lie."""


class Grid(NamedTuple):
    """Size of one item in patches: `t` temporal patches (frames after temporal grouping) of `h` x `w`."""

    t: int
    h: int
    w: int

    @property
    def patches(self) -> int:
        return self.t * self.h * self.w


class Piece(NamedTuple):
    """A run of whole frames of one item: all of it, unless the item was too long and could be split.

    Attributes:
        item: index of the item in the caller's order.
        grid: grid of this piece.
        first_frame: index of its first temporal patch within the item.
    """

    item: int
    grid: Grid
    first_frame: int = 0

    @property
    def first_row(self) -> int:
        """Its first patch row within the item. Frames are contiguous in every row order."""
        return self.first_frame * self.grid.h * self.grid.w


@dataclass(slots=True, eq=False)
class KnownGrid:
    """What is known of a grid: one look-up per item finds all of it.

    Attributes:
        grid: itself.
        counts: rows of each kind that an item of it fills.
        size: the same, in the planner's order of kinds.
        load: of its attention, see `CostModel`.
        fits: whether the planner's largest budget holds such an item.
        place: where its part of the metadata lies on the device, an int32 as requests hold it, or NOWHERE.
        patches: of the grid.
        row: load, size and place as the compiled search reads them: of each kind no more than TOLD rows.
    """

    grid: Grid
    counts: Counts
    size: tuple[int, ...] = ()
    load: int = 0
    fits: bool = True
    place: bytes = NOWHERE
    patches: int = field(init=False)
    row: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.patches = self.grid.patches
        size = (min(rows, TOLD) for rows in self.size)
        self.row = struct.pack("=" + sum_format(len(self.size)), self.load, *size) + _place(self.place)

    def put(self, place: bytes) -> None:
        """Notes a new `place`."""
        self.place = place
        self.row = self.row[: -2 * PLACE_BYTES] + _place(place)


def _place(place: bytes) -> bytes:
    """The end of a row: a negative number for NOWHERE, and as many bytes that are not read."""
    return (place or b"\xff" * PLACE_BYTES) + bytes(PLACE_BYTES)


def places_of(known: Sequence[KnownGrid]) -> bytes:
    """Where the metadata of these lies, one place after another; NOWHERE unless that of all lies on the device."""
    places = b"".join([own.place for own in known])
    return places if len(places) == PLACE_BYTES * len(known) else NOWHERE


def sum_format(kinds: int) -> str:
    """How the compiled search holds a load and a size, as `struct` says it: its sizes have an even number of kinds."""
    return f"d{kinds}I{kinds % 2 * 4}x"


class Stretches(Sequence[tuple[int, int]]):
    """Where the pixel rows of a pack lie in those of its batch: first row and number of rows of each stretch.

    Args:
        table: per stretch two int32, as requests hold them: the pack's row that follows it, and its first row in the
            batch.
    """

    __slots__ = ("table",)
    ENTRY = struct.Struct("=2i")

    def __init__(self, table: bytes) -> None:
        self.table = table

    @classmethod
    def of(cls, stretches: Iterable[tuple[int, int]]) -> Stretches:
        """From first rows and numbers of rows."""
        ends = 0
        return cls(b"".join([cls.ENTRY.pack(ends := ends + rows, first) for first, rows in stretches]))

    @classmethod
    def of_first(cls, rows: int) -> Stretches:
        """The first rows of a batch, in one stretch."""
        return cls(cls.ENTRY.pack(rows, 0))

    @classmethod
    def of_items(cls, chosen: Iterable[int], starts: Sequence[int]) -> Stretches:
        """Of items; what lies one after another is one stretch.

        Args:
            chosen: the items.
            starts: the first row of every item in the batch, and the end of the last.
        """
        found: list[tuple[int, int]] = []
        for item in chosen:
            first, end = starts[item], starts[item + 1]
            if found and sum(found[-1]) == first:
                found[-1] = found[-1][0], end - found[-1][0]
            else:
                found.append((first, end - first))
        return cls.of(found)

    def __len__(self) -> int:
        return len(self.table) // self.ENTRY.size

    @overload
    def __getitem__(self, index: int) -> tuple[int, int]: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[tuple[int, int], ...]: ...

    def __getitem__(self, index: int | slice) -> tuple[int, int] | tuple[tuple[int, int], ...]:
        return tuple(self)[index]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        before = 0
        for end, first in self.ENTRY.iter_unpack(self.table):
            yield first, end - before
            before = end

    def __repr__(self) -> str:
        return f"Stretches.of({self[:]!r})"


STRETCH_BYTES = Stretches.ENTRY.size


class Grids(Sequence[Grid]):
    """Grids of the items of a batch or a pack, and what is known of each. Equal to a tuple of the same grids.

    Args:
        known: per item of a batch.
        owner: who knows them. What one planner knows is of no use to another.
        chosen: which of its items are meant; default: all.
    """

    def __init__(self, known: list[KnownGrid], owner: object, chosen: Sequence[int] | None = None) -> None:
        self.owner, self._batch, self._chosen = owner, known, chosen

    @cached_property
    def known(self) -> list[KnownGrid]:
        """What is known, per item that is meant."""
        return self._batch if self._chosen is None else [self._batch[at] for at in self._chosen]

    @cached_property
    def _grids(self) -> tuple[Grid, ...]:
        return tuple([own.grid for own in self.known])

    def __len__(self) -> int:
        return len(self.known)

    def __iter__(self) -> Iterator[Grid]:
        return iter(self._grids)

    @overload
    def __getitem__(self, index: int) -> Grid: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Grid, ...]: ...

    def __getitem__(self, index: int | slice) -> Grid | tuple[Grid, ...]:
        return self._grids[index]

    def __eq__(self, other: object) -> bool:
        return self._grids == (other._grids if isinstance(other, Grids) else other)

    def __hash__(self) -> int:
        return hash(self._grids)

    def __repr__(self) -> str:
        return f"Grids({self._grids!r})"


@dataclass(frozen=True)
class Pack:
    """Pieces that run together.

    Attributes:
        pieces: in row order.
        counts: rows of each kind that the pieces fill.
        budget: index of the budget that replays it, or None to run eager on buffers of exactly this size.
        reason: why it runs eager; empty when it replays.
    """

    pieces: tuple[Piece, ...]
    counts: Counts
    budget: int | None
    reason: str = ""

    @classmethod
    def of_some(
        cls,
        chosen: Sequence[int],
        pieces: Sequence[Piece] | None,
        stretches: Stretches,
        grids: Grids,
        counts: Counts,
        budget: int | None,
        reason: str,
    ) -> Pack:
        """Some of a batch's items, or of the pieces that they were cut into.

        Args:
            chosen: which of them.
            pieces: all that the batch's items were cut into; None where none was cut: then those of the pack are made
                when they are asked for.
            stretches: where their pixel rows lie.
            grids: of the chosen ones.
            counts, budget, reason: see above.
        """
        made = object.__new__(cls)
        made.__dict__.update(grids=grids, counts=counts, budget=budget, reason=reason, stretches=stretches)
        if pieces is None:
            made.__dict__["items"] = chosen
        else:
            made.__dict__["pieces"] = tuple([pieces[number] for number in chosen])
        return made

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            # Asked for what the instance lacks: pieces that have not been made yet.
            made = self.__dict__
            if name != "pieces" or "grids" not in made:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            return made.setdefault(name, tuple(map(Piece, made["items"], self.grids)))

    @cached_property
    def stretches(self) -> Stretches:
        """Where its pixel rows lie in those of its batch.

        Raises:
            LookupError: for a pack that no planner made.
        """
        raise LookupError("this pack does not know its batch: planners make packs that do, in plan().")

    @cached_property
    def grids(self) -> Sequence[Grid]:
        """Grids of the pieces."""
        return tuple(piece.grid for piece in self.pieces)

    @cached_property
    def spans(self) -> tuple[tuple[Grid, int, int], ...]:
        """Of each piece its grid, and the first row and the number of rows of its tokens in the pack's outputs."""
        if isinstance(self.grids, Grids):
            rows = [own.counts["token"] for own in self.grids.known]
        else:
            (_,) = self.pieces  # what no planner placed runs alone
            rows = [self.counts["token"]]
        return tuple(zip(self.grids, accumulate(rows, initial=0), rows, strict=False))


def sum_counts(parts: Iterable[Counts]) -> dict[str, int]:
    """Sum of counts, kind by kind; empty without parts."""
    total: dict[str, int] = {}
    for part in parts:
        for kind, n in part.items():
            total[kind] = total.get(kind, 0) + n
    return total


def fits(counts: Counts, capacity: Counts) -> bool:
    """Whether `capacity` holds `counts` in every kind."""
    return all(n <= capacity[kind] for kind, n in counts.items())


def exceeded(counts: Counts, capacity: Counts) -> str:
    """The kinds in which `counts` exceeds `capacity`, joined with '+'; empty when it fits."""
    return "+".join(kind for kind, n in counts.items() if n > capacity[kind])
