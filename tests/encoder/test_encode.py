"""encode(): every kind of input, and bad ones that fail alone."""

from __future__ import annotations

import http.server
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitgraph import BatchError, Grid, Patches, Video, VisionEncoder
from vitgraph.assets import sample_photographs
from vitgraph.errors import ImageError, InputError, PatchError
from vitgraph.models.tiny import write_tiny_checkpoint


@pytest.fixture(scope="module", params=["qwen3_vl", "kimi_vl"])
def encoder(request, tmp_path_factory) -> VisionEncoder:
    folder = write_tiny_checkpoint(request.param, tmp_path_factory.mktemp(request.param))
    return VisionEncoder.from_pretrained(folder, device="cpu")


@pytest.fixture
def photograph() -> Path:
    return Path(str(sample_photographs()[0]))


@pytest.fixture
def url(photograph: Path):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=photograph.parent))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/{photograph.name}"
    server.shutdown()
    server.server_close()


def test_one_picture_in_every_form_gives_one_embedding(encoder: VisionEncoder, photograph: Path, url: str) -> None:
    picture = Image.open(photograph).convert("RGB")
    array = np.asarray(picture)
    forms = [
        photograph,
        str(photograph),
        photograph.read_bytes(),
        url,
        picture,
        array,
        torch.from_numpy(array.copy()),
        torch.from_numpy(array.copy()).permute(2, 0, 1),
        encoder.prepare(photograph),
    ]
    want, *others = encoder.encode(forms)
    for other in others:
        assert torch.equal(other.tokens, want.tokens)
        assert other.grid == want.grid


def test_sizes_mix_and_come_back_in_order(encoder: VisionEncoder) -> None:
    photographs = [Image.open(p).convert("RGB") for p in sample_photographs()]
    batch = [p.resize((p.width // n, p.height // n)) for n in (1, 2, 3) for p in photographs]
    for picture, embedding in zip(batch, encoder.encode(batch), strict=True):
        (alone,) = encoder.encode([picture], mode="eager")
        torch.testing.assert_close(embedding.tokens, alone.tokens, rtol=1e-5, atol=1e-5)


def bad_inputs(folder: Path, photograph: Path) -> dict[str, tuple[object, type[InputError], str]]:
    truncated = folder / "truncated.jpg"
    truncated.write_bytes(photograph.read_bytes()[: photograph.stat().st_size // 2])
    rows = np.zeros((64, 7), np.float32)
    return {
        "truncated": (truncated, ImageError, "truncated"),
        "empty": (np.zeros((0, 10, 3), np.uint8), ImageError, "0"),
        "no picture": (b"hello", ImageError, "image"),
        "missing": (folder / "nothing.png", ImageError, "nothing.png"),
        "bomb": (bomb(folder / "bomb.png"), ImageError, "pixels"),
        "wrong dtype": (np.zeros((10, 10, 3), np.int64), ImageError, "int64"),
        "wrong rank": (np.zeros((2, 2, 2, 2, 3), np.uint8), ImageError, "shape|rank|dim"),
        "NaN": (np.full((32, 32, 3), np.nan, np.float32), ImageError, "(?i)nan|finite"),
        "unknown": (object(), ImageError, "object"),
        "patches": (Patches(rows, Grid(1, 8, 8)), PatchError, "7"),
        "NaN patches": (Patches(np.full((64, 1536), np.nan, np.float32), Grid(1, 8, 8)), PatchError, "(?i)nan|shape"),
    }


def bomb(path: Path) -> Path:
    """A small file of 900 million pixels."""
    Image.new("1", (30000, 30000)).save(path)
    return path


def test_bad_inputs_fail_alone_with_a_typed_error(encoder: VisionEncoder, photograph: Path, tmp_path: Path) -> None:
    bad = bad_inputs(tmp_path, photograph)
    batch = [photograph]
    for value, _, _ in bad.values():
        batch += [value, photograph]
    results = encoder.encode(batch, on_error="return")
    (want,) = encoder.encode([photograph])
    for i, (name, (_, kind, message)) in enumerate(bad.items()):
        error = results[2 * i + 1]
        assert isinstance(error, kind), f"{name}: {error!r}"
        with pytest.raises(kind, match=message):
            raise error
        torch.testing.assert_close(results[2 * i].tokens, want.tokens, rtol=1e-5, atol=1e-5)


def test_a_batch_error_carries_the_good_ones(encoder: VisionEncoder, photograph: Path) -> None:
    with pytest.raises(BatchError, match="1 of 3 items failed") as caught:
        encoder.encode([photograph, b"hello", photograph])
    error = caught.value
    assert list(error.errors) == [1]
    assert torch.equal(error.results[0].tokens, error.results[2].tokens)


def test_a_strip_is_refused_by_smart_resize_or_encoded(encoder: VisionEncoder) -> None:
    strip = Image.new("RGB", (10000, 1), "red")
    (result,) = encoder.encode([strip], on_error="return")
    assert isinstance(result, ImageError)


def test_a_single_image_must_be_wrapped(encoder: VisionEncoder, photograph: Path) -> None:
    for image in (photograph, str(photograph), Image.open(photograph)):
        with pytest.raises(InputError, match=r"encode\(\[x\]\)"):
            encoder.encode(image)


def test_clips(encoder: VisionEncoder) -> None:
    frames = [np.full((64, 96, 3), shade, np.uint8) for shade in (0, 80, 160, 240)]
    (result,) = encoder.encode([Video(frames)], on_error="return")
    if "video" in encoder.spec.modalities:
        assert result.grid.t == 2
        assert len(result.tokens) == result.grid.patches // 4
    else:
        assert isinstance(result, InputError)
