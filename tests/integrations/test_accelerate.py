"""accelerate, restore, accelerated and acceleration: what they find, change, put back and report."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import vitgraph
from tiny_transformers import IMAGES, MODELS, generate, prompt, tower_inputs, vision_module
from vitgraph import EncoderConfig
from vitgraph.errors import ConfigError, EngineReleasedError, MissingExtraError, UnsupportedModuleError
from vitgraph.integrations.transformers import install, version

NAME = "qwen3_vl"
CONFIG = EncoderConfig(max_tokens=64)


@pytest.fixture
def model() -> nn.Module:
    return MODELS[NAME].make()


def everything(model: nn.Module) -> dict[str, object]:
    """All that a model is made of, by identity: attributes, parameters, buffers, hooks, forward."""
    parts: dict[str, object] = {"names": [name for name, _ in model.named_modules()]}
    for name, module in model.named_modules():
        parts[name] = {
            key: dict(value) if isinstance(value, dict) else id(value) for key, value in module.__dict__.items()
        }
        parts[name + " forward"] = module.forward
    parts["state"] = [(key, value.data_ptr()) for key, value in model.state_dict().items()]
    parts["parameters"] = [id(p) for p in model.parameters()]
    return parts


def encode(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return vision_module(model)(**tower_inputs(NAME, IMAGES)).pooler_output


def test_nothing_of_the_model_changes_but_one_forward(model: nn.Module) -> None:
    before = everything(model)
    assert vitgraph.accelerate(model, CONFIG) is model
    encode(model)
    during = everything(model)
    different = {key for key in before if before[key] != during[key]}
    assert different == {"model.visual", "model.visual forward"}
    assert set(during["model.visual"]) - set(before["model.visual"]) == {"forward"}
    assert vitgraph.restore(model) is model
    assert everything(model) == before


def test_restore_brings_back_a_forward_that_was_replaced_before(model: nn.Module) -> None:
    tower = vision_module(model)
    calls = []
    plain = tower.forward
    tower.forward = mine = lambda *args, **kwargs: calls.append(1) or plain(*args, **kwargs)
    vitgraph.accelerate(model, CONFIG)
    encode(model)
    assert not calls
    vitgraph.restore(model)
    assert tower.__dict__["forward"] is mine
    encode(model)
    assert calls == [1]


def test_restore_finds_a_forward_that_accelerates_hooks_keep(model: nn.Module) -> None:
    """Hugging Face's accelerate keeps the forward that it replaces in `_old_forward`."""
    vitgraph.accelerate(model, CONFIG)
    tower = vision_module(model)
    tower._old_forward = tower.forward
    tower.forward = lambda *args, **kwargs: tower._old_forward(*args, **kwargs)
    want = encode(model)
    vitgraph.restore(model)
    torch.testing.assert_close(encode(model), want, rtol=1e-4, atol=1e-5)
    assert tower._old_forward.__func__ is type(tower).forward


def test_a_forward_that_someone_kept_still_works_after_restore(model: nn.Module) -> None:
    vitgraph.accelerate(model, CONFIG)
    kept, want = vision_module(model).forward, encode(model)
    vitgraph.restore(model)
    with torch.no_grad():
        torch.testing.assert_close(kept(**tower_inputs(NAME, IMAGES)).pooler_output, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(EngineReleasedError):
        kept.backend.run(tower_inputs(NAME, IMAGES))


def test_restore_of_a_model_that_is_not_accelerated_does_nothing(model: nn.Module) -> None:
    before = everything(model)
    vitgraph.restore(vitgraph.restore(model))
    assert everything(model) == before
    assert str(vitgraph.acceleration(model)) == "not accelerated"
    assert vitgraph.acceleration(model).modules == {}


def test_accelerating_twice(model: nn.Module) -> None:
    vitgraph.accelerate(model, CONFIG)
    forward = vision_module(model).forward
    vitgraph.accelerate(model, EncoderConfig(max_tokens=64))
    vitgraph.accelerate(model.model, CONFIG)
    assert vision_module(model).forward is forward
    for settings in ({"config": EncoderConfig(max_tokens=32)}, {}, {"config": CONFIG, "backend": "native"}):
        with pytest.raises(ConfigError, match=r"model.visual is accelerated already, with other settings; .*restore"):
            vitgraph.accelerate(model, **settings)
    assert vision_module(model).forward is forward


def test_the_default_captures_on_the_second_use(model: nn.Module) -> None:
    vitgraph.accelerate(model)
    config = vision_module(model).forward.config
    assert (config.lazy, config.lazy_after) == (True, 2)


def test_a_bare_vision_module(model: nn.Module) -> None:
    tower = vision_module(model)
    want = encode(model)
    assert vitgraph.accelerate(tower, CONFIG) is tower
    torch.testing.assert_close(encode(model), want, rtol=1e-4, atol=1e-5)
    assert list(vitgraph.acceleration(tower).modules) == ["Qwen3VLVisionModel"]
    assert list(vitgraph.acceleration(model).modules) == ["model.visual"]


def test_the_context_restores_also_after_an_error(model: nn.Module) -> None:
    before = everything(model)
    with pytest.raises(RuntimeError, match="mine"), vitgraph.accelerated(model, CONFIG) as same:
        assert same is model and vitgraph.acceleration(model).modules["model.visual"].backend == "native"
        raise RuntimeError("mine")
    assert everything(model) == before


def test_the_context_leaves_an_acceleration_that_was_there(model: nn.Module) -> None:
    vitgraph.accelerate(model, CONFIG)
    with vitgraph.accelerated(model, CONFIG):
        encode(model)
    assert vitgraph.acceleration(model).modules["model.visual"].calls == 1
    encode(model)
    assert vitgraph.acceleration(model).modules["model.visual"].calls == 2


def test_two_models_do_not_mix() -> None:
    models = [MODELS[NAME].make(seed) for seed in (0, 1)]
    want = [encode(model) for model in models]
    for model in models:
        vitgraph.accelerate(model, CONFIG)
    for _ in range(2):
        for model, reference in zip(models, want, strict=True):
            torch.testing.assert_close(encode(model), reference, rtol=1e-4, atol=1e-5)
    vitgraph.restore(models[0])
    encode(models[0]), encode(models[1])
    assert vitgraph.acceleration(models[1]).modules["model.visual"].calls == 3


def test_threads_share_an_accelerated_model(model: nn.Module) -> None:
    inputs = [tower_inputs(NAME, IMAGES[: 1 + seed % 3], seed) for seed in range(12)]
    tower = vision_module(model)

    def run(one: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return tower(**one).pooler_output

    want = [run(one) for one in inputs]
    vitgraph.accelerate(model, CONFIG)
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(run, inputs * 3))
    for a, b in zip(got, want * 3, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert vitgraph.acceleration(model).modules["model.visual"].calls == 36


def test_restoring_in_another_thread_breaks_no_call(model: nn.Module) -> None:
    want = encode(model)
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            vitgraph.accelerate(model, CONFIG)
            calls = [pool.submit(encode, model) for _ in range(6)]
            vitgraph.restore(model)
            for call in calls:
                torch.testing.assert_close(call.result(), want, rtol=1e-4, atol=1e-5)


def test_pixels_of_another_dtype_are_cast_as_before() -> None:
    model = MODELS[NAME].make(dtype=torch.bfloat16)
    want = encode(model)
    vitgraph.accelerate(model, CONFIG)
    got = encode(model)
    assert got.dtype == want.dtype == torch.bfloat16
    assert ((got - want).float().norm() / want.float().norm()).item() < 0.05
    assert vitgraph.acceleration(model).fallbacks == {}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_is_a_plain_model(model: nn.Module, duplicate) -> None:
    inputs = prompt(NAME, IMAGES)
    want = generate(model, inputs)
    vitgraph.accelerate(model, CONFIG)
    twin = duplicate(model)
    tower = vision_module(twin)
    assert vitgraph.acceleration(twin).modules == {}
    assert tower.forward.__self__ is tower is not vision_module(model)
    assert generate(twin, inputs) == want
    vitgraph.accelerate(twin, CONFIG)
    assert generate(twin, inputs) == want
    assert vitgraph.acceleration(twin).modules["model.visual"].calls == 1


def test_an_accelerated_model_is_saved_as_it_is(model: nn.Module, tmp_path: Path) -> None:
    inputs = prompt(NAME, IMAGES)
    vitgraph.accelerate(model, CONFIG)
    want = generate(model, inputs)
    model.save_pretrained(tmp_path)
    assert generate(type(model).from_pretrained(tmp_path).eval(), inputs) == want


def test_a_model_that_goes_takes_everything_with_it() -> None:
    model = vitgraph.accelerate(MODELS[NAME].make(), CONFIG)
    encode(model)
    backend = weakref.ref(vision_module(model).forward.backend)
    del model
    gc.collect()
    assert backend() is None


# -- what cannot be accelerated --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "native"])
def test_a_model_without_a_vision_module_says_what_was_looked_for(backend: str) -> None:
    text = MODELS[NAME].make().model.language_model
    with pytest.raises(UnsupportedModuleError, match=r"Qwen3VLTextModel has no vision module .* Qwen3VLVisionModel, "):
        vitgraph.accelerate(text, backend=backend)


def test_an_unknown_backend(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match="unknown backend 'fast'; known: auto, native, generic"):
        vitgraph.accelerate(model, backend="fast")


def test_settings_that_the_device_cannot_meet(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match="attention='triton' needs CUDA"):
        vitgraph.accelerate(model, EncoderConfig(attention="triton"))
    assert "forward" not in vision_module(model).__dict__


def test_auto_tries_native_then_generic_then_leaves_the_module(model: nn.Module, monkeypatch, caplog) -> None:
    tower = vision_module(model)
    tried = []

    def backend(kind: str):
        def make(module: nn.Module, config: EncoderConfig) -> None:
            tried.append((kind, module, config))
            raise UnsupportedModuleError(f"not {kind}")

        return make

    monkeypatch.setattr(install, "_backend", backend)
    with caplog.at_level(logging.WARNING, logger="vitgraph"):
        assert vitgraph.accelerate(model, CONFIG) is model
    assert tried == [("native", tower, CONFIG), ("generic", tower, CONFIG)]
    assert "forward" not in tower.__dict__
    report = vitgraph.acceleration(model).modules["model.visual"]
    assert (report.backend, report.reason) == ("", "native: not native; generic: not generic")
    assert "left unchanged: native: not native" in str(vitgraph.acceleration(model))
    assert [r.message for r in caplog.records] == [
        f"model.visual (Qwen3VLVisionModel) is left unchanged: {report.reason}"
    ]
    with pytest.raises(UnsupportedModuleError, match=r"backend='generic' cannot run model.visual .*not generic"):
        vitgraph.accelerate(model, CONFIG, backend="generic")
    vitgraph.restore(model)
    assert vitgraph.acceleration(model).modules == {}


def test_the_context_forgets_the_modules_that_it_left_unchanged(model: nn.Module) -> None:
    vision_module(model).double()
    with vitgraph.accelerated(model, CONFIG):
        assert vitgraph.acceleration(model).modules["model.visual"].reason
    assert vitgraph.acceleration(model).modules == {}
    vitgraph.accelerate(model, CONFIG)
    with vitgraph.accelerated(model, CONFIG):
        pass
    assert vitgraph.acceleration(model).modules["model.visual"].reason, "of the call before the block"


def test_a_missing_transformers_names_the_extra(model: nn.Module, monkeypatch) -> None:
    monkeypatch.setattr(version, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'vitgraph\[transformers\]'"):
        vitgraph.accelerate(model)


def test_an_old_transformers_is_refused_with_both_versions(model: nn.Module, monkeypatch) -> None:
    import transformers

    monkeypatch.setattr(transformers, "__version__", "5.16.1")
    with pytest.raises(UnsupportedModuleError, match=r"transformers 5.16.1 is installed; .* needs 5.17 or newer"):
        vitgraph.accelerate(model)
    for fine in ("5.17.0.dev0", "5.17.0", "6.0"):
        monkeypatch.setattr(transformers, "__version__", fine)
        version.require_transformers()


def test_the_extra_asks_for_the_oldest_version_that_works() -> None:
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'transformers = ["transformers>={version.OLDEST}"]' in text


def test_importing_the_names_loads_neither_transformers_nor_a_backend() -> None:
    code = "import vitgraph, sys; vitgraph.accelerate; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "vitgraph.integrations.transformers.install" in loaded
    assert not {"transformers", "vitgraph.integrations.transformers.native"}.intersection(loaded)


# -- the handle ------------------------------------------------------------------------------------------------


def test_the_report_is_a_table_with_the_reasons_below(model: nn.Module) -> None:
    vitgraph.accelerate(model, EncoderConfig(budgets=(16,)))
    encode(model)
    vision_module(model)(**tower_inputs(NAME, IMAGES))
    with torch.no_grad():
        vision_module(model)(**tower_inputs(NAME, [(1, 8, 16)]))
    lines = str(vitgraph.acceleration(model)).splitlines()
    assert lines[0].split()[:6] == ["module", "class", "backend", "calls", "fallbacks", "graphs"]
    assert lines[1].split()[:5] == ["model.visual", "Qwen3VLVisionModel", "native", "2", "1"]
    assert lines[2].startswith("model.visual: 1 x own forward: gradients are recorded")
    assert lines[3] == "model.visual: 1 x no graph: larger than the largest budget in patch+token"


def test_the_handle_counts_memory(model: nn.Module) -> None:
    vitgraph.accelerate(model, CONFIG)
    handle = vitgraph.acceleration(model)
    assert handle.modules["model.visual"].memory_bytes == 0
    encode(model)
    report = vitgraph.acceleration(model).modules["model.visual"]
    # Rows, tokens with two deepstack maps, and last_hidden_state of the largest budget, in fp32.
    buffers = 4 * (256 * 1536 + 64 * 3 * 48 + 256 * 64)
    assert 0 <= report.memory_bytes - buffers < 40_000  # metadata
    assert (handle.copied_bytes, handle.fallbacks) == (0, {})
    assert report.stats.items == 3


def test_capture_on_the_cpu_does_nothing_and_does_not_fail(model: nn.Module, capsys) -> None:
    vitgraph.accelerate(model, CONFIG)
    for progress in (True, False):
        vitgraph.acceleration(model).capture(progress)
    assert vitgraph.acceleration(model).modules["model.visual"].stats.captured_graphs == 0
    assert capsys.readouterr().out == ""
