"""Every way to hand in an image, and every way to get it wrong."""

from __future__ import annotations

import base64
import pathlib
import struct
import threading
import warnings
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import encode
from vitgraph.errors import ImageError
from vitgraph.preprocess import load as load_module
from vitgraph.preprocess import load_image


def pixels(source: object, **options: object) -> np.ndarray:
    image = load_image(source, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


# Sources


def test_path_bytes_and_data_uri_agree(cat, cat_jpeg, tmp_path):
    path = tmp_path / "cat.jpg"
    path.write_bytes(cat_jpeg)
    uri = "data:image/jpeg;base64," + base64.b64encode(cat_jpeg).decode()
    for source in (path, str(path), cat_jpeg, bytearray(cat_jpeg), memoryview(cat_jpeg), uri, cat):
        np.testing.assert_array_equal(pixels(source), np.asarray(cat))


@pytest.fixture
def server(cat_jpeg):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(404 if "missing" in self.path else 200)
            self.end_headers()
            self.wfile.write(b"<html>" if "page" in self.path else cat_jpeg)

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_url(server, cat):
    np.testing.assert_array_equal(pixels(f"{server}/cat.jpg"), np.asarray(cat))


def test_url_failures_are_image_errors(server, monkeypatch):
    with pytest.raises(ImageError, match=r"HTTP status 404 .*Check the address"):
        load_image(f"{server}/missing.jpg")
    with pytest.raises(ImageError, match="is no image that can be decoded"):
        load_image(f"{server}/page")
    with pytest.raises(ImageError, match="cannot be downloaded"):
        load_image("http://127.0.0.1:9/cat.jpg")
    with pytest.raises(ImageError, match="cannot be downloaded"):
        load_image("http://[broken/cat.jpg")
    monkeypatch.setattr(load_module, "MAX_DOWNLOAD_BYTES", 100)
    with pytest.raises(ImageError, match=r"longer than 100 bytes.*pass its path"):
        load_image(f"{server}/cat.jpg")


# Modes


def test_exif_orientation_is_applied(cat):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    turned = pixels(encode(cat, "PNG", exif=exif))
    np.testing.assert_array_equal(turned, np.rot90(np.asarray(cat), -1))


def test_equals_the_loader_of_transformers_on_opaque_files(cat, tmp_path):
    theirs = pytest.importorskip("transformers.image_utils").load_image
    exif = PIL.Image.Exif()
    exif[0x0112] = 8
    for number, (image, format) in enumerate(
        [(cat, "JPEG"), (cat.convert("L"), "PNG"), (cat.convert("P"), "GIF"), (cat.convert("CMYK"), "JPEG")]
    ):
        path = tmp_path / f"{number}"
        path.write_bytes(encode(image, format, exif=exif) if format != "GIF" else encode(image, format))
        np.testing.assert_array_equal(pixels(path), np.asarray(theirs(str(path))))


def test_transparency_goes_onto_white():
    image = PIL.Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    expected = [[[255, 255, 255], [10, 20, 30]]]
    assert pixels(image).tolist() == expected
    assert pixels(encode(image, "PNG")).tolist() == expected
    larger = np.asarray(image.resize((10, 5), PIL.Image.Resampling.NEAREST))
    assert pixels(larger)[0, ::9].tolist() == expected[0]
    assert pixels(torch.tensor(larger).permute(2, 0, 1))[0, ::9].tolist() == expected[0]


def test_16_bit_grey_keeps_its_high_byte():
    deep = np.array([[0, 256, 0x8000, 0xFFFF]], dtype=np.uint16)
    image = PIL.Image.fromarray(deep)
    for source in (image, encode(image, "PNG"), encode(image, "TIFF")):
        assert pixels(source)[..., 0].tolist() == [[0, 1, 128, 255]]


def test_deep_modes_of_unknown_range_are_image_errors():
    for dtype in (np.int32, np.float32):
        image = PIL.Image.fromarray(np.array([[0, 70_000]], dtype=dtype))
        with pytest.raises(ImageError, match=r"from 0 to 7e\+04.*Scale it to 8 bits"):
            load_image(image)
    small = PIL.Image.fromarray(np.array([[0, 200]], dtype=np.int32))
    assert pixels(small)[..., 0].tolist() == [[0, 200]]


# Arrays and tensors


def test_layouts(cat):
    rgb = np.asarray(cat)
    grey = np.asarray(cat.convert("L"))
    for kind in (np.asarray, torch.tensor):
        np.testing.assert_array_equal(pixels(kind(rgb)), rgb)
        np.testing.assert_array_equal(pixels(kind(rgb.transpose(2, 0, 1).copy())), rgb)
        for shape in (grey.shape, (*grey.shape, 1), (1, *grey.shape)):
            np.testing.assert_array_equal(pixels(kind(grey.reshape(shape))), np.stack([grey] * 3, axis=-1))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_byte_survives_division_by_255(dtype):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(pixels(ramp.astype(dtype) / 255)[..., 0], ramp)
    np.testing.assert_array_equal(pixels(torch.from_numpy(ramp.astype(dtype)) / 255)[..., 0], ramp)


def test_half_precision_and_gradients():
    ones = torch.ones(3, 5, 7, dtype=torch.bfloat16, requires_grad=True)
    assert (pixels(ones) == 255).all()
    assert (pixels(np.full((5, 7), 0.5, dtype=np.float16)) == 128).all()
    assert (pixels(torch.zeros(5, 7).bool().float()) == 0).all()


def test_strided_arrays(cat):
    rgb = np.asarray(cat)
    np.testing.assert_array_equal(pixels(rgb[::-2, ::3]), rgb[::-2, ::3])
    np.testing.assert_array_equal(pixels(torch.tensor(rgb)[::2, ::3]), rgb[::2, ::3])


@pytest.mark.parametrize(
    "array, message",
    [
        (np.zeros((2, 4, 4, 3), np.uint8), r"expected \[H, W, 3\].*one image at a time"),
        (np.zeros(9, np.uint8), r"shape \(9,\) is no image"),
        (np.zeros((5, 6, 7), np.uint8), r"shape \(5, 6, 7\) is no image"),
        (np.zeros((0, 6, 3), np.uint8), "has no pixels. Check the crop"),
        (torch.zeros(3, 0, 4), "has no pixels"),
        (np.zeros((4, 4, 3), np.int64), "dtype int64; expected uint8, or floats"),
        (np.zeros((4, 4, 3), np.uint16), "dtype uint16"),
        (np.zeros((4, 4, 3), bool), "dtype bool"),
        (np.zeros((4, 4, 3), complex), "dtype complex128"),
        (np.full((4, 4, 3), "x"), "dtype <U1"),
        (np.full((4, 4, 3), 255.0), r"from 255 to 255; expected \[0, 1\]. Divide by 255"),
        (np.full((4, 4, 3), -1.0), "from -1 to -1"),
        (torch.full((3, 4, 4), float("nan")), "NaN or infinite"),
        (np.full((4, 4, 3), np.inf), "NaN or infinite"),
    ],
)
def test_bad_arrays_are_image_errors(array, message):
    with pytest.raises(ImageError, match=message):
        load_image(array)


# Damage


@pytest.mark.parametrize("source", [None, 7, 1.5, [1, 2], object(), {"url": "x"}, {1, 2}])
def test_other_types_are_image_errors(source):
    with pytest.raises(ImageError, match=r"is no image\. Pass a path, an http"):
        load_image(source)


def test_bad_paths_are_image_errors(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "notes.jpg").write_text("not a picture")
    for source, message in [
        (tmp_path / "gone.jpg", r"there is no file .*gone\.jpg.*Check the path"),
        (tmp_path, "is a folder.*Pass the files in it"),
        (tmp_path / "empty.jpg", r"is empty \(0 bytes\)"),
        (tmp_path / "notes.jpg", "is no image that can be decoded.*Check that the file is complete"),
        ("x" * 9000, r"\(9000 characters\).* is no usable path"),
        ("a\0b", "no usable path|there is no file"),
        ("", "folder|no file"),
    ]:
        with pytest.raises(ImageError, match=message):
            load_image(source)


@pytest.mark.parametrize(
    "uri, message",
    [
        ("data:image/png;base64,@@@", "valid base64"),
        ("data:image/png;base64", "has no comma"),
        ("data:image/png;base64,", r"no data \(0 bytes\)"),
        ("data:text/plain,hello", "cannot be|can be decoded"),
    ],
)
def test_bad_data_uris_are_image_errors(uri, message):
    with pytest.raises(ImageError, match=message):
        load_image(uri)


def test_bad_bytes_are_image_errors(cat_jpeg):
    for data, message in [
        (b"", r"no data \(0 bytes\)"),
        (b"GIF89a", "decoded"),
        (cat_jpeg[: len(cat_jpeg) // 2], "cannot be decoded.*truncated"),
    ]:
        with pytest.raises(ImageError, match=message):
            load_image(data)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "ICO", "PPM"]), st.data())
def test_damaged_files_raise_nothing_but_image_errors(format, data):
    file = bytearray(encode(PIL.Image.linear_gradient("L").resize((20, 20)).convert("RGB"), format))
    for _ in range(data.draw(st.integers(1, 8))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(file)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = load_image(bytes(file[:cut]), max_pixels=10_000_000)
        except ImageError:
            return
    assert image.mode == "RGB" and min(image.size) > 0


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_leaves_the_image_upright(cat):
    damaged = encode(cat, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff\x01")
    assert load_image(damaged).size == cat.size


def test_empty_and_closed_pil_images_are_image_errors(cat_jpeg, tmp_path):
    with pytest.raises(ImageError, match="0x5 pixels: empty"):
        load_image(PIL.Image.new("RGB", (0, 5)))
    path = tmp_path / "half.jpg"
    path.write_bytes(cat_jpeg[:5000])
    with PIL.Image.open(path) as lazy, pytest.raises(ImageError, match="cannot be decoded"):
        load_image(lazy)
    with pytest.raises(ImageError, match="cannot be decoded"):
        load_image(lazy)


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises pixels and has none."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(head) - 4) + head + struct.pack(">I", zlib.crc32(head))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


def test_a_bomb_is_refused_on_its_header():
    with pytest.raises(ImageError, match=r"50x50 = 2500 pixels; at most 2499 .*raise max_pixels"):
        load_image(png_header(50, 50), max_pixels=2499)
    with pytest.raises(ImageError, match=r"MAX_IMAGE_PIXELS"):
        load_image(png_header(60_000, 60_000))
    with pytest.raises(ImageError, match=r"at most 178956970"):
        load_image(PIL.Image.new("1", (20_000, 10_000)))


def test_pillows_warning_does_not_leak():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match="cannot be decoded"):
            load_image(png_header(10_000, 10_000))


def test_nothing_is_left_open(cat_jpeg, tmp_path):
    path = pathlib.Path(tmp_path / "cat.jpg")
    path.write_bytes(cat_jpeg)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        load_image(path)
