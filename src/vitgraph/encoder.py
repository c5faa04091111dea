"""The public encoder: images in, embeddings out."""

from __future__ import annotations

import logging
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from reprlib import repr as shortened
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from vitgraph.attention.base import VarlenAttention
from vitgraph.attention.select import select_attention
from vitgraph.config import EncoderConfig
from vitgraph.core import Grid, Grids, KnownGrid, Pack
from vitgraph.embedding import VisionEmbedding
from vitgraph.engine.engine import Engine, Mode
from vitgraph.engine.stats import Stats
from vitgraph.errors import BatchError, ConfigError, InputError, PatchError
from vitgraph.models.checkpoint import Checkpoint
from vitgraph.models.contract import Tower, TowerSpec
from vitgraph.models.registry import Family, find_family, get_family
from vitgraph.models.weights import load_weights, materialise, randomise
from vitgraph.preprocess.inputs import ImageInput, Patches
from vitgraph.preprocess.processor import Processor

if TYPE_CHECKING:
    from vitgraph.planning.budgets import Budget

logger = logging.getLogger("vitgraph")

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MOST_THREADS = 8
MOST_GRIDS = 65536
GRID_ROW = "V24"
"""Three int64, as the bytes they are."""
OnError = Literal["raise", "return"]


class VisionEncoder:
    """A vision tower behind budget graphs. Make one with `from_pretrained` or `from_config`.

    Thread-safe: threads may share an encoder; preprocessing runs in parallel, replays take turns.
    """

    def __init__(
        self,
        tower: Tower,
        processor: Processor,
        family: Family,
        device: torch.device,
        dtype: torch.dtype,
        config: EncoderConfig,
        attention: VarlenAttention,
    ) -> None:
        self.tower = tower
        self.processor = processor
        self.family = family
        self.device = device
        self.dtype = dtype
        self.config = config
        self.attention = attention.name
        self.engine = Engine(tower, device, dtype, config, attention)
        self._known: dict[Hashable, KnownGrid] = {}
        """Checked grids, by what callers give: three integers, or the bytes of such a row."""

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        config: EncoderConfig | None = None,
        revision: str | None = None,
    ) -> VisionEncoder:
        """Loads the vision side of a checkpoint; nothing of the language model is read.

        Args:
            model: local folder or hub id.
            device: default: CUDA if there is one, else the CPU.
            dtype: bfloat16, float16 or float32; default: bfloat16 on CUDA, float32 on the CPU.
            config: see `EncoderConfig`.
            revision: branch, tag or commit on the hub.

        Raises:
            CheckpointError: no such checkpoint, a missing shard, missing or unexpected keys (all are listed).
            UnknownFamilyError: no family serves the checkpoint; the known ones are listed.
            ConfigError: a setting that this device cannot meet.
        """
        checkpoint = Checkpoint(model, revision)
        family = find_family(checkpoint.config)
        encoder = cls._build(family, checkpoint.config, checkpoint, device, dtype, config or EncoderConfig())
        load_weights(encoder.tower, checkpoint, family.layouts(family.parse_config(checkpoint.config)))
        return encoder

    @classmethod
    def from_config(
        cls,
        model: str | Mapping[str, Any],
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        config: EncoderConfig | None = None,
        seed: int = 0,
    ) -> VisionEncoder:
        """An encoder with random weights, for tests and benchmarks.

        Args:
            model: a parsed config.json, or a family's name for its tiny model.
            seed: of the weights; the same seed gives the same weights on the same kind of device.
            device, dtype, config: as in `from_pretrained`.
        """
        hf_config = get_family(model).tiny()[0] if isinstance(model, str) else model
        encoder = cls._build(find_family(hf_config), hf_config, None, device, dtype, config or EncoderConfig())
        randomise(encoder.tower, seed)
        return encoder

    @classmethod
    def _build(
        cls,
        family: Family,
        hf_config: Mapping[str, Any],
        checkpoint: Checkpoint | None,
        device: str | torch.device | None,
        dtype: str | torch.dtype | None,
        config: EncoderConfig,
    ) -> VisionEncoder:
        place, kind = _device(device), None
        kind = _dtype(dtype, place)
        attention = select_attention(config.attention, place, kind)
        try:
            parsed = family.parse_config(hf_config)
        except KeyError as error:
            raise ConfigError(f"config.json of this {family.title} checkpoint lacks {error}.") from error
        read = checkpoint.read_json if checkpoint else lambda _name: None
        processor = family.processor(parsed, read("preprocessor_config.json"), read("video_preprocessor_config.json"))
        with torch.device("meta"):
            tower = family.build(parsed, attention)
        materialise(tower, place, kind)
        tower.eval()
        return cls(tower, processor, family, place, kind, config, attention)

    # -- facts -------------------------------------------------------------------------------------------------

    @property
    def spec(self) -> TowerSpec:
        """What the tower declares."""
        return self.tower.spec

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """Token budgets, ascending."""
        return self.engine.budgets

    @property
    def stats(self) -> Stats:
        """A snapshot of the counters."""
        return self.engine.stats

    # -- work --------------------------------------------------------------------------------------------------

    def capture(self, progress: bool = True) -> None:
        """Captures every budget, largest first. `encode` does this on its first call unless `lazy` is set.

        Args:
            progress: show a progress bar on a terminal.
        """
        if not progress:
            self.engine.capture()
            return
        from vitgraph.progress import progress_bar

        with progress_bar("capturing graphs") as update:
            self.engine.capture(update)

    def prepare(self, image: ImageInput) -> Patches:
        """Preprocessing alone: decode, resize, normalise and patchify one input, on the host.

        Raises:
            InputError: what is wrong with the input.
        """
        patches = self.processor.prepare(image)
        self.spec.check_grid(patches.grid)
        return patches

    def plan(self, grids: Iterable[Sequence[int]]) -> list[Pack]:
        """How items of these (t, h, w) grids would be packed."""
        return self.engine.plan(Grids([self._know(grid) for grid in grids], self.engine.planner))

    def encode(self, images: Sequence[ImageInput], on_error: OnError = "raise", mode: Mode = "auto") -> list[Any]:
        """Encodes images and clips of any size.

        Args:
            images: see `ImageInput`; may be empty.
            on_error: what happens to the others when some inputs are bad. All good ones are always encoded; "raise"
                then raises a `BatchError` that carries them, "return" puts the error in its slot of the result.
            mode: "auto" replays graphs; "padded" and "eager" are the references (see `engine.Mode`).

        Returns:
            One `VisionEmbedding` per input, in order.

        Raises:
            BatchError: with on_error="raise", when any input is bad.
        """
        if isinstance(images, (str, bytes, Path)) or not isinstance(images, Sequence):
            raise InputError(f"encode() takes a list of images, not a {type(images).__name__}; wrap it: encode([x]).")
        results: list[Any] = self._prepare_all(images)
        good = [i for i, r in enumerate(results) if isinstance(r, Patches)]
        rows = [_as_tensor(results[i].pixel_values) for i in good]
        grids = [results[i].grid for i in good]
        embeddings = self.engine.embed(rows, grids, mode) if grids else []
        for i, embedding in zip(good, embeddings, strict=True):
            results[i] = embedding
        if on_error == "raise" and len(good) < len(results):
            raise BatchError(results)
        return results

    def encode_patches(
        self, pixel_values: Tensor, grid_thw: Tensor | Sequence[Sequence[int]], mode: Mode = "auto"
    ) -> list[VisionEmbedding]:
        """Encodes items that are already patchified. Inputs on the device are never read back.

        Args:
            pixel_values: `[P, patch_width]` (or `[P, ...]` that flattens to it), the items' rows one after another,
                as the family's reference processor lays them out; any float dtype, on the host or the device.
            grid_thw: (t, h, w) per item, on the host.
            mode: as in `encode`.

        Raises:
            PatchError: rank, width, dtype, row count or a grid does not fit the tower.
        """
        key = _batch_key(grid_thw)
        again = self.engine.embed_again(key, pixel_values) if mode == "auto" else None
        if again is not None:
            return again
        known = self._known_of(grid_thw, key)
        key = key if isinstance(key, bytes) else None
        new = self.engine.embed_new(key, known, pixel_values) if mode == "auto" else None
        if new is not None:
            return new
        rows = self._rows_of(pixel_values)
        count = rows.shape[0]
        if not known and not count:
            return []
        grids = self.engine.planner.batch_of(known)  # what an earlier planner of the same engine knew is as good
        return self.engine.embed(rows, grids, mode, key)

    def release(self) -> None:
        """Frees graphs and static buffers. The encoder cannot encode afterwards."""
        self.engine.release()

    def __enter__(self) -> VisionEncoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _prepare_all(self, images: Sequence[ImageInput]) -> list[Patches | InputError]:
        """Prepares every input, several at a time: decoding and resizing release the interpreter's lock."""
        threads = min(self.config.preprocess_threads or min(os.cpu_count() or 1, MOST_THREADS), len(images))
        if threads <= 1:
            return [self._prepare_one(image) for image in images]
        with ThreadPoolExecutor(threads, thread_name_prefix="vitgraph") as pool:
            return list(pool.map(self._prepare_one, images))

    def _prepare_one(self, image: ImageInput) -> Patches | InputError:
        try:
            return self.prepare(image)
        except InputError as error:
            return error

    # -- helpers -----------------------------------------------------------------------------------------------

    def _known_of(self, grid_thw: Tensor | Sequence[Sequence[int]], key: Hashable) -> list[KnownGrid]:
        """What is known of the items' grids, which are checked.

        Args:
            grid_thw: as in `encode_patches`.
            key: what stands for it: its rows as they came, or the bytes of all rows one after another.
        """
        known = self._known
        rows: Any = np.frombuffer(key, GRID_ROW).tolist() if isinstance(key, bytes) else key
        try:
            found = list(map(known.__getitem__, rows))
        except (KeyError, TypeError):  # new ones, or what is no key
            found = [self._know(grid) for grid in _host_grids(grid_thw)]
            if isinstance(key, bytes):
                known.update(zip(rows, found, strict=True))
        return found

    def _know(self, grid: Sequence[int]) -> KnownGrid:
        own = _whole(grid)
        known = self._known.get(own)
        if known is None:
            self.spec.check_grid(own)
            if len(self._known) >= MOST_GRIDS:
                self._known.clear()
            known = self._known[own] = self.engine.known(own)
        return known

    def _rows_of(self, pixel_values: Tensor) -> Tensor:
        """`[P, patch_width]`, checked but for P."""
        if not isinstance(pixel_values, Tensor) or not pixel_values.is_floating_point():
            kind = getattr(pixel_values, "dtype", type(pixel_values).__name__)
            raise PatchError(f"pixel_values must be a floating point tensor of patch rows, not {kind}.")
        shape, width = pixel_values.shape, self.spec.patch_width
        if len(shape) == 2 and shape[1] == width:
            return pixel_values
        rows = pixel_values.flatten(1) if pixel_values.dim() > 1 else pixel_values
        if rows.dim() != 2 or rows.shape[1] != width:
            raise PatchError(
                f"pixel_values has shape {tuple(shape)}; {self.spec.family} expects "
                f"[patches, {width}] as its reference processor makes them."
            )
        return rows


def _as_tensor(values: np.ndarray | Tensor) -> Tensor:
    return values if isinstance(values, Tensor) else torch.from_numpy(values)


def _batch_key(grid_thw: Tensor | Sequence[Sequence[int]]) -> Hashable:
    """What stands for the grids of a batch and is cheap to look up; not checked."""
    if isinstance(grid_thw, Tensor):
        usual = grid_thw.dtype is torch.int64 and grid_thw.is_cpu and grid_thw.dim() == 2 and grid_thw.shape[1] == 3
        return grid_thw.numpy().tobytes() if usual else None
    try:
        key = tuple(grid_thw)
        return tuple(map(tuple, key)) if key and isinstance(key[0], list) else key
    except TypeError as error:
        raise PatchError(f"grid_thw holds one (t, h, w) per item, not {shortened(grid_thw)}.") from error


def _whole(grid: Sequence[int]) -> Grid:
    """The grid, if it has three whole numbers."""
    try:
        own = Grid(*map(int, grid))
        if own == tuple(grid):
            return own
    except (TypeError, ValueError, OverflowError):  # no numbers, or not three of them
        pass
    raise PatchError(f"a grid is (t, h, w), three whole numbers of patches, not {shortened(grid)}.")


def _host_grids(grid_thw: Tensor | Sequence[Sequence[int]]) -> list[Sequence[int]]:
    if isinstance(grid_thw, Tensor):
        if grid_thw.dim() != 2 or grid_thw.is_floating_point():
            raise PatchError(
                f"grid_thw has shape {tuple(grid_thw.shape)} and dtype {grid_thw.dtype}; expected whole [items, 3]."
            )
        if grid_thw.is_cuda:
            raise PatchError(
                "grid_thw is on the device; sizes must be known on the host. Keep the processor's grid_thw on the "
                "CPU, or pass grid_thw.tolist() where you already have it."
            )
        return grid_thw.tolist()
    return list(grid_thw)


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {device!r}: {error}") from error
    if place.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {place.type!r} is not supported; use 'cuda' or 'cpu'.")
    if place.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"device {str(place)!r} was asked for, but torch sees no CUDA device; use device='cpu'.")
        index = torch.cuda.current_device() if place.index is None else place.index
        if index >= torch.cuda.device_count():
            raise ConfigError(f"device {str(place)!r} does not exist; there are {torch.cuda.device_count()}.")
        place = torch.device("cuda", index)
    return place


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ConfigError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}.")
        return DTYPES[dtype]
    if dtype not in DTYPES.values():
        raise ConfigError(f"dtype {dtype} is not supported; use one of {', '.join(DTYPES)}.")
    return dtype
