from __future__ import annotations

from importlib.resources import files

from vitgraph.assets import PHOTOGRAPHS, sample_photographs


def test_every_photograph_is_small_credited_and_rgb(photographs):
    credits = (files("vitgraph.assets") / "CREDITS.md").read_text(encoding="utf-8")
    assert len(photographs) == len(PHOTOGRAPHS) >= 4
    for path in sample_photographs():
        image = photographs[path.name]
        assert len(path.read_bytes()) < 60_000
        assert image.mode == "RGB"
        assert f"| {path.name} | {image.width} x {image.height} |" in credits


def test_sizes_and_orientations_differ(photographs):
    sizes = {image.size for image in photographs.values()}
    assert len(sizes) == len(photographs)
    assert any(height > width for width, height in sizes)
    assert any(height < width for width, height in sizes)
