"""Our packed attention under a name in Transformers' attention registry, and offsets that carry their segments.

Transformers' towers hand `cu_seqlens` through every layer to the attention function. Ours come as a tensor subclass
that also carries the `Segments` they stand for, so that no global state says which forward is running.

Shapes: T rows, H heads, Dh head dim, S segments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vitgraph.attention.base import Segments, VarlenAttention
from vitgraph.errors import UnsupportedModuleError
from vitgraph.integrations.transformers.host_reads import our_own_code
from vitgraph.integrations.transformers.shadow import own_config

ATTENTION_NAME = "vitgraph_flash_varlen"
"""Contains "flash": towers then pass packed rows with offsets instead of splitting them on the host."""

WHOLE_NAME = "vitgraph_whole_pictures"
"""Torch's own attention without the mask that Transformers would build, for pictures without padding: to build it,
Transformers reads the padding back."""

NEUTRAL = (None, False, 0, 0.0)
HEAD_STEP, LARGEST_HEAD = 8, 256
KNOWN = frozenset({"cu_seq_lens_k", "max_length_q", "max_length_k", "position_ids", "position_embeddings"})
REFUSED = ("attention_mask", "dropout", "is_causal", "sliding_window", "softcap", "s_aux")


class SegmentOffsets(Tensor):
    """`cu_seqlens` `[S + 1]` that knows its segments. Every operation on it gives ordinary tensors, except those that
    lead to the longest segment: `(x[1:] - x[:-1]).max().item()` is the bound that the host already knows.

    Attributes:
        segments: what the offsets stand for.
        attention: backend that runs over them.
        step: how far an expression has come towards the longest segment; "" for the offsets themselves.
    """

    segments: Segments
    attention: VarlenAttention
    step: str = ""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        source = next((a for a in args if isinstance(a, cls)), None)
        step = _next_step(func, args) if source is not None else ""
        if step == "longest on the host":
            assert source is not None
            return source.segments.max_seqlen
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*(_plain(a) for a in args), **{k: _plain(v) for k, v in (kwargs or {}).items()})
        if step and source is not None:
            return _tag(result, source.segments, source.attention, step)
        return result


def carry(offsets: Tensor, segments: Segments, attention: VarlenAttention) -> SegmentOffsets:
    """The same memory as `offsets`, as a tensor that carries its segments."""
    return _tag(offsets, segments, attention, "")


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as Transformers calls it.

    Args:
        module: the attention layer; not read.
        query, key, value: `[1, H, T, Dh]`.
        attention_mask: must be None.
        scaling: of the scores; default `Dh ** -0.5`.
        cu_seq_lens_q: offsets from `carry`.
        others: what Transformers passes to flash attention; must ask for nothing that packed attention lacks.

    Returns:
        `[1, T, H, Dh]`, and None for the weights.

    Raises:
        UnsupportedModuleError: for anything but unmasked self-attention over these segments.
    """
    if not isinstance(cu_seq_lens_q, SegmentOffsets) or cu_seq_lens_q.step:
        raise UnsupportedModuleError("its attention runs over other segments than the offsets that it is given")
    asked = [name for name in REFUSED if _asks({"attention_mask": attention_mask, **others}.get(name))]
    if asked:
        raise UnsupportedModuleError(f"its attention asks for {', '.join(asked)}")
    if query.shape != key.shape or query.shape != value.shape or query.shape[0] != 1:
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise UnsupportedModuleError(f"its queries, keys and values are {shapes}; expected three alike, [1, H, T, Dh]")
    head = query.shape[-1]
    attention = cu_seq_lens_q.attention
    if attention.name != "sdpa" and (head % HEAD_STEP or head > LARGEST_HEAD):
        raise UnsupportedModuleError(
            f"its heads are {head} wide; attention={attention.name!r} needs a multiple of {HEAD_STEP}, "
            f"at most {LARGEST_HEAD}"
        )
    # Some towers rotate in float32 and leave q and k there.
    q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
    if attention.name != "sdpa":
        q, k, v = (x if x.stride(-1) == 1 and x.stride(1) == head else x.contiguous() for x in (q, k, v))
    with our_own_code():
        out = attention(q, k, v, cu_seq_lens_q.segments, head**-0.5 if scaling is None else scaling)
    return out.unsqueeze(0), None


def no_mask(*args: Any, **kwargs: Any) -> None:
    """The mask that Transformers builds for our attention: none, since segments say it all."""


def register() -> None:
    """Enters `attend` into Transformers' registries; doing it again changes nothing."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, no_mask)
    ALL_ATTENTION_FUNCTIONS.register(WHOLE_NAME, sdpa_attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(WHOLE_NAME, no_mask)


def with_attention(name: str) -> Callable[[Any], Any]:
    """A function that makes an `own_config` with this attention. The setter would ask for it in its parts, too."""

    def configure(config: Any) -> Any:
        own = own_config(config)
        own.__dict__["_attn_implementation_internal"] = name
        return own

    return configure


def _asks(value: Any) -> bool:
    return isinstance(value, Tensor) or value not in NEUTRAL


def _tag(tensor: Tensor, segments: Segments, attention: VarlenAttention, step: str) -> SegmentOffsets:
    tagged = tensor.as_subclass(SegmentOffsets)
    tagged.segments, tagged.attention, tagged.step = segments, attention, step
    return tagged


def _plain(value: Any) -> Any:
    return value.as_subclass(Tensor) if isinstance(value, SegmentOffsets) else value


def _next_step(func: Any, args: Any) -> str:
    """How far this call brings the expression `(x[1:] - x[:-1]).max().item()`; "" when it is none of it."""
    name = getattr(func, "__name__", "")
    first = args[0]
    if name == "__getitem__" and first.step == "" and args[1] in (slice(1, None), slice(None, -1)):
        return "ends" if args[1] == slice(1, None) else "starts"
    steps = tuple(getattr(a, "step", None) for a in args)
    if name in ("sub", "__sub__") and steps == ("ends", "starts"):
        return "lengths"
    if name == "max" and steps == ("lengths",):
        return "longest"
    return "longest on the host" if name == "item" and steps == ("longest",) else ""
