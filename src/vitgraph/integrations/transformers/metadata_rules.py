"""What the engine must know of each keyword under which Transformers' towers take precomputed metadata.

The names are those of `transformers.vision_utils` and of the functions beside it in single modeling files. A rule says
what a buffer's rows count, how it is padded and by what an item's values are shifted; it is checked against the
functions themselves on several items at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vitgraph.core import Counts, Grid, sum_counts
from vitgraph.engine.buffers import MetadataLayout
from vitgraph.errors import UnsupportedModuleError
from vitgraph.integrations.transformers.recorder import RecordedCall
from vitgraph.models.contract import BufferSpec, OutputSpec, Pad, TowerSpec
from vitgraph.planning.metadata import GridPlan


@dataclass(frozen=True)
class Rule:
    """How the values of one keyword follow from item to item.

    Attributes:
        rows: what its rows count; several where it depends on the tower, the first that fits is taken.
        pad: see `BufferSpec`.
        shifted: whether values are indexes of rows of the same kind ("own"), of another kind (its name), or neither
            ("").
        offsets: whether it holds attention offsets.
        number: whether the module takes the number of rows instead of rows.
    """

    rows: tuple[str, ...]
    pad: Pad = "zero"
    shifted: str = ""
    offsets: bool = False
    number: bool = False


RULES: Mapping[str, Rule] = {
    "cu_seqlens": Rule(("segment",), "repeat_last", "patch", offsets=True),
    "cu_window_seqlens": Rule(("window",), "repeat_last", "patch", offsets=True),
    "window_index": Rule(("patch", "token"), "identity_tail", "own"),
    "position_ids": Rule(("patch",)),
    "interp_indices": Rule(("patch",)),
    "interp_weights": Rule(("patch",)),
    "frame_index": Rule(("patch",)),
    "pixel_shuffle_index": Rule(("patch",), "identity_tail", "patch"),
    "temporal_merge_index": Rule(("cell",), "zero", "patch"),
    # Since Transformers 5.24 every patch says where it is added, and how much of it. Padding adds to padding.
    "temporal_merge_index[0]": Rule(("patch",), "identity_tail", "frame"),
    "temporal_merge_index[1]": Rule(("patch",)),
    "temporal_merge_index[2]": Rule(("cell",), number=True),
}


@dataclass(frozen=True)
class ModuleSpec(TowerSpec):
    """A tower whose items are measured by the module's own metadata functions.

    Attributes:
        leaves: everything that the module returns.
        lengths: number of segments of each set of one item.
        window: side of a window, in what `window_index` counts; None where it is not known.
    """

    leaves: tuple[OutputSpec, ...] = ()
    lengths: Callable[[Grid], Counts] = field(default=lambda grid: {}, compare=False)
    window: int | None = None

    @property
    def outputs(self) -> tuple[OutputSpec, ...]:
        return self.leaves

    def counts(self, grid: Grid) -> Counts:
        """Patches, tokens, cells (positions of a merged frame, whatever the number of frames), items, and segments; and
        the patches of a frame where a buffer's values are shifted by them."""
        counts = {**base_counts(grid, self.merge), **self.lengths(grid)}
        return {**counts, "frame": grid.h * grid.w} if self._counts_frames else counts

    def capacity(self, tokens: int, max_items: int, max_frames: int) -> Counts:
        """A frame of a x b rows has at most `(ab + k - 1) / k` windows of side k: strips one row high come closest."""
        base = {**super().capacity(tokens, max_items, max_frames), "cell": tokens}
        if self._counts_frames:
            base["frame"] = base["patch"]
        if "window" in {buffer.rows for buffer in self.buffers}:
            index = next((b.rows for b in self.buffers if b.name == "window_index"), "token")
            rows, side = base[index], self.window or 1
            base["window"] = min((rows + (side - 1) * base["segment"]) // side, rows)
        return base

    @property
    def _counts_frames(self) -> bool:
        return any(buffer.offset == "frame" for buffer in self.buffers)


def base_counts(grid: Grid, merge: int) -> dict[str, int]:
    """The counts that follow from a grid and the merge side alone."""
    cells = grid.h * grid.w // merge**2
    return {"patch": grid.patches, "token": grid.t * cells, "cell": cells, "item": 1}


def item_arrays(calls: Iterable[RecordedCall], grids: Sequence[Grid]) -> dict[str, np.ndarray]:
    """The metadata of these items together, by keyword, as the module's own functions compute it on the host.

    Attention offsets come without the leading zero. int64 becomes int32: values are rows of a pack.

    Raises:
        UnsupportedModuleError: two calls give different values for one keyword, or a keyword has no rule.
    """
    sizes = torch.tensor([list(grid) for grid in grids], dtype=torch.int64)
    found: dict[str, np.ndarray] = {}
    for call in calls:
        for name, value in call.compute(sizes).items():
            if name not in RULES:
                raise UnsupportedModuleError(f"{call.name} takes {name!r}, of which vitgraph knows no rule")
            array = _array(name, value)
            if name in found and not np.array_equal(found[name], array):
                raise UnsupportedModuleError(f"two of its functions take different {name!r}")
            found[name] = array
    return found


def _array(name: str, value: Tensor) -> np.ndarray:
    array = value.detach().cpu().numpy()
    array = array.astype(np.float32 if np.issubdtype(array.dtype, np.floating) else np.int32)
    return array[1:] if RULES[name].offsets else array


def buffer_specs(arrays: Mapping[str, np.ndarray], counts: Counts) -> tuple[BufferSpec, ...]:
    """Declarations of the keywords that one item has.

    Args:
        arrays: of that item.
        counts: of that item, without its segments.
    """
    return tuple(_buffer_spec(name, array, counts) for name, array in arrays.items())


def _buffer_spec(name: str, array: np.ndarray, counts: Counts) -> BufferSpec:
    rule = RULES[name]
    rows = rule.rows[0] if rule.offsets else next((k for k in rule.rows if counts[k] == len(array)), "")
    if not rows:
        raise UnsupportedModuleError(f"{name!r} has {len(array)} rows for an item with {dict(counts)}")
    offset = {"": None, "own": rows}.get(rule.shifted, rule.shifted)
    dtype = str(array.dtype)
    return BufferSpec(name, dtype, rows, array.shape[1:], rule.pad, offset, lead=1 if rule.offsets else 0)


def check_rules(spec: TowerSpec, calls: Sequence[RecordedCall], grids: Sequence[Grid]) -> None:
    """Checks that items one by one, put together as the rules say, are what the functions give for all at once.

    Raises:
        UnsupportedModuleError: they are not, for the keyword that the message names.
    """
    together = item_arrays(calls, grids)
    joined = join_items(spec, [item_arrays(calls, [grid]) for grid in grids], grids)
    for name, expected in together.items():
        if not np.array_equal(joined[name], expected):
            raise UnsupportedModuleError(f"{name!r} of several items is not made of theirs one by one")


def join_items(
    spec: TowerSpec, items: Sequence[Mapping[str, np.ndarray]], grids: Sequence[Grid]
) -> dict[str, np.ndarray]:
    """The metadata of a pack from its items', as the engine writes it; offsets without the leading zero.

    Raises:
        UnsupportedModuleError: an item's values have another shape than declared.
    """
    for buffer in spec.buffers:
        shapes = {item[buffer.name].shape[1:] for item in items}
        if shapes != {buffer.trailing}:
            raise UnsupportedModuleError(f"{buffer.name!r} has a shape that changes with the items: {sorted(shapes)}")
    plans = [GridPlan(spec.counts(grid), item) for grid, item in zip(grids, items, strict=True)]
    layout = MetadataLayout(spec, sum_counts(plan.counts for plan in plans))
    arrays = layout.arrays(np.zeros(max(layout.nbytes, 1), dtype=np.uint8))
    layout.write(arrays, plans)
    return {buffer.name: arrays[buffer.name][buffer.lead :] for buffer in spec.buffers}
