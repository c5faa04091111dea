"""The native backend: a vision module of Transformers runs as the family's tower, on the module's own weights."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from threading import RLock
from typing import Any

import torch
from torch import nn

from vitgraph.attention.select import select_attention
from vitgraph.config import EncoderConfig
from vitgraph.core import Grid
from vitgraph.engine.engine import Engine, Progress
from vitgraph.engine.stats import Stats
from vitgraph.errors import ConfigError, EngineReleasedError, UnsupportedModuleError
from vitgraph.integrations.transformers.agreement import disagreement
from vitgraph.integrations.transformers.backend import Backend
from vitgraph.integrations.transformers.calls import CALLS, Call
from vitgraph.integrations.transformers.native_families import NativeFamily, native_family, native_names
from vitgraph.integrations.transformers.watch import WeightWatch
from vitgraph.integrations.transformers.weights import TowerWeights, bind, place_of


def is_native_module(module: nn.Module) -> bool:
    """Whether this is a vision module that has a tower of ours."""
    return native_family(module) is not None


def native_backend(module: nn.Module, config: EncoderConfig) -> Backend:
    """The native backend of a vision module.

    Raises:
        UnsupportedModuleError: it has no tower of ours, or differs from it; the message says in what.
        ConfigError: a setting that the module's device or dtype cannot meet.
    """
    row = native_family(module)
    if row is None:
        raise UnsupportedModuleError(f"it is no vision module with a tower of its own; known: {native_names()}")
    return NativeBackend(module, row, config)


class NativeBackend:
    """See `Backend`. Follows its module: weights that moved bring a new tower, copies are made anew when they change.

    Args:
        module: whose weights the tower uses.
        row: of the module's class.
        config: see `EncoderConfig`.
    """

    kind = "native"

    def __init__(self, module: nn.Module, row: NativeFamily, config: EncoderConfig) -> None:
        self._module, self._row, self._config = module, row, config
        self._lock = RLock()
        self._watch = WeightWatch(module)
        self._engine: Engine | None = None
        self._weights: TowerWeights | None = None
        self._broken = ""
        self._agrees = self._released = False
        self.copied_bytes = 0
        self._build()

    @property
    def stats(self) -> Stats:
        """Counters of the present tower: they start anew when the module's weights move."""
        return self._engine.stats if self._engine else Stats()

    @property
    def records(self) -> tuple[str, ...]:
        """See `AcceleratedForward`."""
        return self._call.records

    def refuse(self, arguments: Mapping[str, Any]) -> str:
        with self._lock:
            self._follow()
            return self._broken or self._watch.refuse_replaced() or self._call.refuse(arguments)

    def run(self, arguments: Mapping[str, Any]) -> Any:
        # Static buffers outlive the caller's inference mode, in which no tensor that does may be made.
        with torch.inference_mode(False), torch.no_grad():
            engine, call = self._engine, self._call
            if engine is None:
                raise EngineReleasedError("the model was restored; call vitgraph.accelerate again.")
            rows, grids = call.split(arguments)
            output = call.join(engine.run(rows, grids), arguments)
            if not self._agrees:
                self._compare(engine, arguments, grids[0], output)
            return output

    def _compare(self, engine: Engine, arguments: Mapping[str, Any], grid: Grid, output: Any) -> None:
        """Holds the first call of a tower whose output is finite to the module's own forward.

        Raises:
            UnsupportedModuleError: they differ; the tower is given up, later calls are refused with the same reason.
        """
        reason = disagreement(self._module, arguments, grid, output)
        with self._lock:
            if self._engine is engine:
                self._agrees = reason == ""
                if reason:
                    self._drop(reason)
        if reason:
            raise UnsupportedModuleError(reason)

    def capture(self, progress: Progress | None = None) -> None:
        with self._lock, torch.inference_mode(False):
            self._follow()
            if self._engine:
                self._engine.capture(progress)

    def release(self) -> None:
        with self._lock:
            self._drop("the backend was released")
            self._released = True

    def _drop(self, reason: str) -> None:
        if self._engine:
            self._engine.release()
        self._engine = self._weights = None
        self.copied_bytes = 0
        self._broken = reason

    def _follow(self) -> None:
        """Brings the tower up to date with the module's weights."""
        if self._released:
            return
        if self._watch.moved():
            self._drop("its weights moved")
            self._watch = WeightWatch(self._module)
            try:
                self._build()
            except (UnsupportedModuleError, ConfigError) as error:
                self._broken = str(error)
        elif self._weights and self._weights.changed():
            with torch.inference_mode(False):
                self._weights.refresh()

    def _build(self) -> None:
        device, dtype = place_of(self._module)
        attention = select_attention(self._config.attention, device, dtype)
        module: Any = self._module
        vision_config = module.config.to_dict()
        difference = self._row.differs(vision_config)
        if difference:
            raise UnsupportedModuleError(difference)
        try:
            with torch.device("meta"):
                tower, family, parsed = self._row.build(vision_config, attention)
        except (ConfigError, KeyError, TypeError, ValueError) as error:
            raise UnsupportedModuleError(f"its config is not one that the tower reads: {error}") from error
        with torch.inference_mode(False):
            inner = getattr(tower, "inner", tower)
            self._weights = bind(inner, self._module, family.layouts(parsed))
            self.copied_bytes = self._weights.copied_bytes
            self._engine = Engine(tower.eval(), device, dtype, self._config, attention)
        output = getattr(sys.modules[type(self._module).__module__], self._row.output)
        self._call: Call = CALLS[self._row.call](tower.spec, output, module.config)
        self._broken, self._agrees = "", False
