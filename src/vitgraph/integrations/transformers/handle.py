"""The handle on an accelerated model: which backend runs what, how often, and with how much memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vitgraph.engine.stats import Stats

if TYPE_CHECKING:
    from vitgraph.integrations.transformers.forward import AcceleratedForward

HEAD = ("module", "class", "backend", "calls", "fallbacks", "graphs", "graph MB", "static MB", "copied MB")


@dataclass(frozen=True)
class ModuleReport:
    """One vision module.

    Attributes:
        class_name: of the module.
        backend: "native", "generic", or "" when it was left unchanged.
        reason: why it was left unchanged.
        calls: calls that the backend ran.
        fallbacks: calls that ran the module's own forward, by reason.
        copied_bytes: memory of weights that the backend holds a copy of.
        stats: counters of the engine; its own `fallbacks` are packs without a graph.
    """

    class_name: str
    backend: str
    reason: str
    calls: int
    fallbacks: Mapping[str, int]
    copied_bytes: int
    stats: Stats

    @property
    def memory_bytes(self) -> int:
        """Device memory that acceleration takes beside the model's own: graphs, static buffers and copied weights."""
        return self.stats.graph_bytes + self.stats.static_bytes + self.copied_bytes


class Acceleration:
    """What `accelerate` did to a model. Print it for a table.

    Args:
        forwards: accelerated modules by name.
        unchanged: class and reason, by name, of the vision modules that no backend took.
    """

    def __init__(self, forwards: Mapping[str, AcceleratedForward], unchanged: Mapping[str, tuple[str, str]]) -> None:
        self._forwards, self._unchanged = forwards, unchanged

    @property
    def modules(self) -> dict[str, ModuleReport]:
        """A snapshot of every vision module, by its name in the model."""
        taken = {
            name: ModuleReport(
                type(f.module).__name__,
                f.backend.kind,
                "",
                f.calls,
                dict(f.fallbacks),
                f.backend.copied_bytes,
                f.backend.stats,
            )
            for name, f in self._forwards.items()
        }
        left = {name: ModuleReport(cls, "", why, 0, {}, 0, Stats()) for name, (cls, why) in self._unchanged.items()}
        return taken | left

    @property
    def fallbacks(self) -> dict[str, int]:
        """Calls that ran a module's own forward, by reason, over all modules."""
        total: dict[str, int] = {}
        for report in self.modules.values():
            for reason, n in report.fallbacks.items():
                total[reason] = total.get(reason, 0) + n
        return total

    @property
    def copied_bytes(self) -> int:
        """Memory of copied weights, over all modules."""
        return sum(report.copied_bytes for report in self.modules.values())

    def capture(self, progress: bool = True) -> None:
        """Captures every budget now instead of on its second use.

        Args:
            progress: show a progress bar on a terminal.
        """
        from vitgraph.progress import progress_bar

        for name, forward in self._forwards.items():
            if not progress:
                forward.backend.capture()
                continue
            with progress_bar(f"capturing graphs of {name}") as update:
                forward.backend.capture(update)

    def report(self) -> str:
        """A table of the modules, then the reasons of every fallback."""
        if not self.modules:
            return "not accelerated"
        rows: list[tuple[str, ...]] = [HEAD]
        notes: list[str] = []
        for name, r in self.modules.items():
            megabytes = (f"{n / 1e6:.1f}" for n in (r.stats.graph_bytes, r.stats.static_bytes, r.copied_bytes))
            counts = (str(n) for n in (r.calls, sum(r.fallbacks.values()), r.stats.captured_graphs))
            rows.append((name, r.class_name, r.backend or "unchanged", *counts, *megabytes))
            notes += [f"{name}: left unchanged: {r.reason}"] * bool(r.reason)
            notes += [f"{name}: {n} x own forward: {reason}" for reason, n in r.fallbacks.items()]
            notes += [f"{name}: {n} x no graph: {reason}" for reason, n in r.stats.fallbacks.items()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join(lines + notes)

    def __str__(self) -> str:
        return self.report()
