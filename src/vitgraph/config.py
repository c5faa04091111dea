"""Settings of an encoder: one frozen dataclass, every default visible here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from vitgraph.errors import ConfigError

ATTENTION_NAMES = ("auto", "triton", "fa3", "fa4", "varlen", "sdpa")

VLLM_ALIASES = {
    "cudagraph_mm_encoder": "graph",
    "compile_mm_encoder": "compile",
    "encoder_cudagraph_token_budgets": "budgets",
    "encoder_cudagraph_max_vision_items_per_batch": "max_items",
    "encoder_cudagraph_max_frames_per_batch": "max_frames",
    "encoder_cudagraph_verbose": "verbose",
}
"""Names that the field uses for the same settings -> names of `EncoderConfig`."""


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class EncoderConfig:
    """How an encoder plans, captures and replays. Command-line flags are made from these fields.

    Raises:
        ConfigError: on construction, when a value is out of range.
    """

    graph: bool = _setting(True, "Replay captured CUDA graphs (on the CPU: the same padded static buffers).")
    compile: bool = _setting(False, "Compile the tower's block with torch.compile before capture.")
    budgets: tuple[int, ...] | None = _setting(
        None, "Token budgets to capture, in output tokens. Default: a fine ladder from min_tokens to max_tokens."
    )
    min_tokens: int = _setting(32, "Smallest budget of the default ladder, in output tokens.")
    max_tokens: int = _setting(4096, "Largest budget of the default ladder, in output tokens.")
    max_items: int | None = _setting(
        None, "Most items (images or clips) in one pack. Default: one per 16 tokens of the budget, at most 128."
    )
    max_frames: int | None = _setting(
        None, "Most temporal patches in one pack, over all its items. Default: as max_items, at least 8."
    )
    attention: str = _setting("auto", f"Attention backend: one of {', '.join(ATTENTION_NAMES)}.")
    lazy: bool = _setting(False, "Capture each budget when it is used instead of all of them up front.")
    lazy_after: int = _setting(1, "With lazy: the use of a budget that captures it; earlier ones run without a graph.")
    strict: bool = _setting(False, "Raise instead of running without a graph when a pack cannot use one.")
    memory_limit: int | None = _setting(
        None, "Capture the smallest budgets first, and no more once graphs hold this many bytes of device memory."
    )
    measure: bool = _setting(True, "Time the budgets after capture, and plan packs by predicted time.")
    metadata_cache: int = _setting(4096, "Grids whose metadata stays cached on the host.")
    preprocess_threads: int | None = _setting(
        None, "Threads that decode and resize the inputs of one call. Default: one per core, at most 8."
    )
    verbose: bool = _setting(False, "Log time and memory of every captured budget, and every pack.")

    def __post_init__(self) -> None:
        if self.budgets is not None:
            object.__setattr__(self, "budgets", _clean_budgets(self.budgets))
        for name in ("min_tokens", "max_tokens", "metadata_cache", "lazy_after"):
            _require_positive(name, getattr(self, name))
        for name in ("max_items", "max_frames", "memory_limit", "preprocess_threads"):
            if getattr(self, name) is not None:
                _require_positive(name, getattr(self, name))
        if self.min_tokens > self.max_tokens:
            raise ConfigError(
                f"min_tokens={self.min_tokens} is larger than max_tokens={self.max_tokens}; "
                "give a range that grows, or list the budgets explicitly."
            )
        if self.attention not in ATTENTION_NAMES:
            raise ConfigError(f"unknown attention {self.attention!r}; known: {', '.join(ATTENTION_NAMES)}.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EncoderConfig:
        """Builds a config from plain values, for example a parsed vLLM-style compilation-config JSON.

        Field names and the aliases of `VLLM_ALIASES` are accepted.

        Raises:
            ConfigError: for an unknown name (the known ones are listed) or a setting given twice.
        """
        known = {f.name for f in fields(cls)}
        settings: dict[str, Any] = {}
        for key, value in values.items():
            name = VLLM_ALIASES.get(key, key)
            if name not in known:
                raise ConfigError(
                    f"unknown setting {key!r}; known: {', '.join(sorted(known))}; "
                    f"aliases: {', '.join(sorted(VLLM_ALIASES))}."
                )
            if name in settings:
                raise ConfigError(f"{name!r} is given twice ({key!r} is an alias of it); give it once.")
            settings[name] = value
        return cls(**settings)


def _clean_budgets(budgets: Any) -> tuple[int, ...] | None:
    try:
        values = tuple(budgets)
    except TypeError:
        raise ConfigError(f"budgets must be a list of token counts, not {budgets!r}.") from None
    if not values:
        # vLLM writes an empty list for "choose for me".
        return None
    for value in values:
        _require_positive("budgets", value)
    return tuple(sorted({int(v) for v in values}))


def _require_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ConfigError(f"{name} must be a positive whole number, not {value!r}.")
