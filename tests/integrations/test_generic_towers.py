"""Every vision module of the table against its own forward. The table itself is written with

PYTHONPATH=src python tests/integrations/test_generic_towers.py
"""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests"))

import vitgraph  # noqa: E402
from vision_modules import GRID_CASES, REFUSED_CASES, TILE_CASES, Case, tensors_of  # noqa: E402
from vitgraph.config import EncoderConfig  # noqa: E402
from vitgraph.core import Grid  # noqa: E402
from vitgraph.errors import UnsupportedModuleError  # noqa: E402
from vitgraph.integrations.transformers.generic import GenericBackend, generic_backend, is_vision_module  # noqa: E402
from vitgraph.integrations.transformers.module_tower import ModuleTower  # noqa: E402
from vitgraph.integrations.transformers.native import is_native_module  # noqa: E402
from vitgraph.integrations.transformers.native_families import NATIVE  # noqa: E402

transformers = pytest.importorskip("transformers")

SCRIPT = Path(__file__).resolve().relative_to(ROOT)
PAGE = ROOT / "docs" / "transformers_towers.md"
CONFIG = EncoderConfig(budgets=(20, 70, 100), max_items=8, max_frames=16, lazy=True)
PICTURE_CONFIG = EncoderConfig(max_tokens=64, lazy=True)
CAPTURED = [*GRID_CASES, *TILE_CASES]
NATIVE_FOLDERS = {row.module for row in NATIVE}


def build(case: Case) -> nn.Module:
    try:
        return case.build()
    except ImportError as error:
        pytest.skip(f"transformers {transformers.__version__}: {error}")


@cache
def captured(case: Case) -> tuple[nn.Module, GenericBackend]:
    module = build(case)
    backend = generic_backend(module, CONFIG if case.grids else PICTURE_CONFIG)
    assert isinstance(backend, GenericBackend)
    return module, backend


def run(backend: GenericBackend, arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    assert backend.refuse(arguments) == ""
    return tensors_of(backend.run(arguments))


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape and found[name].dtype == tensor.dtype, name
        bound = 2e-5 * max(float(tensor.abs().max()), 1.0)
        torch.testing.assert_close(found[name], tensor, atol=bound, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", CAPTURED, ids=str)
def test_packed_and_padded_outputs_equal_the_modules_own(case: Case) -> None:
    """Mixed sizes over several budgets, NaN in all padding, every field of the output, in its class."""
    module, backend = captured(case)
    arguments = case.arguments(module)
    with torch.no_grad():
        own = module(**arguments)
    run(backend, arguments)
    for engine in backend.engines:
        engine.poison_padding()
    assert backend.refuse(arguments) == ""
    output = backend.run(arguments)
    assert type(output) is type(own)
    assert_close(tensors_of(output), tensors_of(own))
    assert backend.stats.replays > 0 and not backend.stats.fallbacks
    assert backend.stats.padded_tokens > backend.stats.real_tokens


@pytest.mark.parametrize("case", GRID_CASES, ids=str)
def test_items_together_equal_items_one_by_one(case: Case) -> None:
    module, backend = captured(case)
    together = case.arguments(module, seed=1)
    pixels = next(iter(together))
    run(backend, together)
    with torch.no_grad():
        expected = []
        rows, start = together[pixels].flatten(0, 1) if case.batched else together[pixels], 0
        for grid in case.grids:
            own = rows[start : start + Grid(*grid).patches]
            start += Grid(*grid).patches
            alone = {pixels: own.unsqueeze(0) if case.batched else own, "grid_thw": torch.tensor([grid])}
            expected.append(run(backend, alone))
            assert_close(expected[-1], tensors_of(module(**alone)))


@pytest.mark.parametrize("case", [case for case in CAPTURED if case.folder not in NATIVE_FOLDERS], ids=str)
def test_accelerate_takes_the_module_and_restore_gives_it_back(case: Case) -> None:
    module = build(case)
    arguments = case.arguments(module, seed=2, pictures=3)
    with torch.no_grad():
        expected = tensors_of(module(**arguments))
        with vitgraph.accelerated(module, CONFIG if case.grids else PICTURE_CONFIG):
            assert_close(tensors_of(module(**arguments)), expected)
            (report,) = vitgraph.acceleration(module).modules.values()
            assert (report.backend, report.calls, report.fallbacks) == ("generic", 1, {})
            assert isinstance(module(**arguments, return_dict=False), tuple)
        restored = tensors_of(module(**arguments))
    assert "forward" not in module.__dict__
    assert all(torch.equal(restored[name], tensor) for name, tensor in expected.items())


RETURNING = [case for case in CAPTURED if case.folder in ("cohere_compass", "qwen3_vl", "clip", "idefics2", "siglip")]


@pytest.mark.parametrize("case", RETURNING, ids=str)
def test_a_module_that_returns_tuples_by_its_config_goes_on_to_do_so(case: Case) -> None:
    module = build(case)
    module.config.return_dict = False
    arguments = case.arguments(module, seed=2, pictures=3)
    with torch.no_grad():
        expected = module(**arguments)
        with vitgraph.accelerated(module, CONFIG if case.grids else PICTURE_CONFIG, backend="generic"):
            found = module(**arguments)
            (report,) = vitgraph.acceleration(module).modules.values()
    assert type(found) is type(expected) is tuple
    assert_close(tensors_of(found), tensors_of(expected))
    assert report.calls == 1 and not report.fallbacks and module.config.return_dict is False


@pytest.mark.parametrize("case", [GRID_CASES[0], GRID_CASES[2], GRID_CASES[9]], ids=str)
def test_hidden_states_of_packed_rows_are_returned(case: Case) -> None:
    module, backend = captured(case)
    arguments = {**case.arguments(module, seed=3), "output_hidden_states": True}
    with torch.no_grad():
        expected = tensors_of(module(**arguments))
    assert any(name.startswith("hidden_states") for name in expected)
    assert_close(run(backend, arguments), expected)


@pytest.mark.parametrize("case", REFUSED_CASES, ids=str)
def test_a_module_that_no_graph_can_hold_is_refused_with_the_reason(case: Case) -> None:
    module = build(case)
    before = module.config._attn_implementation, dict(vars(sys.modules[type(module).__module__]))
    with pytest.raises(UnsupportedModuleError, match=case.reason):
        generic_backend(module, CONFIG)
    after = module.config._attn_implementation, dict(vars(sys.modules[type(module).__module__]))
    assert before == after and "forward" not in module.__dict__


@pytest.mark.parametrize("case", [case for case in REFUSED_CASES if case.grids], ids=str)
def test_a_refused_module_runs_as_before(case: Case) -> None:
    refused, untouched = build(case), build(case)
    with pytest.raises(UnsupportedModuleError):
        generic_backend(refused, CONFIG)
    arguments = case.arguments(refused)
    with torch.no_grad():
        found, expected = tensors_of(refused(**arguments)), tensors_of(untouched(**arguments))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_at_least_twenty_modules_without_a_tower_of_ours_are_captured() -> None:
    names = [case for case in CAPTURED if not is_native_module(build(case))]
    assert len(names) >= 20


@pytest.mark.parametrize("case", [*CAPTURED, *REFUSED_CASES], ids=str)
def test_every_module_of_the_table_is_found_as_a_vision_module(case: Case) -> None:
    assert is_vision_module(captured(case)[0] if case in CAPTURED else build(case)) or case.reason


# -- the table in the documentation ----------------------------------------------------------------------------


def table() -> str:
    rows = [_row(case) for case in sorted([*CAPTURED, *REFUSED_CASES], key=str)]
    head = ("Model", "Class", "Runs", "Outputs", "Limits")
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ("---",) * 5, *rows])


def _row(case: Case) -> tuple[str, ...]:
    module = build(case)
    native = is_native_module(module)
    try:
        backend = generic_backend(module, CONFIG)
    except UnsupportedModuleError as error:
        reason = re.sub(r"(modeling_\w+\.py):\d+", r"\1", str(error)).replace("|", "\\|").replace("*", "\\*")
        kind = "native tower; not generic" if native else "own forward"
        return f"`{case.folder}`", f"`{case.name}`", kind, "", reason
    assert isinstance(backend, GenericBackend)
    tower = backend.engines[-1].tower
    assert isinstance(tower, ModuleTower)
    kind = ("native tower, or " if native else "") + (
        "packed patch rows" if tower.call.grid else "pictures of one size"
    )
    outputs = ", ".join(f"`{name}`" for name in tower.form.fields)
    limits = [case.limit] if case.limit else []
    limits += [f"Transformers {case.since} or newer"] if case.since else []
    return f"`{case.folder}`", f"`{case.name}`", kind, outputs, "; ".join(limits)


def _version(text: str) -> str:
    return re.search(r"Transformers (\d+\.\d+)", text).group(1)  # type: ignore[union-attr]


def test_the_table_equals_the_code() -> None:
    text = PAGE.read_text(encoding="utf-8")
    installed = ".".join(transformers.__version__.split(".")[:2])
    if _version(text) != installed:
        pytest.skip(f"the table was made with Transformers {_version(text)}, installed is {installed}")
    start, end = _region(text)
    assert text[start:end] == table(), f"{PAGE.name} is out of date; run `PYTHONPATH=src python {SCRIPT}`"


def _region(text: str) -> tuple[int, int]:
    begin = "<!-- begin: towers -->\n"
    start = text.index(begin) + len(begin)
    return start, text.index("\n<!-- end: towers -->", start - 1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    page = PAGE.read_text(encoding="utf-8")
    first, last = _region(page)
    PAGE.write_text(page[:first] + table() + page[last:], encoding="utf-8")
