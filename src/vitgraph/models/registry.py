"""The families, one row each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from vitgraph.attention.base import VarlenAttention
from vitgraph.errors import UnknownFamilyError
from vitgraph.models.contract import Tower
from vitgraph.models.layout import Layout
from vitgraph.preprocess.processor import Processor

MODULES = (
    "qwen3_vl",
    "kimi_vl",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_5",
    "qwen3_omni",
    "kimi_k25",
    "glm4v",
    "glm_ocr",
    "internvl",
)
"""Modules of vitgraph.models, one family each; every module defines `FAMILY`."""

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """One family of towers.

    Attributes:
        name: registry name.
        title: name for people.
        model_types: `model_type` values of config.json that it serves.
        modalities: "image" and/or "video".
        parse_config: config.json -> the family's frozen config.
        build: config and attention backend -> tower, on the current default device.
        layouts: config -> checkpoint layouts, the usual one first.
        processor: config, preprocessor_config.json, video_preprocessor_config.json (each may be None) -> processor.
        tiny: config.json and preprocessor_config.json of a tiny model with every feature of the family.
    """

    name: str
    title: str
    model_types: tuple[str, ...]
    modalities: tuple[str, ...]
    parse_config: Callable[[Json], Any]
    build: Callable[[Any, VarlenAttention], Tower]
    layouts: Callable[[Any], tuple[Layout, ...]]
    processor: Callable[[Any, Json | None, Json | None], Processor]
    tiny: Callable[[], tuple[dict[str, Any], dict[str, Any]]]


@cache
def families() -> tuple[Family, ...]:
    """Every registered family."""
    return tuple(import_module(f"vitgraph.models.{module}").FAMILY for module in MODULES)


def get_family(name: str) -> Family:
    """The family of this registry name.

    Raises:
        UnknownFamilyError: listing the known names.
    """
    for family in families():
        if family.name == name:
            return family
    raise UnknownFamilyError(f"unknown family {name!r}; known: {', '.join(f.name for f in families())}.")


def find_family(config: Json) -> Family:
    """The family that serves a config.json.

    Raises:
        UnknownFamilyError: listing the known model types.
    """
    model_type = config.get("model_type")
    for family in families():
        if model_type in family.model_types:
            return family
    known = ", ".join(sorted(t for f in families() for t in f.model_types))
    raise UnknownFamilyError(
        f"no family serves model_type {model_type!r} (architectures {config.get('architectures')}); known: {known}."
    )
