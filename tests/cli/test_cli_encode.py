"""`vitgraph encode`."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from vitgraph import VisionEncoder

SMALL = ("--max-tokens", "128")


def test_good_and_bad_files(run, photos, tiny_qwen3, tmp_path):
    out = tmp_path / "e.safetensors"
    result = run("encode", tiny_qwen3, photos, "missing.png", "--out", out, "--batch", 2, *SMALL)
    assert result.exit_code == 1
    assert "2 of 4 inputs failed" in result.output
    assert "broken.jpg" in result.output
    assert "missing.png" in result.output
    assert "encoded 2 of 4 inputs" in result.output
    first, second = (photos / "a.png").as_posix(), (photos / "deep" / "b.JPG").as_posix()
    stored = load_file(out)
    assert set(stored) == {first, f"{first}.deepstack", second, f"{second}.deepstack"}
    assert stored[first].shape == (72, 48)
    assert stored[f"{first}.deepstack"].shape == (2, 72, 48)


def test_header_and_values(run, photos, tiny_qwen3, tmp_path):
    out, photo = tmp_path / "e.safetensors", photos / "a.png"
    assert run("encode", tiny_qwen3, photo, "--out", out, *SMALL).exit_code == 0
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
        tokens = file.get_tensor(photo.as_posix())
    assert metadata["family"] == "qwen3_vl"
    assert metadata["dtype"] == "float32"
    assert metadata["model"] == str(tiny_qwen3)
    assert json.loads(metadata["files"]) == [{"key": photo.as_posix(), "grid": [1, 18, 16], "tokens": 72}]
    with VisionEncoder.from_pretrained(tiny_qwen3) as encoder:
        alone = encoder.encode([photo], mode="eager")[0].tokens
    torch.testing.assert_close(tokens, alone, rtol=1e-4, atol=1e-5)


def test_an_existing_file_is_kept_without_force(run, photos, tiny_qwen3, tmp_path):
    out = tmp_path / "e.safetensors"
    out.write_text("precious")
    result = run("encode", tiny_qwen3, photos / "a.png", "--out", out, *SMALL)
    assert result.exit_code == 2
    assert "--force" in result.output
    assert out.read_text() == "precious"
    assert run("encode", tiny_qwen3, photos / "a.png", "--out", out, "--force", *SMALL).exit_code == 0
    assert load_file(out)


def test_all_files_bad(run, photos, tiny_qwen3, tmp_path):
    out = tmp_path / "e.safetensors"
    result = run("encode", tiny_qwen3, photos / "broken.jpg", "no/*.png", "--out", out, *SMALL)
    assert result.exit_code == 1
    assert "encoded none of 2 inputs" in result.output
    assert not out.exists()


def test_nothing_found_does_not_load_the_model(run, tmp_path):
    result = run("encode", "/no/such/checkpoint", "missing.png", "--out", tmp_path / "e.safetensors")
    assert result.exit_code == 1
    assert "no such file or folder" in result.output


def test_a_missing_folder_is_refused_before_any_work(run, photos, tmp_path):
    result = run("encode", "/no/such/checkpoint", photos, "--out", tmp_path / "no" / "e.safetensors")
    assert result.exit_code == 2
    assert "does not exist" in result.output


def test_a_video_file(run, tiny_qwen3, tmp_path):
    av = pytest.importorskip("av")
    clip, out = tmp_path / "clip.mp4", tmp_path / "e.safetensors"
    with av.open(str(clip), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for shade in range(0, 240, 30):
            frame = av.VideoFrame.from_image(Image.new("RGB", (128, 96), (shade, 80, 255 - shade)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    result = run("encode", tiny_qwen3, clip, "--num-frames", 4, "--out", out, *SMALL)
    assert result.exit_code == 0, result.output
    with safe_open(out, "pt") as file:
        (entry,) = json.loads(file.metadata()["files"])
    assert entry["grid"][0] == 2


def test_videos_without_the_extra_are_refused_before_any_work(run, tmp_path, monkeypatch):
    (tmp_path / "clip.mp4").write_bytes(b"")
    monkeypatch.setattr("vitgraph.commands.encode.find_spec", lambda _name: None)
    result = run("encode", "/no/such/checkpoint", tmp_path, "--out", tmp_path / "e.safetensors")
    assert result.exit_code == 2
    assert "vitgraph[video]" in result.output
