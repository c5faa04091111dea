"""Kimi-K2.5: metadata, clips, checkpoints and chunks against Transformers."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from families import awkward_grids, composed, image_grids, make, one_by_one, pixels, relative_error, stacked
from vitgraph import VisionEncoder
from vitgraph.core import Grid
from vitgraph.errors import PatchError, VideoError
from vitgraph.models.kimi_k25 import KimiK25Config, time_table
from vitgraph.models.registry import get_family
from vitgraph.models.tiny import write_tiny_checkpoint
from vitgraph.preprocess.inputs import Video
from vitgraph.preprocess.kimi import KimiChunkProcessor

vision_utils = pytest.importorskip("transformers.vision_utils")
native = pytest.importorskip("transformers.models.kimi_k25.modeling_kimi_k25")

FAMILY = "kimi_k25"
SINGLE_CELLS = [Grid(1, 2, 2), Grid(4, 2, 2), Grid(1, 2, 64), Grid(3, 64, 2)]


# -- metadata ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["awkward", "single cells"])
def test_metadata_equals_transformers(case: str) -> None:
    tower = make(FAMILY).tower
    grids = awkward_grids(tower.spec) if case == "awkward" else SINGLE_CELLS
    thw = torch.tensor(grids)
    index, weight = vision_utils.get_vision_interpolation_indices_and_weights(thw, 8, "bicubic", False)
    want = {
        "position_ids": vision_utils.get_vision_position_ids(thw, 1),
        "interp_indices": index,
        "interp_weights": weight,
        "frame_index": native.get_vision_frame_index(thw),
        "cu_seqlens": vision_utils.get_vision_cu_seqlens(thw, merge_temporal=True),
    }
    arrays, _ = composed(tower, grids)
    assert set(arrays) == {*want, "pool_index", "pool_weight"}
    for name, values in want.items():
        np.testing.assert_array_equal(arrays[name], values.numpy(), err_msg=name)


def merged_patches(grid: Grid) -> torch.Tensor:
    """Patches of every token, `[tokens, frames, 4]`, by Transformers' function."""
    found = native.get_vision_temporal_merge_index(torch.tensor([grid]), 2, 2)
    if isinstance(found, tuple):  # since 5.24: for every patch the place in its token, a frame after the other
        found = found[0].argsort(stable=True).view(-1, 4, grid.t).transpose(1, 2)
    return found


@pytest.mark.parametrize("case", ["awkward", "single cells"])
def test_pooling_equals_transformers(case: str) -> None:
    tower = make(FAMILY).tower
    grids = awkward_grids(tower.spec) if case == "awkward" else SINGLE_CELLS
    arrays, total = composed(tower, grids)
    index = arrays["pool_index"].reshape(total["token"], 4, 4)
    row = first = 0
    for grid in grids:
        end = row + tower.spec.counts(grid)["token"]
        want = merged_patches(grid).transpose(1, 2) + first
        np.testing.assert_array_equal(index[row:end, :, : grid.t], want.numpy())
        weight = np.where(np.arange(4) < grid.t, np.float32(1) / np.float32(grid.t), np.float32(0))
        np.testing.assert_array_equal(arrays["pool_weight"][row:end], np.tile(weight, (end - row, 1)))
        # Taps of weight zero stay within the item: NaN times zero is NaN.
        assert ((index[row:end] >= first) & (index[row:end] < first + grid.patches)).all()
        row, first = end, first + grid.patches
    assert row == len(index)


def test_time_table_equals_transformers() -> None:
    config = SimpleNamespace(hidden_size=1152, pos_emb_time=4, pos_emb_height=2, pos_emb_width=2)
    want = native.Kimi_K25VisionPositionEmbeddings(config).time_position_embeddings
    got = time_table(4, 1152)
    assert got.dtype == torch.float32
    assert not got[0].any()
    torch.testing.assert_close(got, want, rtol=0, atol=0)


# -- clips ---------------------------------------------------------------------------------------------------------


def test_token_count_does_not_depend_on_the_number_of_frames() -> None:
    encoder = make(FAMILY)
    grids = [Grid(t, 6, 4) for t in (1, 2, 3, 4)]
    assert {encoder.spec.counts(grid)["token"] for grid in grids} == {6}
    embeddings = encoder.encode_patches(pixels(encoder.spec, grids), grids)
    assert {tuple(e.tokens.shape) for e in embeddings} == {(6, encoder.spec.width)}


def test_an_image_is_not_a_clip_of_one_frame_twice() -> None:
    encoder = make(FAMILY)
    frame = pixels(encoder.spec, [Grid(1, 4, 4)])
    image = encoder.encode_patches(frame, [Grid(1, 4, 4)])[0].tokens
    clip = encoder.encode_patches(torch.cat([frame, frame]), [Grid(2, 4, 4)])[0].tokens
    assert relative_error(clip, image) > 1e-3


@pytest.mark.parametrize("t", [2, 3, 4])
def test_clips_and_images_packed_equal_one_by_one(t: int) -> None:
    encoder = make(FAMILY, budgets=(256,), max_items=16)
    grids = [Grid(1, 4, 6), Grid(t, 4, 6), Grid(1, 2, 2), Grid(t, 2, 8), Grid(4, 6, 6), Grid(1, 6, 6)]
    x = pixels(encoder.spec, grids)
    want = one_by_one(encoder, x, grids)
    assert relative_error(stacked(encoder.encode_patches(x, grids)), want) < 1e-5
    assert not encoder.stats.fallbacks


def test_a_nan_clip_leaves_its_neighbours_alone() -> None:
    encoder = make(FAMILY, budgets=(256,))
    grids = [Grid(3, 4, 4), Grid(1, 4, 4), Grid(2, 4, 4)]
    x = pixels(encoder.spec, grids)
    want = encoder.encode_patches(x, grids)
    x[: grids[0].patches] = float("nan")
    got = encoder.encode_patches(x, grids)
    assert got[0].tokens.isnan().all()
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(got[1:], want[1:], strict=True))


def test_clips_longer_than_the_time_table_are_refused() -> None:
    encoder = make(FAMILY)
    _, h, w = image_grids(encoder.spec)[0]
    encoder.spec.check_grid(Grid(4, h, w))
    with pytest.raises(PatchError, match="time table of kimi_k25 has 4 rows"):
        encoder.spec.check_grid(Grid(5, h, w))


# -- configuration and checkpoints ---------------------------------------------------------------------------------


def test_config_reads_both_sets_of_names() -> None:
    published = get_family(FAMILY).tiny()[0]
    vision = published["vision_config"]
    renamed = {name.removeprefix("vt_").removeprefix("init_"): value for name, value in vision.items()}
    del renamed["text_hidden_size"], renamed["mm_hidden_size"]
    want = KimiK25Config.from_hf(published)
    assert want.text_width == 48
    assert KimiK25Config.from_hf({**published, "vision_config": renamed}) == want
    assert KimiK25Config.from_hf({"vision_config": vision}) == want


def test_layouts_differ_as_transformers_converts_them() -> None:
    from transformers.core_model_loading import PermuteForRope

    tower = make(FAMILY).tower
    published, own = (
        layout.export(dict(tower.named_parameters())) for layout in get_family(FAMILY).layouts(tower.config)
    )
    heads = SimpleNamespace(num_attention_heads=tower.config.num_attention_heads)
    permute = PermuteForRope()
    if not hasattr(permute, "_permute_for_rope"):
        pytest.skip("this Transformers has the permutation under another name")
    for layer in range(tower.config.num_hidden_layers):
        for kind in ("weight", "bias"):
            fused = published[f"vision_tower.encoder.blocks.{layer}.wqkv.{kind}"]
            for name, part in zip("qkv", fused.chunk(3), strict=True):
                want = part if name == "v" else permute._permute_for_rope(part, heads)
                got = own[f"model.vision_tower.layers.{layer}.attn.{name}_proj.{kind}"]
                torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_both_layouts_load_the_same_tower(tmp_path) -> None:
    encoders = [
        VisionEncoder.from_pretrained(write_tiny_checkpoint(FAMILY, tmp_path / str(i), layout=i), device="cpu")
        for i in (0, 1)
    ]
    grids = awkward_grids(encoders[0].spec)
    x = pixels(encoders[0].spec, grids)
    a, b = (stacked(encoder.encode_patches(x, grids)) for encoder in encoders)
    assert torch.equal(a, b)


# -- chunks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames, height, width", [(1, 56, 84), (2, 61, 90), (4, 300, 47), (3, 1200, 1500)])
def test_a_chunk_equals_transformers(frames: int, height: int, width: int) -> None:
    module = pytest.importorskip("transformers.models.kimi_k25.video_processing_kimi_k25", exc_type=ImportError)
    clip = np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    theirs = module.Kimi_K25VideoProcessor()(
        videos=[torch.from_numpy(clip).permute(0, 3, 1, 2)], do_sample_frames=False, return_tensors="pt"
    )
    row = get_family(FAMILY)
    config, preprocessor = row.tiny()
    patches = row.processor(row.parse_config(config), preprocessor, None).prepare(Video(clip))
    assert list(patches.grid) == theirs["video_grid_thw"][0].tolist()
    want = theirs["pixel_values_videos"].flatten(1).numpy()
    np.testing.assert_array_equal(patches.pixel_values, want)


def test_a_clip_of_more_frames_than_a_chunk_is_refused() -> None:
    clip = np.zeros((5, 28, 28, 3), dtype=np.uint8)
    processor = KimiChunkProcessor(fit_sides=True)
    with pytest.raises(VideoError, match="chunks of at most 4 frames"):
        processor.prepare(Video(clip))
    assert processor.prepare(Video(clip, num_frames=4)).grid == Grid(4, 2, 2)


def test_processor_settings_of_both_forms() -> None:
    published = {"in_patch_limit": 16384, "in_patch_limit_each_frame": 1024, "sample_fps": 1.0}
    want = KimiChunkProcessor(max_patches=16384, fit_sides=True, frame_patches=1024, fps=1.0)
    assert KimiChunkProcessor.from_hf({"media_proc_cfg": published}) == want
    own = {"max_patches": 16384}, {"max_patches": 1024, "fps": 1.0, "temporal_patch_size": 4}
    assert KimiChunkProcessor.from_hf(*own) == want


def test_clips_of_frames_go_through_the_encoder(tmp_path) -> None:
    encoder = VisionEncoder.from_pretrained(write_tiny_checkpoint(FAMILY, tmp_path), device="cpu")
    frames = np.random.default_rng(1).integers(0, 256, (3, 56, 56, 3), dtype=np.uint8)
    clip, image = encoder.encode([Video(frames), frames[0]])
    assert clip.grid == Grid(3, 4, 4)
    assert clip.tokens.shape == image.tokens.shape
