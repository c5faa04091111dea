"""The search in C: built once per machine by its C compiler, as Triton's launchers are, and kept on disk."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from struct import Struct
from tempfile import TemporaryDirectory

import numpy as np

from vitgraph.background import in_threads
from vitgraph.core import NOWHERE, PLACE_BYTES, STRETCH_BYTES, KnownGrid, sum_format
from vitgraph.measured import cache_folder
from vitgraph.planning.cost import LONG_ROWS
from vitgraph.planning.search import MOST_EXHAUSTIVE, NEAR_ENOUGH, Prices, Searched

logger = logging.getLogger("vitgraph")

SOURCE = Path(__file__).with_name("search.c")
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O2", "-shared", "-fPIC", "-ffp-contract=off")
"""The last one: products and sums are rounded one by one, as numpy's are, and equal costs stay equal."""

GUARD = np.uint32(1 << 31)
"""As in search.c."""

MOST_ROWS = 1 << 30
"""Of one kind: two packs of so many stay below GUARD."""

INT_BYTES = 4
MOST_SECONDS = 60


class Tables(ctypes.Structure):
    """As search.c. Arrays are addresses."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("rows", "budgets", "most_exhaustive", "step_bits")),
        *((name, ctypes.c_int32) for name in ("sets", "cover_bits", "covers", "unused")),
        ("long_rows", ctypes.c_int64),
        *((name, ctypes.c_double) for name in ("near_enough", "least_per_row", "least_slope")),
        *((name, ctypes.c_void_p) for name in ("budget", "by_step", "set_rows", "set_segments")),
        *((name, ctypes.c_void_p) for name in ("cover", "splits", "settled")),
        *((name, ctypes.c_void_p) for name in ("starts", "groups", "order", "places", "table")),
        *((name, ctypes.c_int32) for name in ("stretches", "are_placed")),
    )


class CompiledSearch:
    """As `Planner.find` with `search.search`, in microseconds.

    Args:
        library: `load_library`, for these prices.
        prices: of packs, of less than MOST_ROWS rows of each kind.
    """

    def __init__(self, library: ctypes.PyDLL, prices: Prices) -> None:
        self._function = library.find_packs
        set_rows, set_segments = np.asarray(prices.sets, dtype=np.int32).reshape(-1, 2).T.copy()
        step_bits = _step_bits(prices.columns[prices.rows])
        self._arrays = {
            "budget": _budgets_of(prices),
            "by_step": prices.smallest[prices.rows][:: 1 << step_bits].astype(np.int32),
            "set_rows": set_rows,
            "set_segments": set_segments,
            "cover": prices.cover,
            "splits": np.asarray(prices.splits[:-1], dtype=np.int32),
            "settled": np.asarray([prices.settled[eager] for eager in (False, True)], dtype=float),
        }
        self._tables = Tables(
            rows=prices.rows, budgets=len(self._arrays["budget"]), sets=len(prices.sets), step_bits=step_bits,
            most_exhaustive=MOST_EXHAUSTIVE, long_rows=LONG_ROWS, near_enough=NEAR_ENOUGH,
            covers=len(prices.cover), cover_bits=prices.cover_bits,
            least_per_row=prices.least_per_row, least_slope=prices.least_slope,
            **{name: array.ctypes.data for name, array in self._arrays.items()},
        )  # fmt: skip
        self._reference = ctypes.byref(self._tables)
        self._group = Struct(f"=7i4x{sum_format(len(prices.columns))}")
        self._make_room(MOST_EXHAUSTIVE)

    def _make_room(self, items: int) -> None:
        self._most = items
        sizes = {"starts": INT_BYTES, "groups": self._group.size, "order": INT_BYTES, "places": PLACE_BYTES}
        sizes["table"] = STRETCH_BYTES
        rooms = {name: ctypes.create_string_buffer((items + 1) * nbytes) for name, nbytes in sizes.items()}
        for name, room in rooms.items():
            setattr(self._tables, name, ctypes.addressof(room))
        views = {name: memoryview(room).cast("B") for name, room in rooms.items()}
        self._groups, self._places, self._table = views["groups"], views["places"], views["table"]
        self._order, self._starts = views["order"].cast("i"), views["starts"].cast("i")

    def __call__(self, known: Sequence[KnownGrid], eager: bool) -> Searched | None:
        """What `Planner.find` finds.

        Args:
            known: at least one item.
            eager: whether packs may run eager.

        Returns:
            None where an item exceeds the largest budget, or all together MOST_PATCHES.

        Raises:
            MemoryError: for millions of items.
        """
        count = len(known)
        if count > self._most:
            self._make_room(count)
        found = self._function(self._reference, b"".join([own.row for own in known]), count, eager)
        if found <= 0:
            if found < 0:
                raise MemoryError(f"no memory to pack {count} items in.")
            return None
        # All of it: the next call writes over what lies there.
        return Searched(
            self._starts[count],
            self._order[:count].tolist(),
            self._places[: count * PLACE_BYTES].tobytes() if self._tables.are_placed else NOWHERE,
            self._table[: self._tables.stretches * STRETCH_BYTES].tobytes(),
            list(self._group.iter_unpack(self._groups[: found * self._group.size])),
        )


def _budgets_of(prices: Prices) -> np.ndarray:
    """What packs cost, by the smallest budget that holds them: `[budgets]` of Budget of search.c."""
    columns = np.asarray(prices.columns, dtype=np.uint32)
    kinds, budgets = columns.shape
    fields = [("capacity", "u4", _width(kinds)), ("fixed", "f8"), ("slope", "f8", 2), ("beside", "f8", 2)]
    made = np.zeros(budgets, np.dtype(fields, align=True))
    made["capacity"][:, :kinds] = columns.T
    made["capacity"] |= GUARD
    runs_in = prices.cheapest[:-1]
    made["fixed"] = prices.fixed[runs_in]
    made["slope"] = np.stack((prices.slope[runs_in], prices.long_slope[runs_in]), axis=-1)
    made["beside"][:, 1] = prices.long_fixed[runs_in]
    return made


def _step_bits(rows: Sequence[int]) -> int:
    """The largest power of two that divides them all."""
    together = int(np.bitwise_or.reduce(np.asarray(rows)))
    return (together & -together).bit_length() - 1


def _sets(prices: Prices) -> Sequence[tuple[int, int]]:
    """Those of its `sets` that make a difference."""
    return prices.sets if prices.tells_long else ()


def _width(kinds: int) -> int:
    """KINDS of search.c."""
    return kinds + kinds % 2


def begin_building(kinds: int, sets: int) -> None:
    """Has a thread load or build what `compiled_search` needs for prices that tell long packs from others. Only timed
    ones do, and timing shall not wait for it.

    Args:
        kinds: of rows that budgets hold.
        sets: see `Prices`.
    """
    _begun(_width(kinds), sets)


def compiled_search(prices: Prices) -> CompiledSearch | None:
    """The search for these prices; None, with a warning, where it cannot be built, or budgets are too large for it."""
    most = max(prices.largest)
    if most >= MOST_ROWS:
        logger.warning(
            "packing is searched in Python: search.c takes budgets of less than %d rows, not of %d", MOST_ROWS, most
        )
        return None
    library = load_library(_width(len(prices.largest)), len(_sets(prices)))
    return None if library is None else CompiledSearch(library, prices)


@cache
def _begun(kinds: int, sets: int) -> Future[ctypes.PyDLL]:
    (begun,) = in_threads("vitgraph-search", partial(_load_or_build, kinds, sets))
    return begun


def _load_or_build(kinds: int, sets: int) -> ctypes.PyDLL:
    """
    Raises:
        OSError, subprocess.SubprocessError: see `_build`.
    """
    flags = (*FLAGS, f"-DKINDS={kinds}", f"-DSETS={sets}")
    kept = cache_folder() / f"search-{_key(flags)}.so"
    with suppress(OSError):  # it is not there, or of no use
        return _load(kept)
    return _build(kept, flags)


@cache
def load_library(kinds: int, sets: int) -> ctypes.PyDLL | None:
    """What search.c becomes with so many KINDS and SETS, from disk or built now; None, with a warning, where neither
    works."""
    try:
        return _begun(kinds, sets).result()
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning(
            "packing is searched in Python, up to a millisecond per call of several packs: search.c cannot be "
            "compiled or loaded (%s). Install a C compiler, or name one in CC.",
            error,
        )
        return None


def _key(flags: Sequence[str]) -> str:
    """Of the source, how it is compiled, and for which machines."""
    text = " ".join((*flags, platform.system(), platform.machine()))
    return hashlib.sha256(SOURCE.read_bytes() + text.encode()).hexdigest()[:16]


def _build(kept: Path, flags: Sequence[str]) -> ctypes.PyDLL:
    """
    Raises:
        OSError: no compiler, or it fails.
        subprocess.SubprocessError: it takes too long.
    """
    with _folder_beside(kept) as folder:
        built = Path(folder) / kept.name
        command = [*_compiler(), *flags, "-o", str(built), str(SOURCE)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=MOST_SECONDS)
        if result.returncode:
            raise OSError(f"{' '.join(command)}: {result.stderr.strip()[-400:]}")
        library = _load(built)
        with suppress(OSError):  # it lies in the other folder
            os.replace(built, kept)  # other processes see nothing or all of it
        return library


def _compiler() -> list[str]:
    """The command, with the options that CC may give."""
    named = shlex.split(os.environ.get("CC", ""))
    if named:
        return named
    found = next(filter(None, map(shutil.which, COMPILERS)), None)
    if found is None:
        raise FileNotFoundError(f"no {', '.join(COMPILERS)} in PATH")
    return [found]


def _folder_beside(kept: Path) -> TemporaryDirectory[str]:
    """On the same disk if that can be written; else what is built is not kept."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        return TemporaryDirectory(prefix="search-", dir=kept.parent)
    except OSError as error:
        logger.warning("%s cannot be written: %s; search.c is compiled again next time", kept.parent, error)
        return TemporaryDirectory(prefix="vitgraph-")


def _load(path: Path) -> ctypes.PyDLL:
    # PyDLL keeps the interpreter's lock: to get it back from a busy thread could take longer than the search.
    library = ctypes.PyDLL(str(path))
    function = library.find_packs
    function.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_int32)
    function.restype = ctypes.c_int32
    return library
