"""Greedy tokens of a model in half precision before and after a change: equal, or apart within rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Inputs = dict[str, Tensor]
TOKENS = 8
ROUNDS = 3
"""The first may wait, the second capture; the third replays."""


def moved(inputs: Inputs, model: nn.Module) -> Inputs:
    """Arguments of a model in its dtype, on its device."""
    weight = next(model.parameters())
    return {k: v.to(weight.device, weight.dtype if v.is_floating_point() else None) for k, v in inputs.items()}


@torch.no_grad()
def logits_of(model: nn.Module, prompts: Sequence[Inputs]) -> Tensor:
    """Logits of every position of every prompt, one after another, in float32."""
    return torch.cat([model(**moved(one, model)).logits[0].float() for one in prompts])


def assert_tokens_follow(
    model: nn.Module, wide: nn.Module, prompts: Sequence[Inputs], change: Callable[[nn.Module], object]
) -> None:
    """Tokens are equal up to the first position at which the best logits lie within rounding, which is measured.

    Args:
        model: in half precision.
        wide: the same weights in float32.
        prompts: arguments of `generate`.
        change: of the model, which is to leave its tokens as they are.
    """
    rounding = (logits_of(model, prompts) - logits_of(wide, prompts)).abs().max()
    settings = {"max_new_tokens": TOKENS, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    inputs = [moved(one, model) for one in prompts]
    want = [model.generate(**one, **settings) for one in inputs]
    change(model)
    for _ in range(ROUNDS):
        for one, reference in zip(inputs, want, strict=True):
            got = model.generate(**one, **settings)
            start = one["input_ids"].shape[1]
            for step, logits in enumerate(reference.logits):
                a, b = (out.sequences[0, start + step].item() for out in (got, reference))
                if a != b:
                    # Two logits of two runs, each off by as much as the model itself is.
                    gap = logits[0, b].float() - logits[0, a].float()
                    assert gap < 4 * rounding, f"token {a} for {b}: {gap:.3f} apart, rounding {rounding:.3f}"
                    break
