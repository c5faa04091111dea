"""Engine flags of a command, made from the fields of `EncoderConfig`."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any, Optional, get_args, get_type_hints

import typer

from vitgraph.config import VLLM_ALIASES, EncoderConfig
from vitgraph.errors import ConfigError

PANEL = "Engine"
JSON_FLAG = "compilation_config"


def with_encoder_flags(**defaults: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a command that takes `config: EncoderConfig`: the parameter becomes one flag per field.

    A flag that is given wins over `--compilation-config`, which wins over `defaults`, which win over the defaults of
    the dataclass.

    Args:
        defaults: values of fields that this command starts from instead of the dataclass's own.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        hints = get_type_hints(command, include_extras=True)
        own = [
            p.replace(annotation=hints[name])
            for name, p in inspect.signature(command).parameters.items()
            if name != "config"
        ]
        flags = [*_flags(defaults), _json_flag()]
        clash = {p.name for p in own} & {p.name for p in flags}
        assert not clash, f"parameters of {command.__name__} hide engine flags: {clash}"

        @functools.wraps(command)
        def wrapper(**given: Any) -> Any:
            flag_values = {p.name: given.pop(p.name) for p in flags}
            return command(**given, config=config_from_flags(flag_values, defaults))

        signature = inspect.Signature([*own, *flags])
        wrapper.__signature__ = signature  # type: ignore[attr-defined]
        wrapper.__annotations__ = {name: p.annotation for name, p in signature.parameters.items()}
        return wrapper

    return decorate


def config_from_flags(given: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> EncoderConfig:
    """Builds the config from flag values by field name; None means that the flag was not given.

    Raises:
        ConfigError: for a bad value, or a bad `--compilation-config`.
    """
    flags = dict(given)
    text = flags.pop(JSON_FLAG, None)
    settings = {**(defaults or {}), **_named_by_field(_read_json(text) if text is not None else {})}
    for field in fields(EncoderConfig):
        value = flags.get(field.name)
        if value is not None:
            settings[field.name] = _parse_list(field.name, value) if _is_list(field) else value
    return EncoderConfig.from_dict(settings)


def _flags(defaults: Mapping[str, Any]) -> list[inspect.Parameter]:
    return [_flag(field, defaults.get(field.name, field.default)) for field in fields(EncoderConfig)]


def _flag(field: Field[Any], default: Any) -> inspect.Parameter:
    """One optional flag. Its default is None, so that "not given" can be told from "given as the default"."""
    name = field.name.replace("_", "-")
    kind = _value_type(field)
    option = typer.Option(
        f"--{name}/--no-{name}" if kind is bool else f"--{name}",
        help=field.metadata["help"],
        show_default=False if default is None else _shown(default),
        metavar="N,N,..." if _is_list(field) else None,
        rich_help_panel=PANEL,
    )
    return _keyword(field.name, str if _is_list(field) else kind, option)


def _json_flag() -> inspect.Parameter:
    option = typer.Option(
        "--compilation-config",
        help="The same settings as JSON, or a file of it; flags win over it. "
        f"vLLM's names are understood too: {', '.join(VLLM_ALIASES)}.",
        metavar="JSON|FILE",
        show_default=False,
        rich_help_panel=PANEL,
    )
    return _keyword(JSON_FLAG, str, option)


def _keyword(name: str, kind: type, option: Any) -> inspect.Parameter:
    annotation = Annotated[Optional[kind], option]  # type: ignore[valid-type]  # noqa: UP045
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _field_types(field: Field[Any]) -> list[Any]:
    hint = get_type_hints(EncoderConfig)[field.name]
    return [kind for kind in (get_args(hint) or (hint,)) if kind is not type(None)]


def _value_type(field: Field[Any]) -> Any:
    return _field_types(field)[0]


def _is_list(field: Field[Any]) -> bool:
    return bool(get_args(_value_type(field)))


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _parse_list(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        flag = name.replace("_", "-")
        raise ConfigError(f"--{flag} takes whole numbers separated by commas, not {text!r}.") from None


def _named_by_field(values: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON's settings under their field names; `EncoderConfig.from_dict` checks names and double entries."""
    EncoderConfig.from_dict(values)
    return {VLLM_ALIASES.get(key, key): value for key, value in values.items()}


def _read_json(text: str) -> dict[str, Any]:
    source = text if text.lstrip().startswith("{") else _read_file(Path(text))
    try:
        values = json.loads(source)
    except ValueError as error:
        raise ConfigError(f"--compilation-config is not valid JSON: {error}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--compilation-config must be a JSON object, not {type(values).__name__}.")
    return values


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--compilation-config is neither a JSON object nor a readable file: {path} ({error.strerror})."
        ) from None
