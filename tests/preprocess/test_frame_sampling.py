"""Which frames are taken, against the formulas of the reference written out again."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitgraph.errors import VideoError
from vitgraph.preprocess import Sampling

totals = st.integers(1, 5000)
rates = st.sampled_from([1.0, 12.5, 23.976, 24.0, 29.97, 30.0, 60.0])
wanted_rates = st.sampled_from([0.5, 1.0, 2.0, 4.0, 30.0])


@given(totals, rates, wanted_rates)
def test_spread_rule_at_a_rate(total, source_fps, fps):
    count = min(max(int(total / source_fps * fps), 4), 768, total)
    expected = np.linspace(0, total - 1, count).round().astype(int).tolist()
    assert Sampling("spread").indices(total, source_fps, fps=fps) == expected


@given(totals, rates, wanted_rates)
def test_stride_rule_at_a_rate(total, source_fps, fps):
    limit = min(768, total) // 2 * 2
    count = math.floor(min(max(total / source_fps * fps, 4), limit) / 2) * 2
    got = Sampling("stride").indices(total, source_fps, fps=fps)
    if count == 0:
        assert got == list(range(total))
    else:
        assert got == torch.arange(0, total, total / count).int()[:count].tolist()


@given(totals, st.integers(1, 64))
def test_a_number_of_frames(total, number):
    spread = Sampling("spread").indices(total, None, num_frames=number)
    assert spread == np.linspace(0, total - 1, number).round().astype(int).tolist()
    count = max(round(number / 2) * 2, 2)
    if count > total > 2:
        with pytest.raises(VideoError, match=r"Ask for at most"):
            Sampling("stride").indices(total, None, num_frames=number)
    elif total > 2:
        expected = torch.arange(0, total, total / count).int()[:count].tolist()
        assert Sampling("stride").indices(total, None, num_frames=number) == expected


@given(totals, st.none() | rates, st.sampled_from(["spread", "stride"]), st.none() | st.integers(2, 40))
def test_indices_are_ascending_and_within_limits(total, source_fps, rule, max_frames):
    indices = Sampling(rule).indices(total, source_fps, max_frames=max_frames)
    assert indices == sorted(indices)
    assert indices[0] >= 0 and indices[-1] < total
    assert 1 <= len(indices) <= (max_frames or 768)


def test_frames_of_unknown_rate_are_all_taken_up_to_the_limit():
    for rule in ("spread", "stride"):
        assert Sampling(rule).indices(7, None) == list(range(7))
        assert len(Sampling(rule, max_frames=4).indices(100, None)) == 4


def test_the_default_rate_is_that_of_the_processor():
    assert len(Sampling(fps=2.0).indices(100, 25.0)) == 8
    assert len(Sampling(fps=5.0).indices(100, 25.0)) == 20


def test_max_frames_limits_a_number_too():
    assert len(Sampling().indices(100, None, num_frames=50, max_frames=10)) == 10


def test_equals_transformers_where_it_can_be_imported():
    module = pytest.importorskip("transformers.models.qwen3_vl.video_processing_qwen3_vl")
    metadata = pytest.importorskip("transformers.video_utils").VideoMetadata
    pytest.importorskip("torchvision")
    theirs = module.Qwen3VLVideoProcessor()
    for total in (4, 25, 333, 3000):
        for rate in (23.976, 30.0):
            expected = theirs.sample_frames(metadata(total_num_frames=total, fps=rate))
            assert Sampling("spread").indices(total, rate) == expected.tolist()


@pytest.mark.parametrize(
    "total, source_fps, arguments, message",
    [
        (0, 25.0, {}, "no frames. Pass at least one"),
        (10, 25.0, {"fps": 2, "num_frames": 4}, "both given; choose one"),
        (10, None, {"fps": 2}, "own rate is unknown. Give source_fps too, or num_frames"),
        (10, 25.0, {"fps": 0}, "fps is 0; expected a positive number"),
        (10, 25.0, {"fps": float("nan")}, "fps is nan"),
        (10, -1.0, {}, r"source_fps is -1\.0"),
        (10, 25.0, {"num_frames": 2.5}, "whole number of frames"),
        (10, 25.0, {"num_frames": -3}, "num_frames is -3"),
        (10, 25.0, {"max_frames": 0}, "max_frames is 0"),
    ],
)
def test_what_cannot_be_sampled_is_a_video_error(total, source_fps, arguments, message):
    with pytest.raises(VideoError, match=message):
        Sampling().indices(total, source_fps, **arguments)
