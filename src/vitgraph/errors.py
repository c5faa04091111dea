"""Typed errors. Each says what came, what was expected and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class VitgraphError(Exception):
    """Base class of every error that vitgraph raises for a user's mistake."""


class ConfigError(VitgraphError, ValueError):
    """A setting is invalid: budgets that are not positive, an unknown flag, a wrong type."""


class InputError(VitgraphError, ValueError):
    """One item (image, clip or patch tensor) cannot be encoded. Its neighbours are not affected."""


class ImageError(InputError):
    """An image cannot be read or is out of bounds: truncated, empty, too large, too elongated."""


class VideoError(InputError):
    """A clip cannot be read or sampled."""


class PatchError(InputError):
    """Patch rows and grids do not fit each other or the tower: rank, width, dtype, NaN, grid."""


class UnknownFamilyError(VitgraphError, LookupError):
    """No registered family serves this checkpoint; the message lists the known ones."""


class CheckpointError(VitgraphError):
    """A checkpoint cannot be loaded: a shard is missing, keys are missing or unexpected, shapes differ."""


class MissingExtraError(VitgraphError, ImportError):
    """An optional dependency is not installed; the message names the extra to install."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package!r}. Install it with: pip install 'vitgraph[{extra}]'")


class UnsupportedModuleError(VitgraphError, TypeError):
    """A model's vision module cannot be accelerated; the message has the reason."""


class FallbackError(VitgraphError, RuntimeError):
    """`strict=True` and a pack would have left the graph path; the message has the reason."""


class EngineReleasedError(VitgraphError, RuntimeError):
    """The encoder was used after `release()`."""


class BatchError(InputError):
    """Some items of a batch failed; the others were encoded.

    Attributes:
        results: one entry per input, in the caller's order: the embedding, or the `InputError` of that item.
        errors: the failed indexes with their errors.
    """

    def __init__(self, results: Sequence[Any]) -> None:
        self.results = list(results)
        self.errors = {i: r for i, r in enumerate(self.results) if isinstance(r, InputError)}
        lines = [f"  item {i}: {error}" for i, error in self.errors.items()]
        super().__init__(
            f"{len(self.errors)} of {len(self.results)} items failed; the others are in `.results` "
            f"(or pass on_error='return'):\n" + "\n".join(lines)
        )
