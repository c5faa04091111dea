"""Every registered family through every property. A family added to the registry is added here."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from all_references import REFERENCES
from families import (
    awkward_grids,
    clip_grids,
    composed,
    image_grids,
    longest_clip,
    make,
    one_by_one,
    pixels,
    relative_error,
    stacked,
)
from vitgraph import VisionEncoder
from vitgraph.assets import sample_photographs
from vitgraph.core import Grid
from vitgraph.engine.staging import Staging
from vitgraph.errors import PatchError
from vitgraph.models.registry import families, find_family, get_family
from vitgraph.models.tiny import write_tiny_checkpoint

FAMILIES = [family.name for family in families()]

pytestmark = pytest.mark.parametrize("family", FAMILIES)


def test_every_family_has_a_reference(family: str) -> None:
    assert family in REFERENCES


def test_tower_equals_its_reference_in_fp32(family: str) -> None:
    encoder = make(family, max_tokens=512)
    reference = REFERENCES[family](encoder.tower, get_family(family).tiny()[0])
    grids = awkward_grids(encoder.spec)
    x = pixels(encoder.spec, grids)
    want = reference(x, grids)
    for mode in ("auto", "eager"):
        got = stacked(encoder.encode_patches(x, grids, mode=mode))
        assert got.shape == want.shape
        assert relative_error(got, want) < 1e-5, mode


@pytest.mark.parametrize("attention", ["per segment", "masked"])
def test_packed_equals_one_by_one_with_nan_in_every_padded_row(family, attention, monkeypatch) -> None:
    encoder = make(family, budgets=(16, 96, 320))
    if attention == "masked":
        # The form of the reference attention that only sees the device's offsets, as a graph does.
        monkeypatch.setattr(Staging, "uncaptured", lambda self, inputs, grids: inputs)
    grids = awkward_grids(encoder.spec)
    x = pixels(encoder.spec, grids)
    want = one_by_one(encoder, x, grids)
    encoder.encode_patches(x, grids)
    for _ in range(2):
        encoder.engine.poison_padding()
        got = stacked(encoder.encode_patches(x, grids))
        assert relative_error(got, want) < 1e-5
    assert encoder.stats.padding > 0


def test_a_nan_item_leaves_its_neighbours_alone(family: str) -> None:
    encoder = make(family, budgets=(512,))
    grids = image_grids(encoder.spec)
    x = pixels(encoder.spec, grids)
    want = encoder.encode_patches(x, grids)
    x[: grids[0].patches] = float("nan")
    got = encoder.encode_patches(x, grids)
    assert got[0].tokens.isnan().all()
    for a, b in zip(got[1:], want[1:], strict=True):
        assert torch.equal(a.tokens, b.tokens)


def test_outputs_have_the_declared_shapes(family: str) -> None:
    encoder = make(family)
    spec, grids = encoder.spec, awkward_grids(encoder.spec)
    for embedding, grid in zip(encoder.encode_patches(pixels(spec, grids), grids), grids, strict=True):
        tokens = spec.counts(grid)["token"]
        assert embedding.tokens.shape == (tokens, spec.width)
        assert embedding.grid == grid
        if spec.deepstack:
            assert embedding.deepstack.shape == (spec.deepstack, tokens, spec.width)
        else:
            assert embedding.deepstack is None


def test_metadata_is_what_the_declaration_says(family: str) -> None:
    tower = make(family).tower
    spec = tower.spec
    for grid in awkward_grids(spec):
        counts, arrays = spec.counts(grid), tower.metadata(grid)
        assert set(arrays) == {b.name for b in spec.buffers}
        for buffer in spec.buffers:
            array = arrays[buffer.name]
            assert array.dtype == np.dtype(buffer.dtype), buffer.name
            assert array.shape == (counts[buffer.rows], *buffer.trailing), buffer.name
            if buffer.pad == "identity_tail":
                assert sorted(array) == list(range(len(array))), f"{buffer.name} is no permutation"
        for segments in spec.segments:
            ends = arrays[segments.name]
            kind = next(b.offset for b in spec.buffers if b.name == segments.name)
            lengths = np.diff(ends, prepend=0)
            assert ends[-1] == counts[kind]
            assert (lengths > 0).all()
            assert segments.max_length is None or lengths.max() <= segments.max_length


def test_segments_never_cross_an_item_and_padding_is_in_range(family: str) -> None:
    encoder = make(family)
    spec, grids = encoder.spec, awkward_grids(encoder.spec)
    counts = [spec.counts(grid) for grid in grids]
    arrays, _ = composed(encoder.tower, grids, spare=3)
    for segments in spec.segments:
        kind = next(b.offset for b in spec.buffers if b.name == segments.name)
        borders = np.cumsum([c[kind] for c in counts])
        assert set(borders) <= set(arrays[segments.name])
        assert (arrays[segments.name][-3:] == borders[-1]).all()
    for buffer in spec.buffers:
        assert np.isfinite(arrays[buffer.name]).all()
        if buffer.pad == "identity_tail":
            assert sorted(arrays[buffer.name]) == list(range(len(arrays[buffer.name])))


def test_every_parameter_matters(family: str) -> None:
    encoder = make(family)
    grids = awkward_grids(encoder.spec)
    x = pixels(encoder.spec, grids)
    before = stacked(encoder.encode_patches(x, grids))
    # Adding a constant to every key shifts all logits of a query alike, and softmax forgets it.
    for name, parameter in encoder.tower.named_parameters():
        kept = parameter.clone()
        parameter.zero_()
        assert not torch.equal(stacked(encoder.encode_patches(x, grids)), before), f"{name} has no effect"
        parameter.copy_(kept)
    assert torch.equal(stacked(encoder.encode_patches(x, grids)), before)


def test_more_items_than_half_the_budget_equal_and_unequal(family: str) -> None:
    encoder = make(family, budgets=(1, 8, 64, 512), max_items=8)
    spec = encoder.spec
    small, other = image_grids(spec)[0], image_grids(spec)[3]
    for grids in ([small] * 7, [small, other] * 3):
        x = pixels(spec, grids)
        assert relative_error(stacked(encoder.encode_patches(x, grids)), one_by_one(encoder, x, grids)) < 1e-5
    assert not encoder.stats.fallbacks


def test_a_clip_longer_than_the_captured_limits_is_split_or_eager(family: str) -> None:
    limits = {"budgets": (max(2, make(family).spec.unit),), "max_items": 1, "max_frames": 1}
    encoder = make(family, **limits)
    clip = longest_clip(encoder.spec)
    if clip is None:
        with pytest.raises(PatchError, match="images only"):
            encoder.spec.check_grid(Grid(2, *image_grids(encoder.spec)[0][1:]))
        return
    image = image_grids(encoder.spec)[0]
    for grids in ([image], [clip], [image, clip, image]):
        x = pixels(encoder.spec, grids)
        assert relative_error(stacked(encoder.encode_patches(x, grids)), one_by_one(encoder, x, grids)) < 1e-5
    stats = encoder.stats
    assert (stats.split_items, stats.eager_packs) == ((2, 0) if encoder.spec.splits_by_frame else (0, 2))
    assert sum(stats.fallbacks.values()) == stats.eager_packs


def test_declared_video_is_tested_with_clips(family: str) -> None:
    spec = make(family).spec
    assert set(spec.modalities) == set(get_family(family).modalities)
    if "video" in spec.modalities:
        assert clip_grids(spec) or longest_clip(spec) is not None


def test_grids_that_do_not_fit_are_refused(family: str) -> None:
    spec = make(family).spec
    _, h, w = image_grids(spec)[0]
    for grid in (Grid(0, h, w), Grid(1, 0, w), Grid(1, h + 1, w), Grid(1, h, -w)):
        if spec.merge == 1 and grid == Grid(1, h + 1, w) and spec.unit == 1:
            continue
        with pytest.raises(PatchError):
            spec.check_grid(grid)


def test_photographs_go_through_the_processor(family: str, tmp_path) -> None:
    encoder = VisionEncoder.from_pretrained(write_tiny_checkpoint(family, tmp_path), device="cpu")
    photographs = sample_photographs()[:2]
    embeddings = encoder.encode(photographs)
    alone = [encoder.encode([p], mode="eager")[0] for p in photographs]
    assert relative_error(stacked(embeddings), stacked(alone)) < 1e-5
    patches = [encoder.prepare(p) for p in photographs]
    joined = torch.cat([torch.as_tensor(p.pixel_values) for p in patches])
    again = encoder.encode_patches(joined, [p.grid for p in patches])
    assert relative_error(stacked(again), stacked(embeddings)) < 1e-6


def test_the_config_finds_its_family(family: str) -> None:
    row = get_family(family)
    config = row.tiny()[0]
    for model_type in row.model_types:
        assert find_family({**config, "model_type": model_type}) is row
