"""From a vision module on pictures of one size to a tower: every picture is one row of the batch."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from vitgraph.attention.base import VarlenAttention
from vitgraph.config import EncoderConfig
from vitgraph.core import Counts, Grid
from vitgraph.errors import PatchError, UnsupportedModuleError
from vitgraph.integrations.transformers.attention_function import WHOLE_NAME, register, with_attention
from vitgraph.integrations.transformers.call_forms import CallForm, FullMask, PixelForm, first_parameter
from vitgraph.integrations.transformers.leaves import Leaf, OutputForm
from vitgraph.integrations.transformers.module_tower import TileTower
from vitgraph.integrations.transformers.probe_grids import CHANNELS, refuse_other_arguments
from vitgraph.integrations.transformers.shadow import own_config, shadow
from vitgraph.integrations.transformers.verify import Place, attempt, example_rows, verify
from vitgraph.models.contract import OutputSpec, TowerSpec

SIZES = ("image_size", "img_size", "input_size")
DEFAULT_SIDE = 224
PATCH_MASK = "patch_attention_mask"
EXAMPLES = (2, 3)
"""Pictures in the examples: the numbers of rows of the two outputs that are compared."""

LEAST_TILES, MOST_TILES = 8, 64
"""Bounds of the largest budget in tiles; more come in several replays."""


@dataclass(frozen=True)
class TileModuleSpec(TowerSpec):
    """A module whose patch rows are whole pictures: a grid is (pictures, 1, 1).

    Attributes:
        leaves: everything that the module returns, in rows of pictures.
    """

    leaves: tuple[OutputSpec, ...] = ()

    @property
    def outputs(self) -> tuple[OutputSpec, ...]:
        return self.leaves

    def counts(self, grid: Grid) -> Counts:
        return {"patch": grid.t, "token": grid.t, "item": 1}

    def capacity(self, tokens: int, max_items: int, max_frames: int) -> Counts:
        """A budget is a number of pictures."""
        return {"patch": tokens, "token": tokens, "item": max_items}

    def check_grid(self, grid: Grid) -> None:
        if grid.t < 1 or (grid.h, grid.w) != (1, 1):
            raise PatchError(f"grid {tuple(grid)} is none of pictures; expected (pictures, 1, 1).")


def tile_tower(module: nn.Module, call: CallForm | None, place: Place, attention: VarlenAttention) -> TileTower:
    """The tower of a module that takes pictures of one size.

    Args:
        module: its parameters are used where they lie.
        call: how it is called; None takes the size that its config suggests.
        place: of the module.
        attention: not used by the module, which keeps its own.

    Raises:
        UnsupportedModuleError: it cannot be captured, with the reason.
    """
    register()
    refuse_other_arguments(module, (first_parameter(module),))
    plain, whole = shadow(module, own_config), shadow(module, with_attention(WHOLE_NAME))
    refused: list[UnsupportedModuleError] = []
    for form in _call_forms(module) if call is None else (call,):
        try:
            return _tower(plain, whole if form.masked else plain, form, place, attention)
        except UnsupportedModuleError as error:
            refused.append(error)
    raise refused[0]


def _tower(plain: nn.Module, twin: nn.Module, call: CallForm, place: Place, attention: VarlenAttention) -> TileTower:
    outputs = [attempt(plain, call.arguments(example_rows(n, call.form.width, place), None)) for n in EXAMPLES]
    form = OutputForm(outputs[0])
    tensors = [form.flatten(output) for output in outputs]
    leaves = tuple(_leaf(name, pair) for name, pair in zip(form.names, zip(*tensors, strict=True), strict=True))
    spec = TileModuleSpec(
        family=type(twin).__name__,
        modalities=("image", "video"),
        patch_width=call.form.width,
        merge=1,
        temporal_patch=1,
        width=leaves[0].spec.width,
        buffers=(),
        segments=(),
        splits_by_frame=True,
        leaves=tuple(leaf.spec for leaf in leaves),
    )
    tower = TileTower(twin, call, form, leaves, spec)
    verify(tower, [(Grid(n, 1, 1),) for n in EXAMPLES], tensors, place, attention)
    return tower


def _leaf(name: str, pair: Sequence[Tensor]) -> Leaf:
    """A tensor whose first axis holds the pictures, each the same number of times."""
    shapes = [tuple(tensor.shape) for tensor in pair]
    each = {shape[0] / n for shape, n in zip(shapes, EXAMPLES, strict=True) if shape}
    whole = len(each) == 1 and next(iter(each)).is_integer() and next(iter(each)) > 0
    if not whole or shapes[0][1:] != shapes[1][1:]:
        listed = " and ".join(f"{list(shape)} for {n}" for shape, n in zip(shapes, EXAMPLES, strict=True))
        raise UnsupportedModuleError(f"its output {name} has shapes {listed} pictures; expected pictures first")
    return Leaf(name, "patch", (), shapes[0][1:], int(next(iter(each))))


def tile_settings(config: EncoderConfig, tokens_per_tile: int) -> EncoderConfig:
    """The settings in pictures instead of tokens: budgets of 1, 2, 3, 4, 6, 8, 12, 16, ... pictures.

    Args:
        config: the caller's. Listed budgets and `max_tokens` are tokens.
        tokens_per_tile: rows of one picture.
    """
    if config.budgets is not None:
        return replace(config, budgets=tuple(-(-tokens // tokens_per_tile) for tokens in config.budgets))
    most = min(max(config.max_tokens // tokens_per_tile, LEAST_TILES), MOST_TILES)
    ladder = {n for k in range(7) for n in (2**k, 3 * 2**k) if n < most}
    return replace(config, budgets=(*sorted(ladder), most))


def _call_forms(module: nn.Module) -> Iterator[CallForm]:
    config: Any = module.config
    size = next((s for s in (getattr(config, name, None) for name in SIZES) if s), DEFAULT_SIDE)
    height, width = size[-2:] if isinstance(size, (list, tuple)) else (size, size)
    channels = next((n for n in (getattr(config, name, None) for name in CHANNELS) if isinstance(n, int)), 3)
    frames = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", None)
    picture = (channels, height, width)
    shapes = [picture] if not isinstance(frames, int) else [(frames, *picture), picture]
    for shape in shapes:
        yield CallForm(first_parameter(module), "", PixelForm(shape), _masks(module, height, width))


def _masks(module: nn.Module, height: int, width: int) -> tuple[tuple[str, FullMask], ...]:
    """The mask of patches that a module takes, as callers give it for pictures without padding."""
    side = getattr(module.config, "patch_size", None)
    if PATCH_MASK not in inspect.signature(type(module).forward).parameters or not isinstance(side, int):
        return ()
    return ((PATCH_MASK, FullMask((height // side, width // side))),)
