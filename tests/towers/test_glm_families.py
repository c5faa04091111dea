"""GLM-4V and GLM-OCR: metadata, towers, configs, checkpoints and processors against Transformers."""

from __future__ import annotations

import ast
import math
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch

from families import composed, relative_error, stacked
from references_glm import REFERENCES, Glm4vMoeReference
from vitgraph import EncoderConfig, VisionEncoder
from vitgraph.attention.sdpa import SdpaAttention
from vitgraph.core import Grid
from vitgraph.errors import ConfigError
from vitgraph.models.contract import Tower
from vitgraph.models.glm4v import BlockKernel
from vitgraph.models.registry import find_family, get_family
from vitgraph.models.tiny import write_tiny_checkpoint
from vitgraph.preprocess import Sampling, Video

vision_utils = pytest.importorskip("transformers.vision_utils")

FAMILIES = list(REFERENCES)
AWKWARD = [
    [(1, 2, 2)],
    [(1, 2, 20)],
    [(1, 20, 2)],
    [(3, 6, 10)],
    [(1, 18, 34)],
    [(1, 8, 8), (1, 8, 8)],
    [(1, 16, 16)],
    [(1, 10, 18), (3, 2, 6), (1, 16, 16), (2, 10, 8), (1, 2, 2)],
]


def tower_of(family: str, **changes) -> Tower:
    row = get_family(family)
    config = row.tiny()[0]
    config["vision_config"] |= changes
    return row.build(row.parse_config(config), SdpaAttention())


def grids_of(sizes: list[tuple[int, int, int]]) -> list[Grid]:
    return [Grid(*size) for size in sizes]


def make(model: str | dict, **kwargs) -> VisionEncoder:
    return VisionEncoder.from_config(model, device="cpu", config=EncoderConfig(**{"max_tokens": 256, **kwargs}))


def pixels(encoder: VisionEncoder, grids: list[Grid]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(sum(g.patches for g in grids), encoder.spec.patch_width, generator=generator)


# -- metadata ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", AWKWARD, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_metadata_equals_transformers(family: str, sizes: list) -> None:
    tower = tower_of(family)
    arrays, _ = composed(tower, grids_of(sizes))
    thw, merge = torch.tensor(sizes), tower.spec.merge
    want = {
        "position_ids": vision_utils.get_vision_position_ids(thw, merge),
        "cu_seqlens": vision_utils.get_vision_cu_seqlens(thw),
    }
    if family == "glm4v":
        taps = vision_utils.get_vision_interpolation_indices_and_weights(thw, 8, "bicubic", False, merge)
        want |= dict(zip(("interp_indices", "interp_weights"), taps, strict=True))
    assert set(arrays) == set(want)
    for name, values in want.items():
        np.testing.assert_array_equal(arrays[name], values.numpy(), err_msg=name)


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


def test_the_moe_tower_of_transformers_is_the_same() -> None:
    encoder = make("glm4v")
    reference = Glm4vMoeReference(encoder.tower, get_family("glm4v").tiny()[0])
    grids = grids_of(AWKWARD[-1])
    x = pixels(encoder, grids)
    assert relative_error(stacked(encoder.encode_patches(x, grids)), reference(x, grids)) < 1e-5


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_bias_and_rope_theta_are_those_of_the_config(family: str, bias: bool) -> None:
    config = get_family(family).tiny()[0]
    rope = {"rope_type": "axial", "rope_theta": 300.0}
    config["vision_config"] |= {"attention_bias": bias, "rope_parameters": rope}
    encoder = make(config)
    linears = encoder.tower.blocks[0]
    found = [linear.bias is not None for linear in (linears.attn.qkv, linears.attn.proj, linears.mlp.down_proj)]
    assert found == [bias, bias and family == "glm_ocr", bias and family == "glm_ocr"]
    grids = grids_of(AWKWARD[-1])
    x = pixels(encoder, grids)
    want = REFERENCES[family](encoder.tower, config)(x, grids)
    assert relative_error(stacked(encoder.encode_patches(x, grids)), want) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_clip_equals_its_frames_as_items(family: str) -> None:
    encoder = make(family)
    clip, frames = grids_of([(4, 6, 10)]), grids_of([(1, 6, 10)] * 4)
    x = pixels(encoder, clip)
    got, want = (stacked(encoder.encode_patches(x, grids)) for grids in (clip, frames))
    assert relative_error(got, want) < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_a_clip_cut_between_frames_gives_the_same_tokens(family: str) -> None:
    encoder = make(family, budgets=(40,))
    grids = grids_of([(7, 10, 6)])
    x = pixels(encoder, grids)
    got = stacked(encoder.encode_patches(x, grids))
    assert encoder.stats.split_items == 1
    assert relative_error(got, stacked(encoder.encode_patches(x, grids, mode="eager"))) < 1e-5


# -- configs and checkpoints ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, block, merger", [("glm4v", 48, 112), ("glm_ocr", 112, 3 * 48)])
def test_widths_of_the_gated_mlps(family: str, block: int, merger: int) -> None:
    tower = tower_of(family)
    assert tower.blocks[0].mlp.gate_proj.weight.shape == (block, 64)
    assert tower.merger.mlp.gate_proj.weight.shape == (merger, 48)
    assert tower.spec.width == 48


def test_published_configs() -> None:
    glm = {"model_type": "glm4v_moe", "vision_config": {
        "attention_bias": False, "attention_dropout": 0.0, "depth": 24, "hidden_act": "silu", "hidden_size": 1536,
        "image_size": 336, "in_channels": 3, "initializer_range": 0.02, "intermediate_size": 10944,
        "model_type": "glm4v_moe", "num_heads": 12, "out_hidden_size": 4096, "patch_size": 14,
        "rms_norm_eps": 1e-05, "spatial_merge_size": 2, "temporal_patch_size": 2}}  # fmt: skip
    parsed = find_family(glm).parse_config(glm)
    assert (parsed.table_side, parsed.intermediate_size, parsed.out_hidden_size) == (24, 10944, 4096)
    ocr = {"model_type": "glm_ocr", "vision_config": {
        "attention_bias": True, "depth": 24, "hidden_act": "silu", "hidden_size": 1024, "image_size": 336,
        "in_channels": 3, "intermediate_size": 4096, "model_type": "glm_ocr_vision", "num_heads": 16,
        "out_hidden_size": 1536, "patch_size": 14, "rms_norm_eps": 1e-05, "spatial_merge_size": 2,
        "temporal_patch_size": 2}}  # fmt: skip
    parsed = find_family(ocr).parse_config(ocr)
    assert (parsed.intermediate_size, parsed.merger_hidden_size) == (4096, 4608)


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "out_hidden_size"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_missing_width_is_an_error_and_no_default(family: str, key: str) -> None:
    config = get_family(family).tiny()[0]
    del config["vision_config"][key]
    with pytest.raises(ConfigError, match=key):
        make(config)


@pytest.mark.parametrize(
    "model_type, family", [("glm4v", "glm4v"), ("glm4v_moe", "glm4v"), ("glm46v", "glm4v"), ("glm_ocr", "glm_ocr")]
)
def test_model_types(model_type: str, family: str) -> None:
    assert find_family({"model_type": model_type}).name == family


def test_block_kernel_is_the_convolution() -> None:
    kernel, frame = torch.randn(5, 3, 2, 2), torch.randn(1, 3, 2, 2)
    want = torch.nn.functional.conv2d(frame, kernel, stride=2).flatten()
    transform = BlockKernel(2)
    matrix = transform.load([kernel])
    torch.testing.assert_close(matrix @ frame[0].permute(1, 2, 0).flatten(), want)
    assert torch.equal(transform.save(matrix)[0], kernel)


@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_loads(family: str, layout: int, tmp_path: Path) -> None:
    loaded = VisionEncoder.from_pretrained(write_tiny_checkpoint(family, tmp_path, seed=3, layout=layout), device="cpu")
    made = VisionEncoder.from_config(family, device="cpu", seed=3)
    assert loaded.family.name == family
    for (name, got), want in zip(loaded.tower.named_parameters(), made.tower.parameters(), strict=True):
        assert torch.equal(got, want), name


# -- processors ----------------------------------------------------------------------------------------------------


def processor_of(family: str, image: dict | None, video: dict | None = None, model_type: str | None = None):
    row = get_family(family)
    config = row.tiny()[0]
    config["model_type"] = model_type or config["model_type"]
    return row.processor(row.parse_config(config), image, video)


@pytest.mark.parametrize("size", [(640, 427), (33, 21), (14, 900), (4100, 3300), (112, 112)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_image_equals_the_reference_processor(family: str, size: tuple[int, int]) -> None:
    name, kind = {
        "glm4v": ("glm4v", "Glm4vImageProcessorPil"),
        "glm_ocr": ("glm46v", "Glm46VImageProcessorPil"),
    }[family]
    module = pytest.importorskip(f"transformers.models.{name}.image_processing_pil_{name}")
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = PIL.Image.fromarray(values)
    want = getattr(module, kind)()(images=image, return_tensors="np")
    patches = processor_of(family, None).image(image)
    np.testing.assert_array_equal([patches.grid], want["image_grid_thw"])
    np.testing.assert_array_equal(patches.pixel_values, want["pixel_values"])


@pytest.mark.parametrize(
    "family, model_type, image, video, rule",
    [
        ("glm4v", "glm4v", None, None, "seconds"),
        ("glm4v", "glm4v_moe", None, None, "seconds"),
        ("glm4v", "glm46v", None, None, "duration"),
        ("glm4v", "glm4v_moe", "Glm4vImageProcessor", "Glm4vVideoProcessor", "seconds"),
        ("glm4v", "glm4v_moe", "Glm46VImageProcessor", "Glm46VVideoProcessor", "duration"),
        ("glm4v", "glm4v_moe", "Glm46VImageProcessor", None, "duration"),
        ("glm_ocr", "glm_ocr", None, None, "duration"),
        ("glm_ocr", "glm_ocr", "Glm46VImageProcessor", None, "duration"),
    ],
)
def test_sampling_is_that_of_the_named_class(family, model_type, image, video, rule) -> None:
    processor = processor_of(
        family,
        image and {"image_processor_type": image},
        video and {"video_processor_type": video, "max_duration": 200, "fps": 1},
        model_type,
    )
    assert processor.sampling == rule
    assert (processor.image_scope, processor.video_scope) == ("clip", "clip")
    assert (processor.max_duration, processor.fps) == ((200, 1) if video else (300, 2))
    assert (processor.min_pixels, processor.max_pixels) == (112 * 112, 28 * 28 * 15000)
    assert (processor.video_min_pixels, processor.video_max_pixels) == (112 * 112, 28 * 28 * 60000)


@pytest.mark.parametrize("family, frames", [("glm4v", 6), ("glm_ocr", 18)])
def test_a_clip_is_sampled_and_bounded_over_all_frames(family: str, frames: int) -> None:
    file = {"size": {"shortest_edge": 12544, "longest_edge": 28 * 28 * 2 * 90}}
    values = np.random.default_rng(0).integers(0, 256, (30, 140, 196, 3), dtype=np.uint8)
    patches = processor_of(family, None, file).prepare(Video(values, source_fps=10.0))
    shrink = math.sqrt(frames * 140 * 196 / (28 * 28 * 180))
    h, w = (2 * math.floor(side / shrink / 28) if shrink > 1 else side // 14 for side in (140, 196))
    assert patches.grid == (frames // 2, h, w)
    encoder = make(family)
    assert stacked(encoder.encode_patches(torch.from_numpy(patches.pixel_values), [patches.grid])).isfinite().all()


def reference_sampling(name: str):
    """`sample_frames` of a video processor, taken out of its file: importing the file would need torchvision."""
    spec = find_spec(f"transformers.models.{name}")
    assert spec is not None and spec.submodule_search_locations
    file = Path(spec.submodule_search_locations[0]) / f"video_processing_{name}.py"
    tree = ast.parse(file.read_text())
    (function,) = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "sample_frames")
    function.args.kwarg = None
    for argument in function.args.args:
        argument.annotation = None
    scope = {"math": math, "np": np}
    exec(compile(ast.Module([function], []), str(file), "exec"), scope)
    return scope["sample_frames"]


@pytest.mark.parametrize("source_fps", [0.5, 1.0, 12.5, 23.976, 25.0, 29.97, 30.0, 60.0])
@pytest.mark.parametrize("rule, name", [("seconds", "glm4v"), ("duration", "glm46v")])
def test_sampling_equals_transformers(rule: str, name: str, source_fps: float) -> None:
    sample = reference_sampling(name)
    processor = SimpleNamespace(fps=2, max_duration=300, temporal_patch_size=2)
    for seconds in (0.01, 0.2, 0.9, 1, 3.3, 29.9, 30, 31, 299.5, 300.5, 450, 700, 2399, 2500):
        total = max(int(seconds * source_fps), 1)
        metadata = SimpleNamespace(total_num_frames=total, fps=source_fps, duration=total / source_fps)
        want = sample(processor, metadata).tolist()
        assert Sampling(rule).indices(total, source_fps) == (want or [0, 0]), total


def test_sampling_takes_the_rate_and_the_limits_of_the_caller() -> None:
    sample = reference_sampling("glm4v")
    processor = SimpleNamespace(fps=2, max_duration=20, temporal_patch_size=2)
    for total, fps in ((100, 1), (100, 7.5), (500, 3), (2000, 2), (2000, 30)):
        metadata = SimpleNamespace(total_num_frames=total, fps=25.0, duration=total / 25.0)
        got = Sampling("seconds", max_duration=20).indices(total, 25.0, fps=fps)
        assert got == sample(processor, metadata, fps=fps).tolist()
    assert Sampling("duration").indices(100, 25.0, fps=1) == [0, 25, 50, 75]
    for rule in ("seconds", "duration"):
        found = Sampling(rule).indices(500, 25.0)
        assert len(found) > 9 and found == sorted(found)
        assert len(Sampling(rule).indices(500, 25.0, max_frames=9)) == 9
        assert len(Sampling(rule).indices(500, None, num_frames=6)) == 6
        assert Sampling(rule).indices(7, None) == list(range(7))
