"""Reading and checking the settings of processors: shared by their `from_hf` and `__post_init__`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vitgraph.errors import ConfigError
from vitgraph.preprocess.normalize import Triple

Json = Mapping[str, Any]


def pixel_bounds(config: Json) -> tuple[int | None, int | None]:
    """Smallest and largest area of a Qwen-type config, None where it does not say.

    Files give `min_pixels` and `max_pixels`, or a `size` with `shortest_edge` and `longest_edge`, which mean
    areas here despite their names, or a `size` with `min_pixels` and `max_pixels`. The first form takes
    precedence.
    """
    size = config.get("size") or {}
    if not isinstance(size, Mapping):
        raise ConfigError(
            f"size is {size!r} in the preprocessor config; expected an object with shortest_edge and longest_edge."
        )
    known = {"shortest_edge", "longest_edge", "min_pixels", "max_pixels"}
    unknown = sorted(name for name, value in size.items() if name not in known and value is not None)
    if unknown:
        raise ConfigError(f"size has {unknown} in the preprocessor config; expected some of {sorted(known)}.")
    low, high = config.get("min_pixels"), config.get("max_pixels")
    return (
        first(size, "shortest_edge", "min_pixels") if low is None else low,
        first(size, "longest_edge", "max_pixels") if high is None else high,
    )


def triples(config: Json, **renames: str) -> dict[str, Triple]:
    """Values per channel under the names of `renames`; a single number stands for all channels."""
    found: dict[str, Triple] = {}
    for key, name in renames.items():
        value = config.get(key)
        if isinstance(value, (int, float)):
            value = (value,) * 3
        if value is not None:
            found[name] = tuple(float(channel) for channel in value)  # type: ignore[assignment]
    return found


def side(value: Any) -> int | None:
    """One side of a kernel that may be given as a number or as two equal ones."""
    if isinstance(value, (list, tuple)):
        if len(set(value)) != 1:
            raise ConfigError(f"merge_kernel_size is {value!r}; expected two equal numbers.")
        return int(value[0])
    return None if value is None else int(value)


def first(config: Json, *names: str) -> Any:
    """The first of these keys that has a value."""
    return next((config[name] for name in names if config.get(name) is not None), None)


def check_positive(settings: Any, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ConfigError(f"{name} is {value!r}; expected a positive number.")


def check_order(settings: Any, low: str, high: str) -> None:
    if getattr(settings, low) > getattr(settings, high):
        raise ConfigError(f"{low}={getattr(settings, low)} is above {high}={getattr(settings, high)}.")


def check_triples(settings: Any, *names: str, positive: bool = False) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is None and name.startswith("video"):
            continue
        if not isinstance(value, tuple) or len(value) != 3 or (positive and min(value) <= 0):
            kind = "three positive numbers" if positive else "three numbers"
            raise ConfigError(f"{name} is {value!r}; expected a tuple of {kind}, one per channel.")


def check_choice(settings: Any, name: str, choices: tuple[Any, ...]) -> None:
    if getattr(settings, name) not in choices:
        raise ConfigError(f"{name} is {getattr(settings, name)!r}; expected one of {list(choices)}.")
