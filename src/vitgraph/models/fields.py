"""Reading a family's frozen config from a parsed config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar

Config = TypeVar("Config")


def read_fields(cls: type[Config], values: Mapping[str, Any], **given: Any) -> Config:
    """An instance of the dataclass `cls`, its fields read from `values` under their own names.

    Lists become tuples; a value that is absent or null takes the field's default.

    Args:
        cls: frozen dataclass.
        values: part of a config.json, such as its `vision_config`.
        given: fields that are read otherwise.

    Raises:
        KeyError: naming a field that is missing and has no default.
    """
    read = {f.name: _read(f, values) for f in fields(cls) if f.name not in given}  # type: ignore[arg-type]
    return cls(**read, **given)


def _read(field: Field[Any], values: Mapping[str, Any]) -> Any:
    value = values.get(field.name)
    if value is None:
        if field.default is MISSING:
            raise KeyError(field.name)
        return field.default
    return tuple(value) if isinstance(value, list) else value
