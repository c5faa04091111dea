"""What a tower made of an item."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vitgraph.core import Grid

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class VisionEmbedding:
    """What a tower made of one item. The tensors never alias a graph's memory.

    Items that ran in one pack are views of one tensor: clone an embedding that outlives its neighbours by far. The
    encoder's embeddings make their views on first access.

    Attributes:
        tokens: `[M, C]` in the tower's dtype and on its device.
        deepstack: `[levels, M, C]` for families with deepstack, else None.
        grid: the item's grid in patches.
    """

    tokens: Tensor
    deepstack: Tensor | None
    grid: Grid

    @classmethod
    def of_rows(cls, levels: Tensor, first: int, rows: int, grid: Grid) -> VisionEmbedding:
        """The embedding of an item from the outputs of its pack.

        Args:
            levels: `[levels, M, C]`: the tokens of all items, then their deepstack maps.
            first, rows: the item's rows.
            grid: of the item.
        """
        (made,) = cls.of_spans(levels, [(grid, first, rows)])
        return made

    @classmethod
    def of_spans(cls, levels: Tensor, spans: Iterable[tuple[Grid, int, int]]) -> list[VisionEmbedding]:
        """As `of_rows`, for all items of a pack.

        Args:
            levels: see there.
            spans: per item its grid, its first row and how many rows it has.
        """
        found, new = [], object.__new__
        for grid, first, rows in spans:
            made = new(cls)
            fields = made.__dict__
            fields["grid"], fields["_source"] = grid, (levels, first, rows)
            found.append(made)
        return found

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            # Asked for what the instance lacks: fields that have not been made yet.
            if name not in ("tokens", "deepstack") or "_source" not in self.__dict__:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            levels, first, count = self._source
            rows, view = slice(first, first + count), None
            if name == "tokens" or levels.shape[0] > 1:
                view = levels[0, rows] if name == "tokens" else levels[1:, rows]
            # Threads that ask at the same time get the same view.
            return self.__dict__.setdefault(name, view)

    def __getstate__(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "deepstack": self.deepstack, "grid": self.grid}
