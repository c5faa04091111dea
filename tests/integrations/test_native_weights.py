"""The native tower uses the module's own weights: shared where the layout is the same, followed when they change."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import vitgraph
from tiny_transformers import IMAGES, MODELS, NAMES, randomise, tower_inputs, vision_module
from vitgraph import EncoderConfig
from vitgraph.errors import UnsupportedModuleError
from vitgraph.models.qwen3_vl import Qwen3VLTower

CONFIG = EncoderConfig(max_tokens=64)
COPIED = {
    "qwen2_5_omni": r"attn\.[qkv]\.",
    "glm4v": r"downsample\.weight",
    "glm4v_moe": r"downsample\.weight",
    "glm_ocr": r"downsample\.weight",
    "kimi_k25": r"attn\.[qkv]_proj\.",
    "internvl": r"attention\.[qkv]_proj\.",
}
"""Families whose towers lay out some weights differently, and which."""


def accelerated(name: str, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """A model, accelerated, and its vision module."""
    model = vitgraph.accelerate(MODELS[name].make(seed), CONFIG, backend="native")
    return model, vision_module(model)


def both(tower: nn.Module, name: str, device_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """`last_hidden_state` of the accelerated tower and of its own forward."""
    inputs = tower_inputs(name, IMAGES)
    inputs = {key: v.to(device_dtype) if v.is_floating_point() else v for key, v in inputs.items()}
    with torch.no_grad():
        outputs = tower(**inputs), tower.forward.original(**inputs)
    fast, own = ((o.pooler_output if o.pooler_output is not None else o.last_hidden_state) for o in outputs)
    return fast, own


def check(tower: nn.Module, name: str, calls: int) -> Tensor:
    """The tower agrees with its own forward, by a call of the backend; returns the result."""
    fast, own = both(tower, name)
    assert ((fast - own).norm() / own.norm()).item() < 1e-5
    (report,) = vitgraph.acceleration(tower).modules.values()
    assert report.calls == calls and not report.fallbacks
    return fast


@pytest.mark.parametrize("name", NAMES)
def test_all_memory_is_shared_but_what_is_reported_as_copied(name: str) -> None:
    _, tower = accelerated(name)
    own = {p.untyped_storage().data_ptr(): n for n, p in tower.named_parameters()}
    copies = 0
    shared = set()
    for parameter in tower.forward.backend._engine.tower.parameters():
        assert not parameter.requires_grad
        if parameter.untyped_storage().data_ptr() in own:
            shared.add(own[parameter.untyped_storage().data_ptr()])
        else:
            copies += parameter.nbytes
    assert vitgraph.acceleration(tower).copied_bytes == copies
    pattern = COPIED.get(name, "nothing")
    apart = {n: p for n, p in tower.named_parameters() if re.search(pattern, n)}
    assert shared == {n for n, _ in tower.named_parameters()} - set(apart)
    assert copies == sum(p.nbytes for p in apart.values()) and bool(copies) is (name in COPIED)


STEPS = {"plain": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


@pytest.mark.parametrize("name", ["qwen3_vl", *COPIED])
@pytest.mark.parametrize("step", STEPS)
def test_weights_that_change_in_place_are_seen_by_the_next_call(name: str, step: str) -> None:
    _, tower = accelerated(name)
    first = check(tower, name, calls=1)
    tower.load_state_dict(vision_module(MODELS[name].make(seed=1)).state_dict())
    second = check(tower, name, calls=2)
    for parameter in tower.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(tower.parameters(), lr=0.01, **STEPS[step]).step()
    third = check(tower, name, calls=3)
    randomise(tower, seed=2)
    fourth = check(tower, name, calls=4)
    results = (first, second, third, fourth)
    assert all(not torch.allclose(a, b, rtol=1e-3) for a, b in pairwise(results))


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad])
def test_every_step_of_a_fused_optimiser_is_seen(optimizer: type[torch.optim.Optimizer]) -> None:
    """They write weights without raising their version counters."""
    _, tower = accelerated("internvl")
    check(tower, "internvl", calls=1)
    stepping = optimizer(tower.parameters(), lr=0.01, fused=True)
    for calls in (2, 3):
        for parameter in tower.parameters():
            parameter.grad = torch.ones_like(parameter)
        stepping.step()
        check(tower, "internvl", calls)


@pytest.mark.parametrize("name", ["qwen3_vl", "internvl"])
def test_one_changed_tensor_is_enough(name: str) -> None:
    _, tower = accelerated(name)
    check(tower, name, calls=1)
    calls = 1
    for _, parameter in list(tower.named_parameters())[:: 3 if name == "internvl" else 7]:
        with torch.no_grad():
            parameter.mul_(1.5)
        calls += 1
        check(tower, name, calls)


@pytest.mark.parametrize("name", ["qwen3_vl", "glm4v"])
def test_a_cast_model_gets_a_tower_of_that_dtype(name: str) -> None:
    model, tower = accelerated(name)
    check(tower, name, calls=1)
    model.to(torch.bfloat16)
    fast, own = both(tower, name, torch.bfloat16)
    assert fast.dtype == own.dtype == torch.bfloat16
    assert ((fast.float() - own.float()).norm() / own.float().norm()).item() < 0.05
    model.to(torch.float32)
    # The module's own rotary frequencies went through bfloat16 with it, and stay rounded.
    fast, own = both(tower, name)
    assert ((fast - own).norm() / own.norm()).item() < 1e-3
    assert not vitgraph.acceleration(model).fallbacks


def test_replaced_parameters_and_data_are_seen() -> None:
    _, tower = accelerated("qwen2_5_vl")
    check(tower, "qwen2_5_vl", calls=1)
    linear = tower.blocks[0].mlp.gate_proj
    linear.weight = nn.Parameter(2 * linear.weight.detach())
    check(tower, "qwen2_5_vl", calls=2)
    linear.weight.data = 2 * linear.weight.data
    check(tower, "qwen2_5_vl", calls=3)
    other = vision_module(MODELS["qwen2_5_vl"].make(seed=3))
    tower.blocks[1].mlp = other.blocks[1].mlp
    check(tower, "qwen2_5_vl", calls=4)
    tower.blocks[2].register_forward_hook(lambda *_: None)
    both(tower, "qwen2_5_vl")
    assert list(vitgraph.acceleration(tower).fallbacks) == ["a forward hook is registered inside the module"]


def test_a_hook_in_a_module_that_was_put_in_later_is_seen() -> None:
    _, tower = accelerated("qwen2_vl")
    tower.blocks[1] = vision_module(MODELS["qwen2_vl"].make(seed=3)).blocks[1]
    tower.blocks[1].mlp.register_forward_hook(lambda *_: None)
    both(tower, "qwen2_vl")
    assert list(vitgraph.acceleration(tower).fallbacks) == ["a forward hook is registered inside the module"]


class Adapter(nn.Module):
    """A Linear with a low-rank update beside it, as adapters put it in the Linear's place."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base_layer = linear
        self.low = nn.Linear(linear.in_features, 2, bias=False)
        self.high = nn.Linear(2, linear.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.high(self.low(x))


def test_an_adapter_inside_is_refused_and_its_removal_seen() -> None:
    model, tower = accelerated("qwen3_vl")
    mlp = tower.blocks[0].mlp
    linear, mlp.linear_fc1 = mlp.linear_fc1, Adapter(mlp.linear_fc1)
    fast, own = both(tower, "qwen3_vl")
    assert torch.equal(fast, own)
    ((reason, _),) = vitgraph.acceleration(model).fallbacks.items()
    assert "blocks.0.mlp.linear_fc1.weight" in reason
    mlp.linear_fc1 = linear
    both(tower, "qwen3_vl")
    (report,) = vitgraph.acceleration(model).modules.values()
    assert (report.calls, sum(report.fallbacks.values())) == (1, 1)


def test_a_cast_of_one_parameter_is_refused_and_counted() -> None:
    _, tower = accelerated("qwen3_vl")
    tower.merger.linear_fc2.weight.data = tower.merger.linear_fc2.weight.data.double()
    assert not vitgraph.acceleration(tower).fallbacks
    with torch.no_grad(), pytest.raises(RuntimeError):  # the module's own error
        tower(**tower_inputs("qwen3_vl", IMAGES))
    assert list(vitgraph.acceleration(tower).fallbacks) == [
        "its weights are of several kinds: torch.float32, torch.float64"
    ]


def change(name: str, **values: object):
    def apply(tower: nn.Module) -> None:
        for key, value in values.items():
            setattr(tower.config, key, value)

    apply.__name__ = name
    return apply


def add_parameter(tower: nn.Module) -> None:
    tower.blocks[0].register_parameter("scale", nn.Parameter(torch.ones(1)))


def cut_parameter(tower: nn.Module) -> None:
    tower.merger.linear_fc2.weight = nn.Parameter(torch.zeros(3, 256))


def remove_parameter(tower: nn.Module) -> None:
    tower.merger.linear_fc2.bias = None


@pytest.mark.parametrize(
    "spoil, text",
    [
        (lambda tower: tower.double(), "its weights are torch.float64; expected one of"),
        (lambda tower: tower.blocks.to("meta"), "meta device"),
        (lambda tower: tower.blocks.bfloat16(), "several kinds: torch.bfloat16, torch.float32"),
        (change("activation", hidden_act="silu"), "hidden_act='silu' in its config; the tower has 'gelu_pytorch_tanh'"),
        (change("rope", rope_parameters={"rope_type": "axial", "rope_theta": 5e5}), "rope_theta=500000.0"),
        (change("patch", patch_size=8), "expected"),
        (change("size", patch_size=[16, 16]), "its config is not one that the tower reads"),
        (add_parameter, r"does not know: blocks.0.scale"),
        (cut_parameter, r"merger.linear_fc2.weight is \(3, 256\); expected \(48, 256\)"),
        (remove_parameter, "it lacks merger.linear_fc2.bias"),
    ],
)
def test_what_the_tower_cannot_be_is_refused_with_the_reason(spoil, text: str) -> None:
    model = MODELS["qwen3_vl"].make()
    spoil(vision_module(model))
    with pytest.raises(UnsupportedModuleError, match=text):
        vitgraph.accelerate(model, CONFIG, backend="native")
    assert "forward" not in vision_module(model).__dict__


def test_weights_made_under_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        model = MODELS["qwen3_vl"].make()
    with pytest.raises(UnsupportedModuleError, match="inference_mode"):
        vitgraph.accelerate(model, CONFIG, backend="native")


def change_norm(tower: nn.Module) -> None:
    tower.blocks[0].norm1.eps = 1.0


def change_rotary(tower: nn.Module) -> None:
    tower.rotary_pos_emb.inv_freq *= 3


@pytest.mark.parametrize("first", ["finite", "NaN"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spoil", [change_rotary, change_norm])
def test_a_tower_that_differs_from_its_module_is_found_out_by_the_first_finite_call(
    spoil, dtype: torch.dtype, first: str, caplog
) -> None:
    model = MODELS["qwen3_vl"].make(dtype=dtype)
    tower = vision_module(model)
    spoil(tower)
    vitgraph.accelerate(model, CONFIG, backend="native")
    if first == "NaN":
        inputs = tower_inputs("qwen3_vl", IMAGES[:1])
        with torch.no_grad():
            tower(**{**inputs, "hidden_states": torch.full_like(inputs["hidden_states"], float("nan"))})
    for _ in range(2):
        fast, own = both(tower, "qwen3_vl", dtype)
        assert torch.equal(fast, own)
    ((reason, times),) = vitgraph.acceleration(model).fallbacks.items()
    assert "differs from the module's own by" in reason and times == 2
    assert len(caplog.records) == 1
    (report,) = vitgraph.acceleration(model).modules.values()
    assert report.memory_bytes == 0, "what was held for the tower is given back"
    tower.load_state_dict(tower.state_dict(), assign=True)
    both(tower, "qwen3_vl", dtype)
    assert sum(vitgraph.acceleration(model).fallbacks.values()) == 3, "weights that move bring a new tower, judged anew"


def test_a_tower_that_makes_no_number_of_a_number_is_found_out(monkeypatch) -> None:
    model, tower = accelerated("qwen3_vl")
    monkeypatch.setattr(Qwen3VLTower, "forward", lambda *args, _own=Qwen3VLTower.forward: _own(*args) * float("nan"))
    fast, own = both(tower, "qwen3_vl")
    assert torch.equal(fast, own) and own.isfinite().all()
    assert "differs from the module's own by nan" in next(iter(vitgraph.acceleration(model).fallbacks))


def test_values_that_are_not_finite_are_not_judged() -> None:
    _, tower = accelerated("qwen3_vl")
    inputs = tower_inputs("qwen3_vl", IMAGES)
    inputs["hidden_states"][:24] = float("nan")
    with torch.no_grad():
        assert tower(**inputs).pooler_output[:6].isnan().all()
    assert not tower.forward.backend._agrees
    check(tower, "qwen3_vl", calls=2)
    assert tower.forward.backend._agrees
