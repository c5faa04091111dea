"""What stands in for a vision module's forward: the contract between installing and running."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from vitgraph.engine.engine import Progress
from vitgraph.engine.stats import Stats


class Backend(Protocol):
    """Does the work of one Transformers vision module.

    Attributes:
        kind: "native" (vitgraph's own tower on the module's weights) or "generic" (the module itself, captured).
    """

    kind: str

    @property
    def copied_bytes(self) -> int:
        """Device memory of weights that had to be copied; weights that are shared count nothing."""

    @property
    def stats(self) -> Stats:
        """A snapshot of the engine's counters."""

    def refuse(self, arguments: Mapping[str, Any]) -> str:
        """Why this call must run the module's own forward; empty when `run` can do it. Never syncs with the device.

        Args:
            arguments: of the call, bound to the names of the module's forward, its `**kwargs` flattened in.
        """

    def run(self, arguments: Mapping[str, Any]) -> Any:
        """What the module's own forward returns for these arguments with `return_dict=True`, in ordinary tensors."""

    def capture(self, progress: Progress | None = None) -> None:
        """Captures every budget now."""

    def release(self) -> None:
        """Frees graphs, static buffers and copied weights."""
