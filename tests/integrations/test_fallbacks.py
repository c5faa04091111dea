"""Every reason for which a call runs the module's own forward: same result, counted, logged once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitgraph
from tiny_transformers import IMAGES, MODELS, prompt, tower_inputs, vision_module
from vision_modules import TILE_CASES
from vitgraph import EncoderConfig
from vitgraph.errors import FallbackError
from vitgraph.integrations.transformers.fallbacks import COMPILING

NAME = "qwen3_vl"
CONFIG = EncoderConfig(max_tokens=64)
Inputs = dict[str, Any]


@pytest.fixture(scope="module")
def shared() -> nn.Module:
    return MODELS[NAME].make()


@pytest.fixture
def tower(shared: nn.Module) -> Iterator[nn.Module]:
    vitgraph.accelerate(shared, CONFIG, backend="native")
    yield vision_module(shared)
    vitgraph.restore(shared)
    shared.eval().requires_grad_(True)


class Ask:
    """What a caller does that needs the module's own forward.

    Args:
        reason: that is counted.
        prepare: changes the accelerated tower.
        around: the mode of the call.
        arguments: beside rows and grids.
    """

    def __init__(
        self,
        reason: str,
        prepare: Callable[[nn.Module], object] = lambda tower: None,
        around: Callable[[], AbstractContextManager[Any]] = torch.no_grad,
        **arguments: Any,
    ) -> None:
        self.reason, self.prepare, self.around, self.arguments = reason, prepare, around, arguments


def checkpointing(tower: nn.Module) -> None:
    tower.train().gradient_checkpointing = True


def eager(tower: nn.Module) -> None:
    tower.config._attn_implementation = "eager"


def output_flag(tower: nn.Module) -> None:
    eager(tower)
    tower.config.output_attentions = True


@contextmanager
def autocast() -> Iterator[None]:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        yield


class Hook:
    """Stands for one of accelerate's hooks."""

    offload, io_same_device = False, False

    def __init__(self, name: str = "AlignDevicesHook", **values: bool) -> None:
        self.__class__ = type(name, (Hook,), values)


def hooked(*args: str, **values: bool) -> Callable[[nn.Module], None]:
    return lambda tower: tower.__dict__.update(_hf_hook=Hook(*args, **values))


ASKS = {
    "training": Ask("training mode", nn.Module.train),
    "checkpointing": Ask("training mode with gradient checkpointing", checkpointing),
    "parameters need gradients": Ask("gradients are recorded", around=nullcontext),
    "pixels need gradients": Ask(
        "gradients are recorded",
        lambda tower: tower.requires_grad_(False),
        nullcontext,
        hidden_states=tower_inputs(NAME, IMAGES)["hidden_states"].requires_grad_(),
    ),
    "autocast": Ask("autocast is on", around=autocast),
    "hidden states": Ask("output_hidden_states is asked for", output_hidden_states=True),
    "attentions": Ask("output_attentions is asked for", eager, output_attentions=True),
    "attentions by config": Ask("output_attentions is asked for", output_flag),
    "a hook inside": Ask(
        "a forward hook is registered inside the module",
        lambda tower: tower.blocks[1].register_forward_hook(lambda *_: None),
    ),
    "a hook before": Ask(
        "a forward hook is registered inside the module",
        lambda tower: tower.blocks[0].mlp.register_forward_pre_hook(lambda *_: None),
    ),
    "a forward inside": Ask(
        "Qwen3VLVisionMLP inside the module has a forward of its own",
        lambda tower: setattr(tower.blocks[0].mlp, "forward", tower.blocks[0].mlp.forward),
    ),
    "an offload": Ask("accelerate offloads the module's weights", hooked(offload=True)),
    "outputs moved back": Ask("accelerate returns outputs on the caller's device", hooked(io_same_device=True)),
    "another hook": Ask("accelerate's CpuOffload is installed on the module", hooked("CpuOffload")),
    "metadata of the caller": Ask("argument 'cu_seqlens' is given", cu_seqlens=torch.tensor([0, 24, 28, 60])),
    "rows of another number": Ask(
        "rows and grids do not fit the tower", hidden_states=torch.randn(60, 1536), grid_thw=torch.tensor([[1, 7, 8]])
    ),
}


@pytest.fixture(params=ASKS, ids=str)
def ask(request, tower: nn.Module) -> Iterator[Ask]:
    kept = {name: dict(vars(m)) for name, m in tower.named_modules()}
    yield ASKS[request.param]
    tower.config.output_attentions = False
    tower.config._attn_implementation = "sdpa"
    for name, module in tower.named_modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            hooks.clear()
        for key in set(vars(module)) - set(kept[name]):
            del module.__dict__[key]
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False


@pytest.fixture(params=["native", "generic"])
def refusing(request) -> tuple[nn.Module, nn.Module]:
    """A vision module, accelerated by each backend, and one as it is."""
    made = [vision_module(MODELS[NAME].make()) for _ in range(2)]
    return vitgraph.accelerate(made[0], CONFIG, backend=request.param), made[1]


def test_sizes_that_are_no_whole_numbers_have_the_modules_own_error(refusing) -> None:
    accelerated, plain = refusing
    inputs = tower_inputs(NAME, IMAGES)
    inputs["grid_thw"] = inputs["grid_thw"].float()
    with torch.no_grad(), pytest.raises((RuntimeError, TypeError)) as own:
        plain(**inputs)
    with torch.no_grad(), pytest.raises(own.type) as found:
        accelerated(**inputs)
    assert str(found.value) == str(own.value)
    assert list(vitgraph.acceleration(accelerated).fallbacks.values()) == [1]


def outcome(call: Callable[..., Any], inputs: Inputs, around: Callable[[], AbstractContextManager[Any]]) -> Any:
    with around():
        try:
            return call(**inputs).pooler_output
        except (RuntimeError, ValueError) as error:
            return str(error)


def test_the_modules_own_forward_runs(ask: Ask, tower: nn.Module, caplog) -> None:
    ask.prepare(tower)
    inputs = {**tower_inputs(NAME, IMAGES), **ask.arguments}
    own = tower.forward.original
    want = outcome(own, inputs, ask.around)
    with caplog.at_level(logging.WARNING, logger="vitgraph"):
        got = [outcome(tower, inputs, ask.around) for _ in range(3)]
    for one in got:
        assert torch.equal(one, want) if isinstance(want, Tensor) else one == want
    ((reason, times),) = vitgraph.acceleration(tower).fallbacks.items()
    assert reason.startswith(ask.reason) and times == 3
    assert [r.message for r in caplog.records if ask.reason in r.message] == [r.message for r in caplog.records]
    assert len(caplog.records) == 1
    assert next(iter(vitgraph.acceleration(tower).modules.values())).calls == 0


def test_strict_raises_instead(shared: nn.Module) -> None:
    tower = vision_module(shared)
    with vitgraph.accelerated(shared, EncoderConfig(strict=True)), pytest.raises(FallbackError, match="gradients are"):
        tower(**tower_inputs(NAME, IMAGES))


def test_hooks_that_transformers_leaves_behind_do_not_count(tower: nn.Module) -> None:
    inputs = tower_inputs(NAME, IMAGES)
    with torch.no_grad():
        assert len(tower(**inputs, output_hidden_states=True).hidden_states) == 4
        tower(**inputs)
    assert any(m._forward_hooks for m in tower.blocks)
    assert vitgraph.acceleration(tower).fallbacks == {"output_hidden_states is asked for": 1}


def test_hooks_on_the_module_itself_run(tower: nn.Module) -> None:
    seen: list[tuple[int, ...]] = []
    handle = tower.register_forward_hook(lambda module, args, output: seen.append(output.pooler_output.shape))
    with torch.no_grad():
        tower(**tower_inputs(NAME, IMAGES))
    handle.remove()
    assert seen == [(15, 48)] and not vitgraph.acceleration(tower).fallbacks


def test_frozen_weights_need_no_mode(tower: nn.Module) -> None:
    tower.requires_grad_(False)
    assert not tower(**tower_inputs(NAME, IMAGES)).pooler_output.requires_grad
    assert not vitgraph.acceleration(tower).fallbacks


def test_modes_may_alternate(tower: nn.Module) -> None:
    """Static buffers that are made in one mode are written in the others."""
    inputs = tower_inputs(NAME, IMAGES)
    outputs = []
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode, torch.no_grad):
        with mode():
            outputs.append(tower(**inputs).pooler_output)
    assert all(torch.equal(one, outputs[0]) for one in outputs)
    assert not vitgraph.acceleration(tower).fallbacks


def test_arguments_of_a_language_model_that_come_along_are_no_reason(tower: nn.Module) -> None:
    others = {
        "use_cache": True,
        "logits_to_keep": 1,
        "shift_labels": torch.zeros(1, 4),
        "is_causal": None,
        "cu_seqlens": None,
    }
    with torch.no_grad():
        tower(**tower_inputs(NAME, IMAGES), **others)
    assert not vitgraph.acceleration(tower).fallbacks


def test_a_call_that_does_not_bind_raises_as_before(tower: nn.Module) -> None:
    with pytest.raises(TypeError, match="grid_thw"):
        tower(torch.zeros(4, 1536))


def test_a_training_step_around_the_tower(shared: nn.Module) -> None:
    """Training runs the module's own forward; evaluation in between runs the tower."""
    inputs = prompt(NAME, IMAGES)
    with vitgraph.accelerated(shared, CONFIG):
        shared.train()
        shared(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients = [p.grad for p in vision_module(shared).parameters()]
        shared.eval()
        with torch.no_grad():
            shared(**inputs)
        (report,) = vitgraph.acceleration(shared).modules.values()
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert (report.calls, report.fallbacks) == (1, {"training mode": 1})
    shared.zero_grad()


def test_compiling_the_model_traces_its_own_forward(tower: nn.Module, caplog) -> None:
    inputs = tower_inputs(NAME, IMAGES)
    with torch.no_grad():
        want = tower.forward.original(**inputs).pooler_output
        compiled = torch.compile(tower, backend="eager")
        for _ in range(2):
            torch.testing.assert_close(compiled(**inputs).pooler_output, want)
    ((reason, _),) = vitgraph.acceleration(tower).fallbacks.items()
    assert "torch.compile" in reason
    assert len([r for r in caplog.records if "torch.compile" in r.message]) == 1
    torch._dynamo.reset()


def test_compiling_the_whole_model_traces_the_towers_own_forward(shared: nn.Module) -> None:
    inputs = prompt(NAME, IMAGES)
    with torch.no_grad():
        want = shared(**inputs).logits
        with vitgraph.accelerated(shared, CONFIG):
            compiled = torch.compile(shared, backend="eager")
            for _ in range(2):
                torch.testing.assert_close(compiled(**inputs).logits, want)
            (report,) = vitgraph.acceleration(shared).modules.values()
    assert report.calls == 0 and list(report.fallbacks) == [COMPILING]
    torch._dynamo.reset()


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_module_is_the_modules_own_forward(strict: bool) -> None:
    clip = next(case for case in TILE_CASES if case.folder == "clip")
    module = clip.build()
    inputs = clip.arguments(module, pictures=2)
    with torch.no_grad():
        want = module(**inputs).pooler_output
        vitgraph.accelerate(module, CONFIG)
        exported = torch.export.export(module, (), kwargs=inputs, strict=strict)
        torch.testing.assert_close(exported.module()(**inputs).pooler_output, want)
    assert list(vitgraph.acceleration(module).fallbacks) == [COMPILING]
    torch._dynamo.reset()
