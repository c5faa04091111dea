"""InternVL (and Kimi-K2.5's mixed batches): towers, configs, checkpoints, tiles and frames against their references."""

from __future__ import annotations

import ast
import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import save_file

from all_references import REFERENCES
from families import composed, one_by_one, pixels, relative_error, stacked
from references_kimi_internvl import InternVLReference, OriginalInternVLReference
from vitgraph import EncoderConfig, VisionEncoder
from vitgraph.attention.sdpa import SdpaAttention
from vitgraph.core import Grid
from vitgraph.errors import CheckpointError, ConfigError, PatchError, VideoError
from vitgraph.models.checkpoint import INDEX
from vitgraph.models.internvl import InternVLConfig, InternVLTower, layouts
from vitgraph.models.registry import find_family, get_family
from vitgraph.models.tiny import write_tiny_checkpoint
from vitgraph.preprocess.inputs import Video
from vitgraph.preprocess.tiles import TileProcessor, tile_layout

pytest.importorskip("transformers")

SIDE = 4
TILES = [[1], [2], [7], [1, 1, 1], [3, 1, 7, 2], [13, 1, 4]]
MODES = ["auto", "padded", "eager"]


def tiny(kind: str) -> dict:
    """The tiny config with the structure of one of the two published towers."""
    config = get_family("internvl").tiny()[0]
    if kind == "6B":
        config["vision_config"] |= {"norm_type": "rms_norm", "qkv_bias": False, "qk_normalization": True}
    return config


def own_form(config: dict) -> dict:
    """An original config.json as Transformers writes it."""
    vision = dict(config["vision_config"])
    vision |= {"attention_bias": vision.pop("qkv_bias"), "use_qk_norm": vision.pop("qk_normalization")}
    vision |= {name: [vision[name]] * 2 for name in ("image_size", "patch_size")}
    vision["model_type"] = "internvl_vision"
    return {
        "model_type": "internvl",
        "downsample_ratio": 0.5,
        "projector_hidden_act": "gelu",
        "text_config": config["llm_config"],
        "vision_config": vision,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }


def make(model: str | dict, **settings) -> VisionEncoder:
    return VisionEncoder.from_config(model, device="cpu", config=EncoderConfig(**{"max_tokens": 256, **settings}))


def grids_of(tiles: list[int]) -> list[Grid]:
    return [Grid(t, SIDE, SIDE) for t in tiles]


# -- Kimi-K2.5 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_kimi_k25_clips_and_images_in_one_batch(mode: str) -> None:
    encoder = make("kimi_k25")
    reference = REFERENCES["kimi_k25"](encoder.tower, get_family("kimi_k25").tiny()[0])
    sizes = [(1, 2, 2), (4, 6, 10), (1, 2, 20), (2, 4, 4), (1, 8, 8), (4, 2, 2), (2, 20, 2), (1, 4, 4)]
    grids = [Grid(*size) for size in sizes]
    x = pixels(encoder.spec, grids)
    assert relative_error(stacked(encoder.encode_patches(x, grids, mode=mode)), reference(x, grids)) < 1e-5
    assert not encoder.stats.fallbacks


# -- towers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["300M", "6B"])
def test_tower_equals_transformers(kind: str, mode: str) -> None:
    encoder = make(tiny(kind))
    reference = InternVLReference(encoder.tower, tiny(kind))
    for tiles in TILES:
        grids = grids_of(tiles)
        x = pixels(encoder.spec, grids)
        got = stacked(encoder.encode_patches(x, grids, mode=mode))
        assert relative_error(got, reference(x, grids)) < 1e-5, tiles
    assert not encoder.stats.fallbacks


@pytest.mark.parametrize("kind", ["300M", "6B"])
def test_tower_equals_the_original_model(kind: str) -> None:
    encoder = make(tiny(kind))
    state = layouts(encoder.tower.config)[0].export(dict(encoder.tower.named_parameters()))
    reference = OriginalInternVLReference(state, tiny(kind)["vision_config"])
    grids = grids_of([3, 1, 7, 2])
    x = pixels(encoder.spec, grids)
    assert relative_error(stacked(encoder.encode_patches(x, grids)), reference(x)) < 1e-5


def test_both_forms_of_the_config_build_the_same_tower() -> None:
    for kind in ("300M", "6B"):
        a, b = make(tiny(kind)), make(own_form(tiny(kind)))
        grids = grids_of([2, 1])
        x = pixels(a.spec, grids)
        assert torch.equal(stacked(a.encode_patches(x, grids)), stacked(b.encode_patches(x, grids)))


def test_every_norm_of_the_large_tower_matters() -> None:
    encoder = make(tiny("6B"), budgets=(8,))
    grids = grids_of([2])
    x = pixels(encoder.spec, grids)
    before = stacked(encoder.encode_patches(x, grids))
    for name, parameter in encoder.tower.named_parameters():
        kept = parameter.clone()
        parameter.zero_()
        assert not torch.equal(stacked(encoder.encode_patches(x, grids)), before), f"{name} has no effect"
        parameter.copy_(kept)


def test_segments_are_tiles_with_their_class_row() -> None:
    tower = make("internvl").tower
    arrays, total = composed(tower, grids_of([1, 3, 2]), spare=2)
    rows = SIDE**2 + 1
    assert arrays["cu_seqlens"].tolist() == [0, *(rows * n for n in range(1, 7)), 6 * rows, 6 * rows]
    assert total == {"patch": 6 * SIDE**2, "token": 24, "item": 3, "segment": 6, "row": 6 * rows}


def test_a_clip_longer_than_the_largest_budget_is_cut_between_tiles() -> None:
    encoder = make("internvl", budgets=(12,))
    grids = grids_of([8, 2])
    x = pixels(encoder.spec, grids)
    assert relative_error(stacked(encoder.encode_patches(x, grids)), one_by_one(encoder, x, grids)) < 1e-5
    assert encoder.stats.split_items == 1
    assert not encoder.stats.fallbacks


def test_capacities_of_the_published_tile() -> None:
    with torch.device("meta"):
        spec = InternVLTower(InternVLConfig.from_hf(PUBLISHED["300M"]), SdpaAttention()).spec
    assert (spec.unit, spec.patch_width, spec.segments[0].max_length) == (256, 588, 1025)
    assert spec.counts(Grid(13, 32, 32)) == {
        "patch": 13312, "token": 3328, "item": 1, "segment": 13, "row": 13325,
    }  # fmt: skip
    assert spec.capacity(3328, 128, 8) == {**spec.counts(Grid(13, 32, 32)), "item": 13}
    encoder = make("internvl", min_tokens=1, max_tokens=50)
    assert all(b.tokens % 4 == 0 and b.capacity["segment"] == b.tokens // 4 for b in encoder.budgets)
    for grid in (Grid(0, 32, 32), Grid(1, 32, 30), Grid(1, 16, 16)):
        with pytest.raises(PatchError, match="tiles x 32 x 32"):
            spec.check_grid(grid)


# -- configuration and checkpoints ---------------------------------------------------------------------------------

PUBLISHED = {
    "300M": {
        "model_type": "internvl_chat", "downsample_ratio": 0.5, "dynamic_image_size": True, "force_image_size": 448,
        "llm_config": {"hidden_size": 896}, "max_dynamic_patch": 12, "min_dynamic_patch": 1, "ps_version": "v2",
        "select_layer": -1, "use_thumbnail": True, "vision_config": {
            "hidden_act": "gelu", "hidden_size": 1024, "image_size": 448, "intermediate_size": 4096,
            "layer_norm_eps": 1e-06, "model_type": "intern_vit_6b", "norm_type": "layer_norm",
            "num_attention_heads": 16, "num_channels": 3, "num_hidden_layers": 24, "patch_size": 14,
            "qk_normalization": False, "qkv_bias": True}},
    "6B": {
        "model_type": "internvl_chat", "downsample_ratio": 0.5, "dynamic_image_size": True, "force_image_size": 448,
        "llm_config": {"hidden_size": 8192}, "max_dynamic_patch": 12, "min_dynamic_patch": 1, "ps_version": "v2",
        "select_layer": -1, "use_thumbnail": True, "vision_config": {
            "hidden_act": "gelu", "hidden_size": 3200, "image_size": 448, "intermediate_size": 12800,
            "layer_norm_eps": 1e-06, "model_type": "intern_vit_6b", "norm_type": "rms_norm",
            "num_attention_heads": 25, "num_channels": 3, "num_hidden_layers": 45, "patch_size": 14,
            "qk_normalization": True, "qkv_bias": False}},
}  # fmt: skip


def test_published_configs() -> None:
    for kind, depth, head_dim, width in (("300M", 24, 64, 896), ("6B", 45, 128, 8192)):
        parsed = find_family(PUBLISHED[kind]).parse_config(PUBLISHED[kind])
        assert (parsed.num_hidden_layers, parsed.text_width, parsed.original) == (depth, width, True)
        assert parsed.hidden_size // parsed.num_attention_heads == head_dim
        with torch.device("meta"):
            tower = InternVLTower(parsed, SdpaAttention())
        attn = tower.blocks[0].attn
        assert (attn.qkv.bias is None, attn.q_norm is not None) == (kind == "6B", kind == "6B")
        assert attn.proj.bias is not None
        own = InternVLConfig.from_hf(own_form(PUBLISHED[kind]))
        assert own == InternVLConfig(**{**parsed.__dict__, "original": False})


def test_transformers_leaves_out_its_defaults() -> None:
    parsed = InternVLConfig.from_hf({"text_config": {"hidden_size": 896}, "vision_config": {"attention_bias": True}})
    own = InternVLConfig.from_hf(own_form(PUBLISHED["300M"]))
    assert parsed == own
    bare = InternVLConfig.from_hf({"text_config": {"hidden_size": 896}, "vision_config": {}})
    assert not bare.qkv_bias  # the class has no bias; published files say that they do


@pytest.mark.parametrize(
    "place, name, value",
    [
        ("top", "ps_version", "v1"),
        ("top", "ps_version", None),
        ("top", "select_layer", -4),
        ("top", "vision_feature_layer", [-1, -2]),
        ("top", "vision_feature_select_strategy", "full"),
        ("top", "force_image_size", 448),
        ("top", "flash_mode", True),
        ("top", "pad2square", True),
        ("vision_config", "hidden_act", "quick_gelu"),
        ("vision_config", "norm_type", "batch_norm"),
        ("vision_config", "use_mean_pooling", False),
        ("vision_config", "image_size", [56, 84]),
        ("vision_config", "image_size", 70),
    ],
)
def test_what_no_published_checkpoint_has_is_refused(place: str, name: str, value) -> None:
    config = tiny("300M")
    (config if place == "top" else config[place])[name] = value
    with pytest.raises(ConfigError, match=name):
        make(config)


@pytest.mark.parametrize("name", ["hidden_size", "qkv_bias", "qk_normalization", "norm_type"])
def test_a_missing_value_of_the_original_config_is_no_default(name: str) -> None:
    config = tiny("300M")
    del config["vision_config"][name]
    with pytest.raises(ConfigError, match=name):
        make(config)


@pytest.mark.parametrize("kind", ["300M", "6B"])
def test_layouts_name_every_key_of_transformers(kind: str) -> None:
    encoder = make(tiny(kind))
    reference = InternVLReference(encoder.tower, tiny(kind))
    want = {f"vision_tower.{key}" for key in reference.model.state_dict()}
    want |= {f"multi_modal_projector.{key}" for key in reference.projector.state_dict()}
    _, plain, nested = (
        layout.export(dict(encoder.tower.named_parameters())) for layout in layouts(encoder.tower.config)
    )
    assert set(plain) == want
    assert set(nested) == {f"model.{key}" for key in want}
    for key, value in reference.model.state_dict(prefix="vision_tower.").items():
        assert plain[key].shape == value.shape, key


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("kind", ["300M", "6B"])
def test_every_layout_loads(kind: str, index: int, tmp_path: Path) -> None:
    made = make(tiny(kind))
    folder = write_tiny_checkpoint("internvl", tmp_path, layout=index)
    if kind == "6B":
        rewrite(folder, made, index)
    loaded = VisionEncoder.from_pretrained(folder, device="cpu", config=EncoderConfig(max_tokens=256))
    for (name, got), want in zip(loaded.tower.named_parameters(), made.tower.parameters(), strict=True):
        assert torch.equal(got, want), name


def rewrite(folder: Path, encoder: VisionEncoder, index: int, **more: torch.Tensor) -> None:
    """Puts the weights of `encoder` in place of the folder's, with the config.json that goes with the layout."""
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    state = layouts(encoder.tower.config)[index].export(dict(encoder.tower.named_parameters()))
    save_file({name: value.contiguous() for name, value in {**state, **more}.items()}, folder / "model.safetensors")
    config = tiny("6B" if encoder.tower.config.qk_norm else "300M")
    (folder / "config.json").write_text(json.dumps(own_form(config) if index else config))


def test_unused_and_unexpected_keys(tmp_path: Path) -> None:
    made = make(tiny("300M"))
    folder = write_tiny_checkpoint("internvl", tmp_path)
    rewrite(folder, made, 1, **{"vision_tower.embeddings.mask_token": torch.zeros(1, 1, 64)})
    VisionEncoder.from_pretrained(folder, device="cpu")
    rewrite(folder, made, 1, **{"vision_tower.layernorm.weight": torch.zeros(64)})
    with pytest.raises(CheckpointError, match=r"vision_tower\.layernorm\.weight"):
        VisionEncoder.from_pretrained(folder, device="cpu")


# -- tiles ---------------------------------------------------------------------------------------------------------

SIZES = [(640, 427), (448, 448), (30, 900), (1200, 399), (61, 61), (1000, 800), (449, 447), (3000, 2000)]


def photograph(width: int, height: int) -> PIL.Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height // 7 + 1, width // 7 + 1, 3), dtype=np.uint8)
    return PIL.Image.fromarray(values).resize((width, height), PIL.Image.Resampling.BICUBIC)


def processor_of(kind: str, image: dict | None = None, video: dict | None = None, **changes) -> TileProcessor:
    row, config = get_family("internvl"), {**PUBLISHED["300M"], **changes}
    return row.processor(row.parse_config(config if kind == "original" else own_form(config)), image, video)


def reference_layout():
    pil = pytest.importorskip("transformers.models.got_ocr2.image_processing_pil_got_ocr2")
    return pil.get_optimal_tiled_canvas


@pytest.mark.parametrize("low, high", [(1, 12), (1, 1), (1, 6), (2, 7), (6, 6), (1, 40)])
def test_layout_of_tiles_equals_transformers(low: int, high: int) -> None:
    reference = reference_layout().__wrapped__
    rng = np.random.default_rng(0)
    sizes = [(int(a), int(b)) for a, b in rng.integers(1, 3000, (300, 2))]
    # Exact ratios, halfway between two layouts, and areas about the limit of the rule on ties.
    sizes += [(h * s, w * s) for h in range(1, 14) for w in range(1, 14) for s in (1, 100, 224, 317, 448)]
    for height, width in sizes:
        want = reference((height, width), (448, 448), low, high)
        assert tile_layout(height, width, 448, low, high) == want, (height, width)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_image_equals_transformers(size: tuple[int, int]) -> None:
    pil = pytest.importorskip("transformers.models.got_ocr2.image_processing_pil_got_ocr2")
    processor, image = processor_of("own"), photograph(*size)
    reference = pil.GotOcr2ImageProcessorPil(
        size={"height": 448, "width": 448}, image_mean=processor.image_mean, image_std=processor.image_std
    )
    want = reference(images=image, crop_to_patches=True, return_tensors="np")
    patches = processor.prepare(image)
    assert patches.grid == Grid(int(want["num_patches"][0]), 32, 32) == processor.image_grid(size[1], size[0])
    np.testing.assert_array_equal(patches.pixel_values, rows_of(want["pixel_values"]))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_image_equals_the_original_loader(size: tuple[int, int]) -> None:
    """Derived on its own: Pillow's default filter, crops by box, to [0, 1], minus mean, over std."""
    processor, image = processor_of("original"), photograph(*size)
    columns, rows = reference_layout()((size[1], size[0]), (448, 448), 1, 12)
    canvas = image.resize((448 * columns, 448 * rows))
    boxes = [(448 * c, 448 * r, 448 * c + 448, 448 * r + 448) for r in range(rows) for c in range(columns)]
    tiles = [canvas.crop(box) for box in boxes]
    if len(tiles) > 1:
        tiles.append(image.resize((448, 448)))
    x = torch.stack([torch.from_numpy(np.array(tile)).permute(2, 0, 1) for tile in tiles]).float().div(255)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    patches = processor.prepare(image)
    assert patches.grid == Grid(len(tiles), 32, 32)
    np.testing.assert_array_equal(patches.pixel_values, rows_of(x.sub(mean).div(std).numpy()))


def rows_of(tiles: np.ndarray, p: int = 14) -> np.ndarray:
    """Patch rows by slicing, one patch at a time."""
    tiles = np.asarray(tiles)
    sides = range(0, tiles.shape[-1], p)
    return np.stack([tile[:, y : y + p, x : x + p].reshape(-1) for tile in tiles for y in sides for x in sides])


def test_the_original_config_rules_the_tiles() -> None:
    wide = (400, 1600)
    assert processor_of("original").image_grid(*wide).t == 5
    assert processor_of("original", use_thumbnail=False).image_grid(*wide).t == 4
    assert processor_of("original", max_dynamic_patch=3).image_grid(*wide).t == 4
    assert processor_of("original", dynamic_image_size=False).image_grid(*wide).t == 1
    assert processor_of("own", {"max_patches": 2, "crop_to_patches": False}).image_grid(*wide).t == 3


def test_settings_of_the_files() -> None:
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    size = {"height": 448, "width": 448}
    processor = processor_of("own", {"size": size, "resample": 2, **half}, {"num_frames": 4})
    assert (processor.image_mean, processor.resample, processor.video_mean) == ((0.5,) * 3, 2, None)
    assert processor.num_frames == 4
    assert processor_of("own").image_mean == (0.485, 0.456, 0.406)
    assert processor_of("own", half).video_mean == (0.5,) * 3
    for bad in ({"size": {"height": 384, "width": 384}}, {"size": 384}, {"do_resize": False}, {"max_patches": 0}):
        with pytest.raises(ConfigError):
            processor_of("own", bad)


# -- clips ---------------------------------------------------------------------------------------------------------


def reference_sampling():
    """`sample_frames` of the video processor, taken out of its file: importing the file would need torchvision."""
    spec = find_spec("transformers.models.internvl")
    assert spec is not None and spec.submodule_search_locations
    file = Path(spec.submodule_search_locations[0]) / "video_processing_internvl.py"
    tree = ast.parse(file.read_text())
    (function,) = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "sample_frames")
    function.args.kwarg = None
    for argument in function.args.args:
        argument.annotation = None
    scope = {"torch": torch}
    exec(compile(ast.Module([function], []), str(file), "exec"), scope)
    return scope["sample_frames"]


def sampled(monkeypatch: pytest.MonkeyPatch, total: int, **asked) -> list[int]:
    """Indexes that the processor takes of a clip of `total` frames, without touching pixels."""
    found: list[int] = []

    def load(video, sampling, *_):
        limits = {"fps": video.fps, "num_frames": video.num_frames, "max_frames": video.max_frames}
        found.extend(sampling.indices(total, video.source_fps, **limits))
        return SimpleNamespace(frames=np.zeros((len(found), 56, 56, 3), np.uint8))

    monkeypatch.setattr("vitgraph.preprocess.tiles.load_frames", load)
    TileProcessor(image_size=56).video(Video("clip", **asked))
    return found


@pytest.mark.parametrize("total", [1, 7, 8, 9, 100, 333, 767])
def test_sampling_equals_transformers(total: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = reference_sampling()
    processor = SimpleNamespace(num_frames=None, initial_shift=True)
    metadata = SimpleNamespace(total_num_frames=total, fps=25.0)
    for count in (1, 3, 7, 8, 32):
        if count <= total:
            want = sample(processor, metadata, num_frames=count).tolist()
            assert sampled(monkeypatch, total, num_frames=count) == want
    for fps in (1.0, 2.0, 24.0):
        if total / 25.0 * fps >= 1:
            want = sample(processor, metadata, fps=fps).tolist()
            assert sampled(monkeypatch, total, fps=fps, source_fps=25.0) == want
    default = sample(processor, metadata, num_frames=min(8, total)).tolist()
    assert sampled(monkeypatch, total, source_fps=25.0) == default
    assert sampled(monkeypatch, total) == list(range(total))
    assert len(sampled(monkeypatch, total, max_frames=5)) == min(total, 5)


def test_a_rate_gives_at_most_so_many_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(sampled(monkeypatch, 5000, source_fps=25.0, fps=25.0)) == 768


def test_more_frames_than_the_clip_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VideoError, match="9 frames were asked of a clip that has 8"):
        sampled(monkeypatch, 8, num_frames=9)


def test_a_clip_is_one_tile_per_frame() -> None:
    """Derived on its own, as Transformers' video processor on the CPU: antialiased bicubic resize of bytes, then
    minus 255 x mean, over 255 x std."""
    frames = np.random.default_rng(1).integers(0, 256, (3, 60, 90, 3), dtype=np.uint8)
    patches = processor_of("own").prepare(Video(frames))
    assert patches.grid == Grid(3, 32, 32)
    planes = torch.from_numpy(frames).permute(0, 3, 1, 2)
    x = torch.nn.functional.interpolate(planes, (448, 448), mode="bicubic", align_corners=False, antialias=True)
    mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    np.testing.assert_allclose(patches.pixel_values, rows_of(((x.float() - mean) / std).numpy()), rtol=0, atol=1e-6)
    with pytest.raises(VideoError, match="448x448"):
        processor_of("own").prepare(Video(frames, max_pixels=1000))


def test_images_and_clips_go_through_the_encoder(tmp_path: Path) -> None:
    encoder = VisionEncoder.from_pretrained(write_tiny_checkpoint("internvl", tmp_path), device="cpu")
    frames = np.random.default_rng(1).integers(0, 256, (3, 40, 120, 3), dtype=np.uint8)
    clip, image = encoder.encode([Video(frames), frames[0]])
    assert (clip.grid, image.grid) == (Grid(3, 4, 4), Grid(4, 4, 4))
    assert clip.tokens.shape == (12, 48) and image.tokens.shape == (16, 48)
    for frame, tokens in zip(frames, clip.tokens.split(4), strict=True):
        alone = encoder.encode([Video(frame[None])])[0].tokens
        assert relative_error(tokens, alone) < 1e-5


@pytest.mark.parametrize("key", ["mlp2.0.weight", "gating.0.weight", "pooling_before_gating.query_token"])
def test_weights_of_the_flash_models_are_refused_not_ignored(key: str, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_tiny_checkpoint("internvl", tmp_path)
    index = json.loads((folder / INDEX).read_text())
    shard = next(iter(index["weight_map"].values()))
    save_file({**load_file(folder / shard), key: torch.zeros(2)}, folder / shard)
    index["weight_map"][key] = shard
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"1 unexpected keys:\n  {key}"):
        VisionEncoder.from_pretrained(folder, device="cpu")
