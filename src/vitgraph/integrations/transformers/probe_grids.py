"""From a vision module on packed patch rows to a tower: its metadata, outputs and limits, found by running it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vitgraph.attention.base import VarlenAttention
from vitgraph.core import Grid, sum_counts
from vitgraph.errors import UnsupportedModuleError
from vitgraph.integrations.transformers.attention_function import ATTENTION_NAME, register, with_attention
from vitgraph.integrations.transformers.call_forms import CallForm, PixelForm, first_parameter
from vitgraph.integrations.transformers.leaves import Leaf, OutputForm, find_leaves
from vitgraph.integrations.transformers.metadata_rules import (
    RULES,
    ModuleSpec,
    base_counts,
    buffer_specs,
    check_rules,
    item_arrays,
    join_items,
)
from vitgraph.integrations.transformers.module_tower import GridTower, segment_counter
from vitgraph.integrations.transformers.recorder import RecordedCall, record
from vitgraph.integrations.transformers.shadow import own_config, shadow
from vitgraph.integrations.transformers.verify import EXAMPLE_FAILS, Place, attempt, example_rows, verify
from vitgraph.models.contract import SegmentSpec

MERGE_WORDS = ("spatial_merge_size", "merge_size", "merge_kernel_size", "kernel_height")
CHANNELS = ("in_channels", "num_channels", "in_chans", "in_channel")


def grid_tower(module: nn.Module, call: CallForm | None, place: Place, attention: VarlenAttention) -> GridTower:
    """The tower of a module that takes patch rows and `grid_thw`.

    Args:
        module: its parameters are used where they lie.
        call: how it is called; None tries the forms that its config suggests.
        place: of the module.
        attention: backend of the tower.

    Raises:
        UnsupportedModuleError: it cannot be captured, with the reason.
    """
    register()
    refuse_other_arguments(module, (first_parameter(module), "grid_thw"))
    plain, twin = shadow(module, own_config), shadow(module, with_attention(ATTENTION_NAME))
    unit = _unit(module.config)
    refused: list[UnsupportedModuleError] = []
    for video in (True, False):
        packs = _packs(unit, video)
        for form in _call_forms(module) if call is None else (call,):
            try:
                return _tower(plain, twin, form, packs, place, attention)
            except UnsupportedModuleError as error:
                refused.append(error)
    # A wrong guess of the form fails as such; a form that runs says what is in the way. Images alone came last.
    raise next((error for error in reversed(refused) if not str(error).startswith(EXAMPLE_FAILS)), refused[0])


def _tower(
    plain: nn.Module,
    twin: nn.Module,
    call: CallForm,
    packs: Sequence[Sequence[Grid]],
    place: Place,
    attention: VarlenAttention,
) -> GridTower:
    """The tower for one form of call, checked on packs of these items."""
    calls, outputs = _run(plain, call, packs, place)
    form = OutputForm(outputs[0])
    tensors = [form.flatten(output) for output in outputs]
    merge = _merge(calls, packs, tensors)
    spec = _spec(plain, call, calls, packs, merge)
    totals = [sum_counts(map(spec.counts, grids)) for grids in packs]
    leaves = find_leaves(form, outputs, totals)
    spec = replace(
        spec,
        width=leaves[0].spec.width,
        leaves=tuple(leaf.spec for leaf in leaves),
        splits_by_frame=_splits(spec, calls, leaves, packs[0]),
    )
    tower = GridTower(twin, call, form, leaves, spec, calls, attention)
    verify(tower, packs, tensors, place, attention)
    return tower


def _run(
    plain: nn.Module, call: CallForm, packs: Sequence[Sequence[Grid]], place: Place
) -> tuple[list[RecordedCall], list[Any]]:
    """The module's own forward on every pack, and the metadata functions that it called."""
    outputs = []
    for grids in packs:
        sizes = torch.tensor([list(grid) for grid in grids], device=place.device)
        rows = example_rows(sum(grid.patches for grid in grids), call.form.width, place)
        with record(plain, sizes) as calls:
            outputs.append(attempt(plain, call.arguments(rows, sizes)))
    return calls, outputs


def _spec(
    plain: nn.Module, call: CallForm, calls: Sequence[RecordedCall], packs: Sequence[Sequence[Grid]], merge: int
) -> ModuleSpec:
    first = packs[0][0]
    buffers = buffer_specs(item_arrays(calls, [first]), base_counts(first, merge))
    kinds = {b.name: b.rows for b in buffers if RULES[b.name].offsets}
    if not kinds:
        raise UnsupportedModuleError("none of its metadata functions gives the attention segments (cu_seqlens)")
    window, longest = _window(calls)
    spec = ModuleSpec(
        family=type(plain).__name__,
        modalities=("image", "video") if any(grid.t > 1 for grids in packs for grid in grids) else ("image",),
        patch_width=call.form.width,
        merge=merge,
        temporal_patch=getattr(plain.config, "temporal_patch_size", None) or 1,
        width=0,
        buffers=buffers,
        segments=tuple(SegmentSpec(name, longest if kind == "window" else None) for name, kind in kinds.items()),
        lengths=segment_counter(calls, kinds),
        window=window,
    )
    for grids in packs:
        check_rules(spec, calls, grids)
    return spec


def _window(calls: Sequence[RecordedCall]) -> tuple[int | None, int | None]:
    """Side of a window in what `window_index` counts, and patches in a whole window; None where they are unknown."""
    for call in calls:
        a = call.arguments
        if {"window_size", "spatial_merge_size", "patch_size"} <= a.keys():
            side = a["window_size"] // a["spatial_merge_size"] // a["patch_size"]
            return side, (side * a["spatial_merge_size"]) ** 2
    return None, None


def _merge(calls: Sequence[RecordedCall], packs: Sequence[Sequence[Grid]], outputs: Sequence[Sequence[Tensor]]) -> int:
    """Side m of the squares that h and w must be whole multiples of: what its functions are told, and its outputs."""
    sides = {v for c in calls for k, v in c.arguments.items() if k in MERGE_WORDS and isinstance(v, int)}
    patches = [sum(grid.patches for grid in grids) for grids in packs]
    for tensors in zip(*outputs, strict=True):
        for sizes in zip(*(tensor.shape for tensor in tensors), strict=False):
            ratios = {p // size if size and p % size == 0 else 0 for p, size in zip(patches, sizes, strict=True)}
            side = math.isqrt(max(ratios))
            if len(set(sizes)) > 1 and ratios == {side**2}:
                sides.add(side)
    return math.lcm(*sides - {0}) if sides else 1


def _splits(spec: ModuleSpec, calls: Sequence[RecordedCall], leaves: Sequence[Leaf], grids: Sequence[Grid]) -> bool:
    """Whether a clip is its frames one after another, in metadata and in outputs."""
    clip = next((grid for grid in grids if grid.t > 1), None)
    if clip is None or {leaf.rows for leaf in leaves} - {"patch", "token"}:
        return False
    frames = [Grid(1, clip.h, clip.w)] * clip.t
    joined = join_items(spec, [item_arrays(calls, [frame]) for frame in frames], frames)
    return all((joined[name] == array).all() for name, array in item_arrays(calls, [clip]).items())


def _unit(config: Any) -> int:
    """A side in patches that any merge of the config divides, at least 4."""
    sides = [getattr(config, name, None) for name in (*MERGE_WORDS, "downsample_factor", "pixel_shuffle_factor")]
    numbers = [n for side in sides for n in (side if isinstance(side, (list, tuple)) else [side])]
    return math.lcm(4, *(n for n in numbers if isinstance(n, int) and 1 <= n <= 8))


def _packs(unit: int, video: bool) -> tuple[tuple[Grid, ...], ...]:
    """Two packs whose counts differ in every kind of row."""
    clip = (Grid(3, unit, unit),) if video else ()
    wide, tall, small = Grid(1, unit, 2 * unit), Grid(1, 2 * unit, unit), Grid(1, unit, unit)
    return (wide, *clip, tall), (small, tall, *clip, *clip, wide, Grid(1, 2 * unit, 3 * unit))


def _call_forms(module: nn.Module) -> Iterator[CallForm]:
    """Forms of call that the module's signature and config suggest, the likeliest first."""
    config: Any = module.config
    side = getattr(config, "patch_size", None)
    side = side[0] if isinstance(side, (list, tuple)) else side
    if not isinstance(side, int):
        raise UnsupportedModuleError("its config has no patch_size, so the width of a patch row is not known")
    channels = next((n for n in (getattr(config, name, None) for name in CHANNELS) if isinstance(n, int)), 3)
    frames = getattr(config, "temporal_patch_size", None) or 1
    pixels = first_parameter(module)
    flat = (channels * n * side**2 for n in (frames, 1, 2))
    shapes = [(channels * frames * side**2,), (channels, side, side), *((n,) for n in flat)]
    for batched in (False, True):
        for shape in dict.fromkeys(shapes):
            yield CallForm(pixels, "grid_thw", PixelForm(shape, batched))


def refuse_other_arguments(module: nn.Module, known: Container[str]) -> None:
    """Raises `UnsupportedModuleError` for a forward that cannot be called with these arguments alone."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    missing = [name for name in needed if name not in known]
    if missing:
        raise UnsupportedModuleError(f"its forward needs {', '.join(missing)}, of which vitgraph knows no rule")
