"""Qwen2-VL, Qwen2.5-VL, Qwen3.5 and the Omni models: metadata, towers and checkpoints against Transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from families import composed, stacked
from references_qwen import REFERENCES, Qwen25OmniReference
from vitgraph import EncoderConfig, VisionEncoder
from vitgraph.attention.sdpa import SdpaAttention
from vitgraph.core import Grid, fits, sum_counts
from vitgraph.errors import CheckpointError, ConfigError
from vitgraph.models.contract import Tower
from vitgraph.models.qwen2_5_vl import WindowedSpec
from vitgraph.models.registry import find_family, get_family
from vitgraph.models.tiny import write_tiny_checkpoint

vision_utils = pytest.importorskip("transformers.vision_utils")

FAMILIES = list(REFERENCES)
AWKWARD = [
    [(1, 2, 2)],
    [(1, 2, 20)],
    [(1, 20, 2)],
    [(3, 6, 10)],
    [(1, 18, 34)],
    [(2, 8, 8)],
    [(1, 8, 8), (1, 8, 8)],
    [(1, 10, 18), (3, 2, 6), (1, 16, 16), (2, 10, 8), (1, 2, 2)],
]
LAYOUTS = [
    (name, index)
    for name in FAMILIES
    for index in range(len(get_family(name).layouts(get_family(name).parse_config(get_family(name).tiny()[0]))))
]


def tower_of(family: str) -> Tower:
    row = get_family(family)
    return row.build(row.parse_config(row.tiny()[0]), SdpaAttention())


def grids_of(sizes: list[tuple[int, int, int]]) -> list[Grid]:
    return [Grid(*size) for size in sizes]


def make(model: str | dict, **kwargs) -> VisionEncoder:
    return VisionEncoder.from_config(model, device="cpu", config=EncoderConfig(**{"max_tokens": 256, **kwargs}))


def pixels(encoder: VisionEncoder, grids: list[Grid]) -> torch.Tensor:
    return torch.randn(sum(g.patches for g in grids), encoder.spec.patch_width)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape
    return ((got - want).abs().max() / want.abs().max()).item()


def omni_config() -> dict:
    """Qwen2.5-Omni's config.json: the vision side lies one level deeper."""
    vision = get_family("qwen2_5_vl").tiny()[0]["vision_config"]
    thinker = {"model_type": "qwen2_5_omni_thinker", "vision_config": vision}
    return {"architectures": ["Qwen2_5OmniModel"], "model_type": "qwen2_5_omni", "thinker_config": thinker}


# -- metadata ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", AWKWARD, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_metadata_equals_transformers(family: str, sizes: list) -> None:
    tower = tower_of(family)
    grids, merge = grids_of(sizes), tower.spec.merge
    arrays, _ = composed(tower, grids)
    thw = torch.tensor(sizes)
    positions = vision_utils.get_vision_position_ids(thw, merge)
    want = {"cu_seqlens": vision_utils.get_vision_cu_seqlens(thw)}
    if family == "qwen2_5_vl":
        order, ends = vision_utils.get_vision_window_index(thw, merge, 112, 14)
        want |= {"window_index": order, "reverse_index": order.argsort(), "cu_window_seqlens": ends}
        positions = positions.unflatten(0, (-1, merge**2))[order].flatten(0, 1)
    if "interp_indices" in arrays:
        taps = vision_utils.get_vision_interpolation_indices_and_weights(thw, 8, "bilinear", True, merge)
        want |= dict(zip(("interp_indices", "interp_weights"), taps, strict=True))
    want["position_ids"] = positions
    assert set(arrays) == set(want)
    for name, values in want.items():
        np.testing.assert_array_equal(arrays[name], values.numpy(), err_msg=name)


@pytest.mark.parametrize("window_size", [28, 56, 84, 112])
def test_window_metadata_equals_transformers_for_other_window_sizes(window_size: int) -> None:
    row = get_family("qwen2_5_vl")
    config = row.tiny()[0]
    config["vision_config"]["window_size"] = window_size
    tower = row.build(row.parse_config(config), SdpaAttention())
    sizes = [(2, 10, 14), (1, 2, 18), (1, 24, 8)]
    arrays, counts = composed(tower, grids_of(sizes))
    order, ends = vision_utils.get_vision_window_index(torch.tensor(sizes), 2, window_size, 14)
    np.testing.assert_array_equal(arrays["window_index"], order.numpy())
    np.testing.assert_array_equal(arrays["cu_window_seqlens"], ends.numpy())
    assert counts["window"] == len(ends) - 1
    assert np.diff(ends).max() <= tower.spec.segments[1].max_length


def test_padded_window_orders_stay_permutations_that_undo_each_other() -> None:
    arrays, counts = composed(tower_of("qwen2_5_vl"), grids_of(AWKWARD[-1]), spare=13)
    forward, back = arrays["window_index"], arrays["reverse_index"]
    np.testing.assert_array_equal(forward[back], np.arange(len(forward)))
    np.testing.assert_array_equal(forward[counts["token"] :], np.arange(counts["token"], len(forward)))
    assert (arrays["cu_window_seqlens"][counts["window"] :] == counts["patch"]).all()


frames = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=12)


@settings(deadline=None, max_examples=300)
@given(frames, st.integers(1, 6), st.integers(0, 40), st.integers(0, 3))
def test_what_fits_in_tokens_and_segments_fits_in_windows(sizes, window: int, tokens: int, items: int) -> None:
    spec = WindowedSpec("x", ("image", "video"), 1, 2, 2, 1, buffers=(), window=window)
    total = sum_counts(spec.counts(Grid(t, 2 * h, 2 * w)) for t, h, w in sizes)
    capacity = spec.capacity(total["token"] + tokens, total["item"] + items, total["segment"])
    assert fits(total, capacity)


def test_the_window_bound_is_reached_by_strips() -> None:
    spec = tower_of("qwen2_5_vl").spec
    counts = {kind: 8 * n for kind, n in spec.counts(Grid(1, 2, 2 * 13)).items()}
    assert counts["window"] == spec.capacity(8 * 13, 8, 8)["window"]


# -- towers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tower_equals_transformers(family: str, mode: str) -> None:
    encoder = make(family)
    reference = REFERENCES[family](encoder.tower, get_family(family).tiny()[0])
    for sizes in AWKWARD:
        grids = grids_of(sizes)
        x = pixels(encoder, grids)
        got = stacked(encoder.encode_patches(x, grids, mode=mode))
        assert relative_error(got, reference(x, grids)) < 1e-5, sizes
    assert not encoder.stats.fallbacks


@pytest.mark.parametrize("family", FAMILIES)
def test_many_items_in_shared_packs_equal_transformers(family: str) -> None:
    encoder = make(family, max_items=16)
    reference = REFERENCES[family](encoder.tower, get_family(family).tiny()[0])
    grids = grids_of([size for sizes in AWKWARD for size in sizes])
    x = pixels(encoder, grids)
    assert len(encoder.plan(grids)) < 5
    encoder.encode_patches(x, grids)
    encoder.engine.poison_padding()
    assert relative_error(stacked(encoder.encode_patches(x, grids)), reference(x, grids)) < 1e-5


def test_omni_equals_transformers() -> None:
    encoder = make(omni_config())
    reference = Qwen25OmniReference(encoder.tower, omni_config())
    grids = grids_of(AWKWARD[-1])
    x = pixels(encoder, grids)
    assert relative_error(stacked(encoder.encode_patches(x, grids)), reference(x, grids)) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_clip_cut_between_frames_gives_the_same_tokens(family: str) -> None:
    encoder = make(family, budgets=(40,))
    grids = grids_of([(7, 10, 6)])
    x = pixels(encoder, grids)
    got = stacked(encoder.encode_patches(x, grids))
    assert encoder.stats.split_items == 1
    assert relative_error(got, stacked(encoder.encode_patches(x, grids, mode="eager"))) < 1e-5


def test_full_and_window_layers_both_matter() -> None:
    grids = grids_of([(1, 18, 34)])
    outputs = []
    for full in ([1, 3], [1], [0, 1, 2, 3]):
        config = get_family("qwen2_5_vl").tiny()[0]
        config["vision_config"]["fullatt_block_indexes"] = full
        encoder = make(config)
        torch.manual_seed(0)
        outputs.append(stacked(encoder.encode_patches(pixels(encoder, grids), grids)))
    assert relative_error(outputs[1], outputs[0]) > 1e-3
    assert relative_error(outputs[2], outputs[0]) > 1e-3


# -- checkpoints ---------------------------------------------------------------------------------------------------


def assert_loads(folder: Path, family: str, seed: int) -> None:
    loaded = VisionEncoder.from_pretrained(folder, device="cpu")
    made = VisionEncoder.from_config(family, device="cpu", seed=seed)
    assert loaded.family.name == family
    for (name, got), want in zip(loaded.tower.named_parameters(), made.tower.parameters(), strict=True):
        assert torch.equal(got, want), name


@pytest.mark.parametrize("family, layout", LAYOUTS)
def test_every_layout_loads(family: str, layout: int, tmp_path: Path) -> None:
    assert_loads(write_tiny_checkpoint(family, tmp_path, seed=layout + 1, layout=layout), family, layout + 1)


@pytest.mark.parametrize("layout", [2, 3])
def test_omni_checkpoints_load(layout: int, tmp_path: Path) -> None:
    write_tiny_checkpoint("qwen2_5_vl", tmp_path, seed=3, layout=layout)
    config = omni_config() if layout == 2 else omni_config()["thinker_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_loads(tmp_path, "qwen2_5_vl", 3)


def test_deepstack_weights_under_a_config_without_deepstack_are_reported(tmp_path: Path) -> None:
    write_tiny_checkpoint("qwen3_vl", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "qwen3_5"}))
    with pytest.raises(CheckpointError, match=r"unexpected keys[\s\S]*deepstack_merger_list"):
        VisionEncoder.from_pretrained(tmp_path, device="cpu")


# -- configs -------------------------------------------------------------------------------------------------------


def test_qwen2_hidden_size_is_the_output_width() -> None:
    tower = tower_of("qwen2_vl")
    assert tower.spec.width == 48
    assert tower.patch_embed.proj.weight.shape == (64, 3 * 2 * 14 * 14)
    assert tower.blocks[0].mlp.fc1.weight.shape == (128, 64)


def test_published_configs() -> None:
    qwen2 = {"model_type": "qwen2_vl", "vision_config": {
        "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3, "hidden_size": 1536,
        "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2}}  # fmt: skip
    parsed = find_family(qwen2).parse_config(qwen2)
    assert (parsed.embed_dim, parsed.hidden_size, parsed.in_channels) == (1280, 1536, 3)
    qwen25 = {"model_type": "qwen2_5_vl", "vision_config": {
        "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
        "in_chans": 3, "out_hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2, "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31], "temporal_patch_size": 2}}  # fmt: skip
    parsed = find_family(qwen25).parse_config(qwen25)
    assert (parsed.hidden_size, parsed.out_hidden_size, parsed.window) == (1280, 3584, 4)
    assert parsed.fullatt_block_indexes == (7, 15, 23, 31)


@pytest.mark.parametrize("key", ["hidden_size", "out_hidden_size"])
def test_a_missing_width_is_an_error_and_no_default(key: str) -> None:
    config = get_family("qwen2_5_vl").tiny()[0]
    del config["vision_config"][key]
    with pytest.raises(ConfigError, match=key):
        make(config)


@pytest.mark.parametrize("listed", [None, [], [0, 1]])
def test_qwen3_5_has_no_deepstack_whatever_the_file_lists(listed: list | None) -> None:
    config = get_family("qwen3_5").tiny()[0]
    config["vision_config"].pop("deepstack_visual_indexes")
    if listed is not None:
        config["vision_config"]["deepstack_visual_indexes"] = listed
    assert make(config).spec.deepstack == 0


@pytest.mark.parametrize(
    "model_type, family",
    [
        ("qwen2_vl", "qwen2_vl"),
        ("qwen2_5_vl", "qwen2_5_vl"),
        ("qwen2_5_omni", "qwen2_5_vl"),
        ("qwen3_5", "qwen3_5"),
        ("qwen3_5_moe", "qwen3_5"),
        ("qwen3_omni_moe", "qwen3_omni"),
    ],
)
def test_model_types(model_type: str, family: str) -> None:
    assert find_family({"model_type": model_type}).name == family


@pytest.mark.parametrize(
    "family, mean, scope, sampling",
    [
        ("qwen2_vl", 0.48145466, "frame", "stride"),
        ("qwen2_5_vl", 0.48145466, "frame", "stride"),
        ("qwen3_5", 0.5, "clip", "spread"),
        ("qwen3_omni", 0.5, "frame", "stride"),
    ],
)
def test_processors_follow_the_reference_classes(family: str, mean: float, scope: str, sampling: str) -> None:
    row = get_family(family)
    config, preprocessor = row.tiny()
    for file in (None, preprocessor):
        processor = row.processor(row.parse_config(config), file, None)
        assert (processor.image_mean[0], processor.video_scope, processor.sampling) == (mean, scope, sampling)
        assert processor.patch_width == tower_of(family).spec.patch_width
