"""The generic backend: a vision module of Transformers that vitgraph does not know runs its own forward in graphs."""

from __future__ import annotations

import inspect
import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from threading import RLock
from typing import Any

import torch
from torch import nn

from vitgraph.attention.select import select_attention
from vitgraph.config import EncoderConfig
from vitgraph.engine.engine import Engine, Progress
from vitgraph.engine.stats import Stats
from vitgraph.errors import ConfigError, PatchError, UnsupportedModuleError
from vitgraph.integrations.transformers.backend import Backend
from vitgraph.integrations.transformers.call_forms import GRID, CallForm, CallReader, first_parameter
from vitgraph.integrations.transformers.host_reads import where
from vitgraph.integrations.transformers.module_tower import ModuleTower
from vitgraph.integrations.transformers.probe_grids import grid_tower
from vitgraph.integrations.transformers.probe_tiles import tile_settings, tile_tower
from vitgraph.integrations.transformers.verify import Place, first_line
from vitgraph.integrations.transformers.watch import WeightWatch
from vitgraph.integrations.transformers.weights import place_of

logger = logging.getLogger("vitgraph")

VISUAL = {"image", "video"}
TILES = ("pixel_values", "pixel_values_videos")
MOST_FORMS = 4
"""Forms of call (size of the pictures, states asked for) that hold graphs; the least recently used one goes."""

PATIENCE, MOST_ASKED = 8, 64
"""Calls of a further form before it takes the place of another, and forms whose calls are counted."""

TOO_MANY_FORMS = f"more than {MOST_FORMS} sizes of pictures or other forms of call"


def is_vision_module(module: nn.Module) -> bool:
    """Whether this looks like a vision tower of Transformers: a model that takes nothing but pixels, and no text."""
    from transformers import PreTrainedModel

    if not isinstance(module, PreTrainedModel) or getattr(module.config, "text_config", None) is not None:
        return False
    takes_pixels = GRID in _parameters(module) or first_parameter(module) in TILES
    modalities = getattr(module, "input_modalities", None) or ()
    modalities = {modalities} if isinstance(modalities, str) else set(modalities)
    seeing = modalities <= VISUAL or "vision" in type(module.config).__name__.lower()
    speaks = any("input_ids" in name or name.startswith("decoder_") for name in _parameters(module))
    return takes_pixels and not speaks and (seeing or module.main_input_name in TILES)


def generic_backend(module: nn.Module, config: EncoderConfig) -> Backend:
    """The generic backend of a vision module.

    Its forward is run on a few small examples, to find its metadata, its outputs and whether a graph can hold it.

    Raises:
        UnsupportedModuleError: it cannot be captured; the message says why, and in which line.
        ConfigError: a setting that the module's device or dtype cannot meet.
    """
    if not is_vision_module(module):
        raise UnsupportedModuleError("it is no vision module of Transformers that takes patch rows or pictures")
    if config.compile:
        raise UnsupportedModuleError("compile=True compiles vitgraph's own towers, not a module of Transformers")
    return GenericBackend(module, config)


class GenericBackend:
    """See `Backend`. Holds one engine per form of call.

    Args:
        module: whose class's forward is captured, on the module's own weights.
        config: see `EncoderConfig`.
    """

    kind = "generic"
    records = ("output_hidden_states",)

    def __init__(self, module: nn.Module, config: EncoderConfig) -> None:
        self._module, self._config = module, config
        self._lock = RLock()
        self._reader = CallReader(module)
        self._engines: OrderedDict[CallForm, Engine] = OrderedDict()
        self._refused: dict[CallForm, str] = {}
        self._asked: dict[CallForm, int] = {}
        self._released = False
        self._watch = WeightWatch(module)
        engine = self._make(None)
        self._batched = self._tower(engine).call.form.batched
        self._add(engine)

    @property
    def copied_bytes(self) -> int:
        """Device memory of tensors that the module keeps on the host; weights are shared."""
        with self._lock:
            return sum(self._tower(engine).copied_bytes(self._module) for engine in self._engines.values())

    @property
    def stats(self) -> Stats:
        """Counters of the forms of call that are held, added up."""
        with self._lock:
            return _sum([engine.stats for engine in self._engines.values()])

    @property
    def engines(self) -> tuple[Engine, ...]:
        """One per form of call, the one that was used last at the end."""
        return tuple(self._engines.values())

    def refuse(self, arguments: Mapping[str, Any]) -> str:
        """As `Backend` says; the first call of a new form runs examples, which wait for the device."""
        if self._released:
            return "the backend was released"
        form = self._reader.form(arguments, self._batched)
        if isinstance(form, str):
            return form
        with self._lock:
            self._follow()
            replaced = self._watch.refuse_replaced()
            if replaced:
                return replaced
            if form in self._engines:
                return ""
            if form not in self._refused and self._worth_it(form):
                self._try(form)
            return self._refused.get(form, "" if form in self._engines else TOO_MANY_FORMS)

    def run(self, arguments: Mapping[str, Any]) -> Any:
        form = self._reader.form(arguments, self._batched)
        assert isinstance(form, CallForm), "run() follows refuse()"
        # Static buffers outlive the caller's inference mode, in which no tensor that does may be made.
        with torch.inference_mode(False), torch.no_grad(), self._lock:
            engine = self._engines.get(form)
            if engine is None:
                raise PatchError("another thread's calls took the place of this form")
            self._engines.move_to_end(form)
            rows, grids = self._reader.split(arguments, form, engine.spec)
            with self._giving_up(form, engine):
                outputs = engine.run(rows, grids)
            return self._tower(engine).build(outputs)

    def capture(self, progress: Progress | None = None) -> None:
        with self._lock, torch.inference_mode(False):
            self._follow()
            if not self._engines and not self._released:
                self._add(self._make(None))
            for form, engine in list(self._engines.items()):
                with self._giving_up(form, engine):
                    engine.capture(progress)

    def release(self) -> None:
        with self._lock:
            self._forget()
            self._released = True

    # -- engines -----------------------------------------------------------------------------------------------

    def _make(self, form: CallForm | None) -> Engine:
        device, dtype = place_of(self._module)
        attention = select_attention(self._config.attention, device, dtype)
        place = Place(device, dtype)
        with torch.inference_mode(False), torch.no_grad():
            if self._reader.grid:
                tower: ModuleTower = grid_tower(self._module, form, place, attention)
                return Engine(tower.eval(), device, dtype, self._config, attention)
            tiles = tile_tower(self._module, form, place, attention)
            config = tile_settings(self._config, tiles.tokens_per_tile)
            return Engine(tiles.eval(), device, dtype, config, attention)

    def _worth_it(self, form: CallForm) -> bool:
        """Whether a new form gets graphs: at once while there is room, else when it has come often enough."""
        self._asked[form] = self._asked.pop(form, 0) + 1
        while len(self._asked) > MOST_ASKED:
            del self._asked[next(iter(self._asked))]
        return len(self._engines) < MOST_FORMS or self._asked[form] >= PATIENCE

    def _try(self, form: CallForm) -> None:
        try:
            self._add(self._make(form))
        except (UnsupportedModuleError, ConfigError) as error:
            if len(self._refused) >= MOST_ASKED:
                self._refused.clear()
            self._refused[form] = str(error)
        del self._asked[form]

    def _add(self, engine: Engine) -> None:
        self._engines[self._tower(engine).call] = engine
        while len(self._engines) > MOST_FORMS:
            form, oldest = self._engines.popitem(last=False)
            logger.warning("graphs of %s are given up: more than %d forms of call", form, MOST_FORMS)
            oldest.release()

    @contextmanager
    def _giving_up(self, form: CallForm, engine: Engine) -> Iterator[None]:
        """Turns a capture that fails into a refusal of the form; memory that runs out stays what it is."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if self._tower(engine).captures_begun <= engine.stats.captured_graphs:
                raise
            first = _first(error)
            self._refused[form] = f"its capture fails {where(first)}: {first_line(first)}"
            del self._engines[form]
            engine.release()
            raise UnsupportedModuleError(self._refused[form]) from error

    def _follow(self) -> None:
        """Starts anew when weights moved: graphs hold their addresses."""
        if self._watch.moved():
            self._forget()
            self._watch = WeightWatch(self._module)

    def _forget(self) -> None:
        for engine in self._engines.values():
            engine.release()
        self._engines.clear()
        self._refused.clear()

    @staticmethod
    def _tower(engine: Engine) -> ModuleTower:
        assert isinstance(engine.tower, ModuleTower)
        return engine.tower


def _first(error: BaseException) -> BaseException:
    """The error that came before all others: a capture that was broken off fails once more when it ends."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _parameters(module: nn.Module) -> list[str]:
    return list(inspect.signature(type(module).forward).parameters)


def _sum(parts: list[Stats]) -> Stats:
    """Counters added up, reason by reason."""
    total = Stats()
    for part in parts:
        for f in fields(Stats):
            value = getattr(part, f.name)
            if isinstance(value, dict):
                own = getattr(total, f.name)
                for reason, n in value.items():
                    own[reason] = own.get(reason, 0) + n
            else:
                setattr(total, f.name, getattr(total, f.name) + value)
    return total
