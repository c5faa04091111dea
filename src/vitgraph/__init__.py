"""vitgraph runs the vision encoder of a multimodal LLM as one CUDA graph.

Importing this package loads neither torch nor a web framework; names are resolved on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitgraph.config import EncoderConfig
    from vitgraph.core import Grid
    from vitgraph.embedding import VisionEmbedding
    from vitgraph.encoder import VisionEncoder
    from vitgraph.errors import BatchError, VitgraphError
    from vitgraph.integrations.transformers.install import accelerate, accelerated, acceleration, restore
    from vitgraph.preprocess import Patches, Video

__version__ = "0.1.0"

_EXPORTS = {
    "VisionEncoder": "vitgraph.encoder",
    "EncoderConfig": "vitgraph.config",
    "VisionEmbedding": "vitgraph.embedding",
    "Grid": "vitgraph.core",
    "Patches": "vitgraph.preprocess",
    "Video": "vitgraph.preprocess",
    "BatchError": "vitgraph.errors",
    "VitgraphError": "vitgraph.errors",
    "accelerate": "vitgraph.integrations.transformers.install",
    "accelerated": "vitgraph.integrations.transformers.install",
    "acceleration": "vitgraph.integrations.transformers.install",
    "restore": "vitgraph.integrations.transformers.install",
}

__all__ = [
    "BatchError",
    "EncoderConfig",
    "Grid",
    "Patches",
    "Video",
    "VisionEmbedding",
    "VisionEncoder",
    "VitgraphError",
    "accelerate",
    "accelerated",
    "acceleration",
    "restore",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'vitgraph' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
