"""The parts of the generic backend: forms of call, refusals, shadows, recorded functions, offsets, leaves."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import vitgraph
from vision_modules import ADDS_FRAMES, GRID_CASES, TILE_CASES, Case, randomize, tensors_of
from vitgraph.attention.base import Segments
from vitgraph.attention.sdpa import SdpaAttention
from vitgraph.config import EncoderConfig
from vitgraph.core import Grid
from vitgraph.errors import PatchError, UnsupportedModuleError
from vitgraph.integrations.transformers import attention_function as functions
from vitgraph.integrations.transformers.generic import (
    MOST_FORMS,
    PATIENCE,
    TOO_MANY_FORMS,
    GenericBackend,
    generic_backend,
    is_vision_module,
)
from vitgraph.integrations.transformers.host_reads import HostRead, UnreadGrid, our_own_code, refuse_host_reads
from vitgraph.integrations.transformers.leaves import OutputForm, find_leaves
from vitgraph.integrations.transformers.probe_tiles import tile_settings
from vitgraph.integrations.transformers.recorder import RecordedCall, record
from vitgraph.integrations.transformers.shadow import copied_bytes, shadow
from vitgraph.integrations.transformers.surroundings import made_on, unnoticed_capture

CONFIG = EncoderConfig(max_tokens=64, lazy=True)
CLIP = next(case for case in TILE_CASES if case.folder == "clip")
PIXIO = next(case for case in TILE_CASES if case.folder == "pixio")
IDEFICS = next(case for case in TILE_CASES if case.folder == "idefics3")
PADDLE = next(case for case in GRID_CASES if case.folder == "paddleocr_vl")
KIMI = next(case for case in GRID_CASES if case.folder == "kimi_k25")


def captured(case: Case, config: EncoderConfig = CONFIG) -> tuple[nn.Module, GenericBackend]:
    try:
        module = case.build()
    except ImportError as error:
        pytest.skip(str(error))
    backend = generic_backend(module, config)
    assert isinstance(backend, GenericBackend)
    return module, backend


def check(module: nn.Module, backend: GenericBackend, arguments: dict) -> None:
    assert backend.refuse(arguments) == ""
    with torch.no_grad():
        own = tensors_of(module(**arguments))
    found = tensors_of(backend.run(arguments))
    assert found.keys() == own.keys()
    for name, tensor in own.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=1e-4)


# -- forms of call ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("states", [True, -2, [0, -1]], ids=str)
def test_hidden_states_that_are_asked_for_are_returned(states: object) -> None:
    module, backend = captured(CLIP)
    check(module, backend, {**CLIP.arguments(module), "output_hidden_states": states})


def test_a_further_form_of_call_takes_the_place_of_the_oldest_once_it_came_often() -> None:
    module, backend = captured(CLIP)
    first = CLIP.arguments(module)
    for side in (28, 42, 70):
        pixels = torch.randn(2, 3, side, side)
        check(module, backend, {"pixel_values": pixels, "interpolate_pos_encoding": True})
    further = {**first, "output_hidden_states": True, "use_cache": False}
    assert [backend.refuse(further) for _ in range(PATIENCE - 1)] == [TOO_MANY_FORMS] * (PATIENCE - 1)
    check(module, backend, further)
    assert len(backend.engines) == MOST_FORMS
    assert backend.refuse(first) == TOO_MANY_FORMS


def test_an_argument_without_a_rule_runs_the_modules_own_forward() -> None:
    module, backend = captured(CLIP)
    arguments = CLIP.arguments(module)
    assert "'weights' is given" in backend.refuse({**arguments, "weights": torch.ones(2)})
    assert "no tensor" in backend.refuse({**arguments, "pixel_values": arguments["pixel_values"].int()})
    module, backend = captured(PADDLE)
    arguments = PADDLE.arguments(module)
    assert "'attention_mask' is given" in backend.refuse({**arguments, "attention_mask": torch.ones(1)})
    assert "no tensor of sizes" in backend.refuse({**arguments, "grid_thw": None})


def test_an_argument_that_says_what_its_default_says_is_no_other_form() -> None:
    module, backend = captured(CLIP)
    arguments = CLIP.arguments(module)
    for other in ({"interpolate_pos_encoding": False}, {"output_attentions": None}, {"unknown": False}, {}):
        check(module, backend, {**arguments, **other})
    assert len(backend.engines) == 1
    check(module, backend, {**arguments, "interpolate_pos_encoding": True})
    assert len(backend.engines) == 2


def test_pictures_of_a_size_that_the_module_refuses_have_its_reason() -> None:
    module, backend = captured(CLIP)
    assert "doesn't match" in backend.refuse({"pixel_values": torch.randn(2, 3, 28, 28)})
    check(module, backend, CLIP.arguments(module))


def test_a_padded_picture_is_no_whole_picture() -> None:
    module, backend = captured(IDEFICS)
    arguments = IDEFICS.arguments(module)
    check(module, backend, arguments)
    arguments["patch_attention_mask"][1, :, -1] = False
    assert backend.refuse(arguments) == ""
    with pytest.raises(PatchError, match="padded"):
        backend.run(arguments)


def test_rows_and_grids_that_do_not_fit_are_left_to_the_module() -> None:
    module, backend = captured(PADDLE)
    arguments = PADDLE.arguments(module)
    pixels = arguments["pixel_values"]
    with pytest.raises(PatchError, match="rows for grids"):
        backend.run({**arguments, "pixel_values": pixels[:, 1:]})


@pytest.mark.skipif(ADDS_FRAMES, reason="the module takes clips of any length")
def test_clips_are_left_to_a_module_that_was_captured_on_images() -> None:
    _, backend = captured(KIMI)
    clip = {"pixel_values": torch.randn(32, 3, 14, 14), "grid_thw": torch.tensor([[2, 4, 4]])}
    assert backend.refuse(clip) == ""
    with pytest.raises(PatchError, match="temporal"):
        backend.run(clip)


@pytest.mark.skipif(not ADDS_FRAMES, reason="the module takes clips of one length alone")
def test_clips_whose_frames_are_added_have_as_many_tokens_as_frames_have_without_a_budget_too() -> None:
    module, backend = captured(KIMI, EncoderConfig(budgets=(4,), lazy=True))
    check(module, backend, KIMI.arguments(module))
    assert backend.stats.eager_packs > 0


def test_a_clip_that_no_budget_holds_is_cut_between_frames() -> None:
    module, backend = captured(PADDLE, EncoderConfig(budgets=(40,), max_frames=8, lazy=True))
    grids = torch.tensor([[5, 4, 4]])
    check(module, backend, {"pixel_values": torch.randn(1, 80, 3, 14, 14), "grid_thw": grids})
    assert backend.stats.split_items == 1 and not backend.stats.fallbacks


def test_weights_that_are_replaced_are_followed_and_none_are_copied() -> None:
    module, backend = captured(CLIP)
    arguments = CLIP.arguments(module)
    check(module, backend, arguments)
    randomize(module, 0.2)
    check(module, backend, arguments)
    for parameter in module.parameters():
        parameter.data = parameter.data.clone() * 0.5
    check(module, backend, arguments)
    tower = backend.engines[-1].tower
    assert backend.copied_bytes == 0 and not list(tower.parameters()) and not tower.state_dict()


def test_a_released_backend_refuses() -> None:
    module, backend = captured(CLIP)
    backend.release()
    assert backend.refuse(CLIP.arguments(module)) == "the backend was released"


def test_compile_is_refused_and_so_is_what_is_no_vision_module() -> None:
    with pytest.raises(UnsupportedModuleError, match="compile=True"):
        generic_backend(CLIP.build(), EncoderConfig(compile=True))
    with pytest.raises(UnsupportedModuleError, match="no vision module"):
        generic_backend(nn.Linear(2, 2), CONFIG)


def test_language_models_and_whole_models_are_no_vision_modules() -> None:
    from transformers import (
        CLIPConfig,
        CLIPModel,
        LlamaConfig,
        LlamaForCausalLM,
        LlamaModel,
        VisionEncoderDecoderModel,
    )

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaModel(LlamaConfig(**small, vocab_size=16))
    clip = CLIPModel(CLIPConfig(text_config={**small, "vocab_size": 16}, vision_config=small))
    assert not is_vision_module(llama) and not is_vision_module(clip) and not is_vision_module(clip.text_model)
    assert [name for name, m in clip.named_modules() if is_vision_module(m)] == ["vision_model"]
    pair = VisionEncoderDecoderModel(encoder=clip.vision_model, decoder=LlamaForCausalLM(llama.config))
    assert not is_vision_module(pair) and is_vision_module(pair.encoder)


def test_budgets_in_pictures_follow_the_tokens_of_a_picture() -> None:
    assert tile_settings(EncoderConfig(max_tokens=4096), 256).budgets == (1, 2, 3, 4, 6, 8, 12, 16)
    assert tile_settings(EncoderConfig(max_tokens=4096), 4096).budgets == (1, 2, 3, 4, 6, 8)
    assert tile_settings(EncoderConfig(max_tokens=4096), 1).budgets[-1] == 64
    assert tile_settings(EncoderConfig(budgets=(100, 500)), 50).budgets == (2, 10)


# -- what a graph cannot hold ----------------------------------------------------------------------------------

X = torch.arange(6.0).reshape(2, 3)
ELSEWHERE = torch.empty(2, 3, device="meta")
INDEX = torch.tensor([0, 1])


@pytest.mark.parametrize(
    "read, message",
    [
        (lambda: X.sum().item(), "reads a value back"),
        (lambda: X.tolist(), "reads a value back"),
        (lambda: bool((X > 1).all()), "reads a value back"),
        (lambda: int(X.max()), "reads a value back"),
        (lambda: range(X.max().long()), "reads a value back"),
        (lambda: X.numpy(), "reads a value back"),
        (lambda: X.cpu(), "reads a value back"),
        (lambda: X.nonzero(), "shape from values"),
        (lambda: X[X > 1], "a mask as an index"),
        (lambda: torch.masked_select(X, X > 1), "shape from values"),
        (lambda: torch.unique(X), "shape from values"),
        (lambda: torch.repeat_interleave(X[0], X[0].long()), "shape from values"),
        (lambda: torch.tensor([1, 2], device=X.device), "copies a value from the host"),
        (lambda: torch.tensor([1, 2]).to(X.device), "copies between host and device"),
        (lambda: (torch.tensor([1, 2])[None] * 2).type_as(X), "copies between host and device"),
        (lambda: X[:, torch.tensor([1, 2])], "copies between host and device"),
        (lambda: X.clone().copy_(torch.tensor([1, 2, 3])), "copies between host and device"),
        (lambda: X.clone().copy_(torch.tensor(1)), "copies between host and device"),
        (lambda: ELSEWHERE[:, INDEX], "copies between host and device"),
    ],
)  # fmt: skip
def test_what_a_capture_would_refuse_is_refused_without_a_gpu(read: Callable[[], object], message: str) -> None:
    with pytest.raises(HostRead, match=message) as refused, refuse_host_reads():
        read()
    assert "test_generic_parts.py" in str(refused.value)
    read()


def test_the_line_is_found_where_folders_are_named_as_libraries(tmp_path: Path) -> None:
    space: dict = {}
    file = tmp_path / "torch" / "vitgraph" / "own.py"
    exec(compile("def fail(x):\n    return x.item()", str(file), "exec"), space)
    with pytest.raises(HostRead, match=r"in fail \(own.py:2\)"), refuse_host_reads():
        space["fail"](X)


def test_what_a_capture_can_hold_is_not_refused() -> None:
    with refuse_host_reads():
        index = torch.argsort(X[0])
        made = torch.where(X > 1, X, 0)[:, index] + torch.arange(3, device=X.device)
        made = made.masked_fill(made > 2, 0.0).to(torch.float64)
        torch.repeat_interleave(X, 2, dim=0)
        X * torch.tensor(0.5) + torch.as_tensor(X).to(X.device)
        X.clone()[0] = torch.tensor(2.0)
        torch.tensor([1, 2]).to(torch.float64)[torch.tensor([0])]
        with our_own_code():
            assert X.sum().item() == 15.0
    assert made.shape == X.shape


def test_the_stand_in_for_sizes_raises_when_it_is_read() -> None:
    sizes = UnreadGrid("grid_thw")
    part = sizes[:, 0]
    assert isinstance(sizes, Tensor)
    for read in (lambda: part.tolist(), lambda: len(sizes), lambda: sizes.shape, lambda: part * 2, lambda: int(part)):
        with pytest.raises(HostRead, match="reads the sizes of its items"):
            read()


# -- shadows and recordings ------------------------------------------------------------------------------------


def test_a_shadow_shares_weights_and_leaves_the_module_alone() -> None:
    module = CLIP.build()
    implementation = module.config._attn_implementation
    module.train()
    module.register_forward_hook(lambda *_: 1 / 0)
    twin = shadow(module, functions.with_attention("another"))
    assert type(twin) is type(module) and not twin.training and module.training
    own, others = dict(module.named_parameters()), dict(twin.named_parameters())
    assert own.keys() == others.keys() and all(own[name] is others[name] for name in own)
    assert module.config._attn_implementation == implementation
    assert {m.config._attn_implementation for m in twin.modules() if hasattr(m, "config")} == {"another"}
    weight = nn.Parameter(torch.zeros(3))
    next(m for m in module.modules() if isinstance(m, nn.LayerNorm)).weight = weight
    assert next(m for m in twin.modules() if isinstance(m, nn.LayerNorm)).weight is weight


def test_calls_of_other_threads_and_other_sizes_are_not_recorded_as_ours() -> None:
    module, sizes = PADDLE.build(), torch.tensor([[1, 4, 4]])
    space = vars(sys.modules[type(module).__module__])
    before = dict(space)
    arguments = {"pixel_values": torch.randn(1, 16, 3, 14, 14), "grid_thw": sizes}
    with record(module, sizes) as calls, torch.no_grad():
        other = threading.Thread(target=lambda: module(**arguments))
        other.start()
        other.join()
        assert calls == []
        module(**arguments)
        assert {call.name for call in calls} >= {"get_vision_position_ids", "get_vision_attention_seqlens"}
        with pytest.raises(UnsupportedModuleError, match="other sizes"):
            space["get_vision_position_ids"](sizes * 2, 1, kwargs={})
        with pytest.raises(UnsupportedModuleError, match="without kwargs"):
            space["get_vision_position_ids"](sizes, 1)
    assert dict(space) == before


def test_several_values_under_one_keyword_are_told_apart() -> None:
    def get_vision_parts(grid_thw: Tensor, kwargs: dict) -> tuple[Tensor, int]:
        assert kwargs.pop("parts", None) is None
        return grid_thw.prod(-1), int(grid_thw[:, 0].sum())

    parts = RecordedCall(get_vision_parts, {}, "grid_thw").compute(torch.tensor([[3, 2, 2], [1, 4, 4]]))
    assert list(parts) == ["parts[0]", "parts[1]"]
    assert parts["parts[0]"].tolist() == [12, 16] and len(parts["parts[1]"]) == 4


# -- attention -------------------------------------------------------------------------------------------------


def offsets(longest: int = 7) -> functions.SegmentOffsets:
    ends = torch.tensor([0, 3, 5, 5], dtype=torch.int32)
    return functions.carry(ends, Segments(ends, longest, (3, 2, 0)), SdpaAttention())


def test_offsets_know_their_longest_segment_and_nothing_else_is_special() -> None:
    cu = offsets()
    with refuse_host_reads():
        assert (cu[1:] - cu[:-1]).max().item() == 7
        assert type(cu[1:] * 2) is Tensor and type(cu.to(torch.int64)) is Tensor
        with pytest.raises(HostRead):
            cu[-1].item()
    assert torch.equal(cu[1:] - cu[:-1], torch.tensor([3, 2, 0], dtype=torch.int32))


def test_attention_equals_torchs_per_segment_and_zeros_the_rest() -> None:
    q, k, v = torch.randn(3, 1, 2, 8, 4)
    out, weights = functions.attend(nn.Identity(), q, k, v, None, scaling=0.5, cu_seq_lens_q=offsets())
    assert out.shape == (1, 8, 2, 4) and weights is None
    for start, end in ((0, 3), (3, 5)):
        one = slice(start, end)
        own = nn.functional.scaled_dot_product_attention(q[:, :, one], k[:, :, one], v[:, :, one], scale=0.5)
        torch.testing.assert_close(out[:, one], own.transpose(1, 2))
    assert not out[:, 5:].any()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"attention_mask": torch.ones(1)}, "attention_mask"),
        ({"is_causal": True}, "is_causal"),
        ({"sliding_window": 4}, "sliding_window"),
        ({"dropout": 0.1}, "dropout"),
        ({"cu_seq_lens_q": torch.tensor([0, 8])}, "other segments"),
        ({"key": torch.randn(1, 1, 8, 4)}, "three alike"),
    ],
)
def test_attention_that_packing_lacks_is_refused(change: dict, message: str) -> None:
    q = torch.randn(1, 2, 8, 4)
    given = {"query": q, "key": q, "value": q, "cu_seq_lens_q": offsets(), **change}
    with pytest.raises(UnsupportedModuleError, match=message):
        functions.attend(nn.Identity(), **given)


# -- outputs ---------------------------------------------------------------------------------------------------


def test_leaves_are_found_flattened_and_put_together_again() -> None:
    def output(patches: int) -> dict:
        hidden = torch.randn(1, patches, 6)
        return {
            "hidden": hidden,
            "first": hidden[:, 0],
            "same": hidden,
            "maps": [torch.randn(patches // 4, 2, 3), None],
        }

    totals = [{"patch": n, "token": n // 4, "item": 1} for n in (8, 16)]
    outputs = [output(8), output(16)]
    form = OutputForm(outputs[0])
    assert form.names == ("hidden", "maps[0]") and form.fields == ("hidden", "maps", "first", "same")
    leaves = find_leaves(form, outputs, totals)
    assert [(leaf.rows, leaf.spec.levels, leaf.spec.width) for leaf in leaves] == [("patch", 1, 6), ("token", 1, 6)]
    packed = [leaf.pack(tensor) for leaf, tensor in zip(leaves, form.flatten(outputs[1]), strict=True)]
    built = form.build([leaf.unpack(tensor) for leaf, tensor in zip(leaves, packed, strict=True)])
    assert built.keys() == outputs[1].keys() and built["maps"][1] is None
    for name, tensor in tensors_of(outputs[1]).items():
        assert torch.equal(tensors_of(built)[name], tensor)


@pytest.mark.parametrize(
    "outputs, message",
    [
        ([torch.randn(1, 6), torch.randn(1, 6)], "one axis that grows"),
        ([torch.randn(7, 6), torch.randn(15, 6)], "7 rows for 8 patches"),
    ],
)
def test_an_output_that_does_not_grow_with_its_items_is_refused(outputs: list[Tensor], message: str) -> None:
    totals = [{"patch": n, "token": n // 4, "item": 1} for n in (8, 16)]
    with pytest.raises(UnsupportedModuleError, match=message):
        find_leaves(OutputForm(outputs[0]), outputs, totals)


def test_another_form_and_whole_numbers_are_refused() -> None:
    form = OutputForm((torch.randn(2, 3), None))
    with pytest.raises(UnsupportedModuleError, match="form that changes"):
        form.flatten((torch.randn(2, 3), torch.randn(2, 3)))
    with pytest.raises(UnsupportedModuleError, match="floating point"):
        OutputForm([torch.arange(3)])


def test_a_pack_of_every_item_has_the_metadata_of_the_modules_functions() -> None:
    _, backend = captured(PADDLE)
    tower = backend.engines[-1].tower
    assert tower.spec.counts(Grid(2, 4, 6))["segment"] == 2
    assert tower.metadata(Grid(2, 4, 6))["cu_seqlens"].tolist() == [24, 48]


# -- what a capture finds around it ----------------------------------------------------------------------------


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch says that a CUDA graph is captured."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


def test_a_captured_forward_is_the_one_that_runs_outside_of_captures(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Transformers takes other ways when it notices a capture: Pixio resamples its table of positions."""
    resampled = []
    resample = nn.functional.interpolate
    monkeypatch.setattr(nn.functional, "interpolate", lambda *a, **k: resampled.append(1) or resample(*a, **k))
    module, backend = captured(PIXIO)
    arguments = PIXIO.arguments(module, pictures=3)
    expected = tensors_of(backend.run(arguments))
    request.getfixturevalue("capturing")
    found = tensors_of(backend.run(arguments))
    assert backend.engines[0].tower.captures_begun == 1
    assert not resampled and all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    with torch.no_grad():
        module(**arguments)
    assert resampled, "Transformers takes no other way: this test shows nothing"


def test_other_threads_notice_their_captures(capturing: None) -> None:
    from transformers.utils import import_utils

    seen = []
    asked = import_utils.is_cuda_stream_capturing
    with unnoticed_capture():
        assert not import_utils.is_cuda_stream_capturing()
        other = threading.Thread(target=lambda: seen.append(import_utils.is_cuda_stream_capturing()))
        other.start()
        other.join()
    assert seen == [True] and import_utils.is_cuda_stream_capturing is asked


def test_tensors_without_a_value_of_the_host_are_made_on_the_device() -> None:
    meta = torch.device("meta")
    with made_on(meta):
        assert torch.arange(3).device == torch.zeros(2).device == meta
        assert torch.arange(3, device="cpu").device == torch.tensor([1]).device == torch.device("cpu")
        with our_own_code():
            assert torch.zeros(2).device == torch.device("cpu")
    assert torch.arange(3).device == torch.device("cpu")


def test_a_shadow_has_copies_of_what_stayed_on_the_host_beside_the_weights() -> None:
    module = nn.Linear(2, 3, device="meta")
    module.table = torch.ones(4, 5)
    twin = shadow(module)
    assert twin.table.device == torch.device("meta") and module.table.device == torch.device("cpu")
    assert copied_bytes(module, twin) == 80


def test_a_capture_that_fails_runs_the_modules_own_forward_and_is_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = CLIP.build()
    arguments = CLIP.arguments(module)
    with torch.no_grad():
        own = tensors_of(module(**arguments))
        vitgraph.accelerate(module, CONFIG)
        backend = module.forward.backend
        (engine,) = backend.engines

        def broken(*_: object) -> None:
            backend._tower(engine).captures_begun += 1
            try:
                raise RuntimeError("operation not permitted")
            finally:
                raise RuntimeError("a capture that was broken off")

        monkeypatch.setattr(engine, "run", broken)
        for _ in range(2):
            found = tensors_of(module(**arguments))
            assert all(torch.equal(found[name], tensor) for name, tensor in own.items())
    (report,) = vitgraph.acceleration(module).modules.values()
    ((reason, times),) = report.fallbacks.items()
    assert reason.startswith("its capture fails in broken") and "operation not permitted" in reason
    assert (report.calls, times) == (0, 2) and caplog.text.count(reason) == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("of a replay")], ids=str)
def test_an_error_that_is_no_failed_capture_is_the_callers(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    module, backend = captured(CLIP)
    (engine,) = backend.engines
    backend._tower(engine).captures_begun += isinstance(error, torch.OutOfMemoryError)

    def failing(*_: object) -> None:
        raise error

    monkeypatch.setattr(engine, "run", failing)
    with pytest.raises(type(error), match=str(error)):
        backend.run(CLIP.arguments(module))
