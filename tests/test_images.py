"""One reading of every picture: whatever it is stored as, the same upright, opaque RGB pixels."""

from __future__ import annotations

import base64
import os
import random
import struct
import threading
import time
import zlib
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

from tokenflex import images
from tokenflex.images import image_size, load_image, open_image


def noise(height=6, width=9, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def pixels(source, **options):
    return np.asarray(load_image(source, **options))


def encoded(image, format="PNG", **options):
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


# ---------------------------------------------------------------------- transparency


@pytest.mark.parametrize(
    ("mode", "format", "options"),
    [
        ("RGBA", "PNG", {}),
        ("LA", "PNG", {}),
        ("P", "PNG", {}),
        ("RGBA", "GIF", {}),
        ("RGBA", "WEBP", {"lossless": True}),
        ("RGBA", "TIFF", {}),
    ],
)
def test_transparent_pixels_are_white(mode, format, options):
    array = np.zeros((8, 8, 4), np.uint8)  # black ink on a transparent ground
    array[2:5, 2:5, 3] = 255
    image = Image.fromarray(array)
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    expected = np.full((8, 8, 3), 255, np.uint8)
    expected[2:5, 2:5] = 0
    for source in (image, encoded(image, format, **options)):
        assert np.array_equal(pixels(source), expected)


def test_a_half_transparent_pixel_is_mixed_with_white():
    assert pixels(Image.new("RGBA", (1, 1), (0, 100, 200, 128))).ravel().tolist() == [127, 177, 227]


@pytest.mark.parametrize(("mode", "color"), [("RGB", (9, 8, 7)), ("L", 5), ("1", 0), ("1", 255)])
def test_a_color_that_a_png_declares_transparent_is_white(mode, color):
    image = Image.new(mode, (4, 4), color)
    assert (pixels(encoded(image, transparency=color)) == 255).all()


def test_a_sixteen_bit_gray_that_a_png_declares_transparent_is_white():
    image = Image.fromarray(np.full((4, 4), 700, np.uint16))
    assert (pixels(encoded(image, transparency=700)) == 255).all()


def png(row: bytes, *, width: int, depth: int, color: int, transparent: bytes) -> bytes:
    """A PNG of one row, of depths and colors that Pillow does not write."""
    head = struct.pack(">IIBBBBB", width, 1, depth, color, 0, 0, 0)
    parts = [(b"IHDR", head), (b"tRNS", transparent), (b"IDAT", zlib.compress(b"\0" + row))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in [*parts, (b"IEND", b"")])


@pytest.mark.parametrize(
    ("row", "shape", "transparent", "levels"),
    [
        (b"\x1b", {"width": 4, "depth": 2, "color": 0}, (1,), [0, 255, 170, 255]),
        (b"\x01\x2f", {"width": 4, "depth": 4, "color": 0}, (1,), [0, 255, 34, 255]),
        (
            struct.pack(">6H", *[0x0102] * 3, *[0x0202] * 3),
            {"width": 2, "depth": 16, "color": 2},
            (0x0102,) * 3,
            [255, 2],
        ),
    ],
    ids=["2 bits", "4 bits", "16-bit color"],
)
def test_a_transparent_color_is_compared_at_the_depth_of_the_pixels(
    row, shape, transparent, levels
):
    content = png(row, **shape, transparent=struct.pack(f">{len(transparent)}H", *transparent))
    for _ in range(2):
        assert pixels(content)[0, :, 0].tolist() == levels


def test_premultiplied_gray_is_read_as_gray_with_alpha():
    image = Image.fromarray(noise(channels=2))
    for mode, source in (("La", image), ("RGBa", image.convert("RGBA"))):
        difference = pixels(source.convert(mode)).astype(int) - pixels(source)
        assert abs(difference).max() <= 2


# ---------------------------------------------------------------------- orientation


def turned(path, orientation, format):
    image = Image.fromarray(noise())
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    image.save(path, format, exif=exif, **options)
    with Image.open(path) as file:
        return np.asarray(ImageOps.exif_transpose(file).convert("RGB"))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_pixels_and_the_size(tmp_path, format, orientation):
    path = tmp_path / "a"
    expected = turned(path, orientation, format)
    image = open_image(path)
    assert np.array_equal(np.asarray(image), expected)
    assert image_size(path) == expected.shape[:2]
    assert np.array_equal(pixels(image), expected)  # a second reading turns nothing again
    with Image.open(path) as file:  # not decoded yet
        assert np.array_equal(pixels(file), expected)


def png_with(late: list[tuple[bytes, bytes]]) -> bytes:
    """A PNG with chunks between its pixels and its end."""
    content = encoded(Image.fromarray(noise()))
    return content[:-12] + b"".join(chunk(*one) for one in late) + content[-12:]


def test_an_orientation_behind_the_pixels_of_a_png_turns_the_size_as_well():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    late = png_with([(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))])
    assert open_image(BytesIO(late)).size == (6, 9)
    assert image_size(BytesIO(late)) == (9, 6)


def test_the_size_of_a_png_needs_no_pixels(monkeypatch):
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("decoded"))
    assert image_size(BytesIO(png_with([]))) == (6, 9)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning")
def test_a_damaged_exif_block_turns_nothing():
    content = encoded(Image.fromarray(noise()), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert open_image(BytesIO(content)).size == (9, 6)
    assert image_size(BytesIO(content)) == (6, 9)


@pytest.mark.parametrize("orientation", [0, 9, 58])
def test_an_unknown_orientation_turns_nothing(tmp_path, orientation):
    turned(tmp_path / "a", orientation, "JPEG")
    assert open_image(tmp_path / "a").size == (9, 6)
    assert image_size(tmp_path / "a") == (6, 9)


# ---------------------------------------------------------------------- ranges

RAMP = np.tile(np.arange(256), (4, 1))


@pytest.mark.parametrize(
    "values",
    [
        RAMP.astype(np.uint8),
        (RAMP * 257).astype(np.uint16),
        (RAMP * 257).astype(np.int32),
        (RAMP / 255).astype(np.float32),
        RAMP.astype(np.float32),
        RAMP.astype(np.int32),
        (RAMP * 257).astype(np.float32),
        (RAMP * 1e6).astype(np.float32),
        (RAMP * 1e6 - 7e7).astype(np.int32),
        (RAMP / 127.5 - 1).astype(np.float32),
    ],
    ids=lambda values: f"{values.dtype}-{values.max():.0f}",
)
def test_a_ramp_of_any_type_and_range_keeps_its_levels(values):
    expected = np.repeat(RAMP[..., None], 3, axis=2)
    assert np.array_equal(pixels(values), expected)
    assert np.array_equal(pixels(torch.from_numpy(values)), expected)
    if values.dtype != np.int64:
        image = Image.fromarray(values)
        assert np.array_equal(pixels(image), expected)
        assert np.array_equal(pixels(encoded(image, "TIFF")), expected)
    if values.dtype in (np.uint8, np.uint16):
        assert np.array_equal(pixels(encoded(image, "PNG")), expected)


def test_a_float_picture_may_exceed_its_range_by_a_little():
    values = np.array([[0.0, 0.5, 1.0, 1.04]])
    assert pixels(values)[0, :, 0].tolist() == [0, 128, 255, 255]


def test_booleans_are_black_and_white():
    assert pixels(np.array([[True, False]]))[0, :, 0].tolist() == [255, 0]
    assert pixels(Image.fromarray(np.array([[True, False]])))[0, :, 0].tolist() == [255, 0]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(value):
    array = np.zeros((4, 4), np.float32)
    array[1, 2] = value
    for source in (array, Image.fromarray(array)):
        with pytest.raises(ValueError, match=r"images\[3\] .*not finite"):
            load_image(source, "images[3]")


# ---------------------------------------------------------------------- sources


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_arrays_and_tensors_hold_channels_last_or_first(channels, dtype):
    array = noise(channels=channels)
    expected = np.broadcast_to(array, (6, 9, 3))
    values = array if dtype == np.uint8 else (array / 255).astype(dtype)
    for layout in (values, values.transpose(2, 0, 1)):
        assert np.array_equal(pixels(layout), expected)
        assert np.array_equal(pixels(torch.tensor(layout)), expected)


def test_the_custom_of_the_type_decides_where_both_ends_could_be_channels():
    array = noise(height=3)
    assert np.array_equal(pixels(array), array)
    assert np.array_equal(pixels(torch.tensor(array)), array.transpose(1, 2, 0))


def test_alpha_in_an_array_is_laid_over_white():
    array = noise(channels=4)
    expected = pixels(Image.fromarray(array))
    assert np.array_equal(pixels(array), expected)
    assert np.array_equal(pixels(torch.tensor(array.transpose(2, 0, 1)).bfloat16()), expected)


def test_every_source_of_one_picture_is_read_alike(tmp_path):
    image = Image.fromarray(noise())
    content = encoded(image)
    path = tmp_path / "a.png"
    path.write_bytes(content)
    text = base64.b64encode(content).decode()
    sources = [
        image,
        np.asarray(image),
        content,
        bytearray(content),
        BytesIO(content),
        path,
        str(path),
        text,
        "\n".join(text[i : i + 76] for i in range(0, len(text), 76)),
        f"data:image/png;base64,{text}",
    ]
    for source in sources:
        assert np.array_equal(pixels(source), noise()), type(source)


def test_an_rgb_picture_in_memory_is_not_copied():
    image = Image.fromarray(noise())
    assert load_image(image) is image


class Server(BaseHTTPRequestHandler):
    def do_GET(self):
        content = self.server.files.get(self.path)
        self.send_response(200 if content is not None else 404)
        self.end_headers()
        self.wfile.write(content or b"")

    def log_message(self, *arguments):
        pass


@pytest.fixture
def url():
    server = HTTPServer(("127.0.0.1", 0), Server)
    server.files = {"/a.png": encoded(Image.fromarray(noise())), "/page": b"<html>"}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield partial("http://127.0.0.1:{}/{}".format, server.server_port)
    server.shutdown()


def test_a_url_is_read(url):
    assert np.array_equal(pixels(url("a.png")), noise())


def test_a_url_that_cannot_be_read_is_named_without_its_query(url, monkeypatch):
    with pytest.raises(OSError, match=r"images\[0\]: http://127.*none\.png cannot be read") as info:
        load_image(url("none.png?token=secret"), "images[0]")
    assert "secret" not in str(info.value)
    with pytest.raises(ValueError, match="Pillow finds no picture"):
        load_image(url("page"))
    monkeypatch.setattr(images, "MAX_DOWNLOAD", 20)
    with pytest.raises(ValueError, match="more than 20 bytes"):
        load_image(url("a.png"))


def test_no_more_of_a_url_is_read_than_the_bound(url):
    size = len(encoded(Image.fromarray(noise())))
    assert np.array_equal(pixels(url("a.png"), max_download=size), noise())
    with pytest.raises(ValueError, match=f"more than {size - 1} bytes"):
        load_image(url("a.png"), max_download=size - 1)


class Slow(BaseHTTPRequestHandler):
    """An answer that never ends, or one without end before its first byte."""

    def do_GET(self):
        with suppress(OSError):
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", "/body")
            elif self.path == "/away":
                self.send_response(302)
                self.send_header("Location", "file:///etc/hostname")
            if self.path == "/body":
                self.send_response(200)
            if self.path == "/head":
                self.wfile.write(b"HTTP/1.0 200 OK\r\nX: ")
            else:
                self.end_headers()
            while self.path in ("/body", "/head"):
                self.wfile.write(b"x")
                time.sleep(0.02)

    def log_message(self, *arguments):
        pass


@pytest.mark.parametrize("path", ["body", "head", "moved"])
def test_a_server_that_drips_is_left(path, monkeypatch):
    monkeypatch.setattr(images, "DOWNLOAD_SECONDS", 0.3)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    start = time.monotonic()
    with pytest.raises(OSError, match=r"cannot be read: it takes longer than 0\.3 seconds"):
        load_image(f"http://127.0.0.1:{server.server_port}/{path}")
    assert time.monotonic() - start < 5
    with pytest.raises(OSError, match="file:"):
        load_image(f"http://127.0.0.1:{server.server_port}/away")
    server.shutdown()
    server.server_close()


def jpeg_of_scans(number, metadata=b"", behind=b""):
    """A gray progressive JPEG of 64 x 64: one scan of its means, and empty ones of the rest."""

    def segment(marker, content):
        return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content

    table = bytes([1, 1, *[0] * 14, 0xE0, 0])
    head = b"\xff\xd8" + segment(0xE3, metadata) + segment(0xDB, b"\0" + b"\1" * 64)
    head += segment(0xC2, struct.pack(">BHHB", 8, 64, 64, 1) + bytes([1, 0x11, 0]))
    head += segment(0xC4, bytes([0, 1, *[0] * 16])) + segment(0xC4, b"\x10" + table)
    first = segment(0xDA, bytes([1, 1, 0, 0, 0, 0])) + bytes(8)
    others = segment(0xDA, bytes([1, 1, 0, 1, 63, 0])) + b"\x00\xff\0"
    return head + first + others * (number - 1) + b"\xff\xd9" + behind


def test_a_jpeg_of_endless_scans_is_refused(tmp_path):
    assert pixels(jpeg_of_scans(100)).shape == (64, 64, 3)
    bomb = jpeg_of_scans(101)
    (tmp_path / "bomb.jpg").write_bytes(bomb)
    for source in (bomb, str(tmp_path / "bomb.jpg"), Image.open(BytesIO(bomb))):
        with pytest.raises(ValueError, match="more than 100 scans"):
            load_image(source)
    scans = b"\xff\xda\0\2" * 1000
    assert pixels(jpeg_of_scans(3, metadata=scans, behind=b"\0\0" + scans)).shape == (64, 64, 3)


def png_of_chunks(number):
    head, body = encoded(Image.fromarray(noise()))[:33], encoded(Image.fromarray(noise()))[33:]
    empty = struct.pack(">I", 0) + b"prVt" + struct.pack(">I", zlib.crc32(b"prVt"))
    return head + empty * number + body


def test_a_file_of_endless_pieces_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(images, "MAX_READS", 1000)
    assert np.array_equal(pixels(png_of_chunks(100)), noise())
    (tmp_path / "bomb.png").write_bytes(png_of_chunks(1000))
    for source in (png_of_chunks(1000), tmp_path / "bomb.png"):
        with pytest.raises(ValueError, match="more than 1000 pieces"):
            load_image(source)


def test_a_tiff_of_endless_strips_is_refused(monkeypatch):
    content = encoded(Image.fromarray(noise(8, 9)), "TIFF", tiffinfo={278: 1})  # a row each
    assert np.array_equal(pixels(content), noise(8, 9))
    monkeypatch.setattr(images, "MAX_STRIPS", 7)
    with pytest.raises(ValueError, match="8 strips or tiles, more than 7"):
        load_image(content)


def test_a_plain_picture_of_endless_comments_is_refused():
    head = b"P2 4 4 255\n"
    assert pixels(head + b"# a comment\n" * 900 + b"7 " * 16).shape == (4, 4, 3)
    with pytest.raises(ValueError, match="more than 1000 comments"):
        load_image(head + b"#\n" * 1001 + b"7 " * 16)


PAYLOAD = base64.b64encode(noise(40, 40).tobytes()).decode()


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        ("no/such.png", FileNotFoundError, r"no/such\.png does not exist"),
        ("no such file", FileNotFoundError, "no such file does not exist"),
        (Path("no/such.png"), FileNotFoundError, r"no/such\.png does not exist"),
        (PAYLOAD, ValueError, "Pillow finds no picture"),
        (PAYLOAD + "*", ValueError, f"got a text of {len(PAYLOAD) + 1} characters"),
        (PAYLOAD[:97], ValueError, "got a text of 97 characters"),
        (PAYLOAD[:255].replace("+", "-"), ValueError, "got a text of 255 characters"),
        (Path(PAYLOAD[:3000]), FileNotFoundError, "of a path of .* characters does not exist"),
        ("data:image/png;base64," + PAYLOAD, ValueError, "Pillow finds no picture"),
        ("data:image/png," + PAYLOAD, ValueError, "data URL in base64"),
        ("data:image/png;base64,%%" + PAYLOAD, ValueError, "not base64"),
        (PAYLOAD.encode(), ValueError, "Pillow finds no picture"),
        (b"", ValueError, "Pillow finds no picture"),
        (7, TypeError, "got int"),
        (None, TypeError, "got NoneType"),
        ({"url": PAYLOAD}, TypeError, "got dict"),
        (np.zeros((3, 4, 5, 6)), ValueError, r"got \[3, 4, 5, 6\]"),
        (np.zeros((9, 9, 5)), ValueError, r"got \[9, 9, 5\]"),
        (np.zeros((0, 4, 3)), ValueError, r"no pixels, but shape \[0, 4, 3\]"),
        (np.array([["a"]]), ValueError, "integers or floats"),
        (np.zeros((2, 2), complex), ValueError, "integers or floats"),
    ],
    ids=range(21),
)
def test_a_refusal_says_what_was_expected_and_never_prints_the_payload(source, error, words):
    with pytest.raises(error, match=words) as info:
        load_image(source, "images[2]")
    assert PAYLOAD[:40] not in str(info.value)
    assert len(str(info.value)) < 400


def test_a_cut_picture_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(Image.fromarray(noise(60, 60)))[:-2000])
    with pytest.raises(ValueError, match=r"image file .*a\.png cannot be read: "):
        open_image(path)
    assert image_size(path) == (60, 60)


# ---------------------------------------------------------------------- strangers


@pytest.mark.parametrize("name", ["a.png", "a.eps", "a"])
def test_postscript_starts_no_program(tmp_path, monkeypatch, name):
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    head = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n"
    (tmp_path / name).write_bytes(head)
    for source in (tmp_path / name, head, base64.b64encode(head).decode()):
        with pytest.raises(ValueError, match="Pillow finds no picture"):
            load_image(source)
    with pytest.raises(ValueError, match="Pillow finds no picture"):
        image_size(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def declared(width, height):
    """A PNG of a few bytes whose head declares any size."""
    content = bytearray(encoded(Image.new("L", (1, 1))))
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


@pytest.mark.filterwarnings("ignore:Image size:PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(20_000, 20_000), (9_460, 9_460), (2**31 - 1, 1), (60_000, 3000)])
def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(size):
    content = declared(*size)
    with pytest.raises(ValueError, match="pixels"):
        open_image(BytesIO(content))
    with pytest.raises(ValueError, match="pixels"):
        image_size(BytesIO(content))


def test_the_bound_on_pixels_is_adjusted_by_the_environment(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    image = Image.fromarray(noise())  # of 54 pixels
    monkeypatch.setenv("TOKENFLEX_MAX_PIXELS", "53")
    for source in (image, encoded(image), noise()):
        with pytest.raises(ValueError, match=r"it has 9 x 6 pixels, more than the 53"):
            load_image(source)
    monkeypatch.setenv("TOKENFLEX_MAX_PIXELS", "54")
    assert load_image(image) is image
    monkeypatch.setenv("TOKENFLEX_MAX_PIXELS", str(10**9))
    assert image_size(BytesIO(declared(20_000, 30_000))) == (30_000, 20_000)


@pytest.mark.parametrize("text", ["0", "-5", "1e6", "many"])
def test_a_bound_that_is_no_number_is_refused(monkeypatch, text):
    monkeypatch.setenv("TOKENFLEX_MAX_PIXELS", text)
    with pytest.raises(ValueError, match=f"must be a positive integer, got '{text}'"):
        load_image(Image.new("RGB", (1, 1)))


def test_sixteen_bit_values_are_rounded_to_the_nearest_level():
    values = np.array([[0, 128, 129, 65406, 65407, 65535]], np.uint16)
    assert pixels(values)[0, :, 0].tolist() == [0, 0, 1, 254, 255, 255]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:Image size")
@pytest.mark.parametrize("format", images.FORMATS)
def test_a_damaged_file_is_read_or_refused_by_a_value_error(format):
    generator = random.Random(format)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    options = {"exif": exif} if format in ("AVIF", "JPEG", "PNG", "TIFF", "WEBP") else {}
    try:
        whole = encoded(Image.fromarray(noise(20, 30)), format, **options)
    except (KeyError, OSError):
        pytest.skip(f"Pillow was built without {format}")
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(generator.choice([1, 2, 5])):
            content[generator.randrange(generator.choice([40, len(content)]))] = (
                generator.randrange(256)
            )
        with suppress(ValueError):
            image = open_image(BytesIO(content))
            assert image_size(BytesIO(content)) == (image.height, image.width)
