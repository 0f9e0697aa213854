"""Images of strangers: types, limits before decoding, damaged files, data URLs, and files below allowed folders alone."""

import base64
import os
import resource
import struct
import sys
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_checkpoints import make_image

from llava.serve.service.image_input import (
    FORMATS,
    ImageLimits,
    ImageRefused,
    picture_from_bytes,
    picture_from_data_url,
    picture_from_file,
    picture_from_folders,
)

LIMITS = ImageLimits(max_bytes=200_000, max_pixels=40_000, max_side=300)


def written(image, kind="PNG", **options):
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def data_url(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width, height, body=b""):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def webp_header(width, height, kind="VP8X"):
    if kind == "VP8X":
        body = b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + (width - 1).to_bytes(3, "little")
        body += (height - 1).to_bytes(3, "little")
    elif kind == "VP8L":
        body = b"VP8L" + struct.pack("<I", 5) + b"\x2f" + (width - 1 | (height - 1) << 14).to_bytes(4, "little")
    else:
        body = b"VP8 " + struct.pack("<I", 10) + b"\0\0\0\x9d\x01\x2a" + struct.pack("<HH", width, height)
    body += b"\0" * 20
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
def test_every_type(kind, mode):
    if kind == "JPEG" and mode == "P":
        mode = "CMYK"
    image = make_image(50, 30).convert(mode)
    options = {"lossless": True} if kind == "WEBP" else {}
    opened = picture_from_bytes(written(image, kind, **options), LIMITS)
    assert opened.mode == "RGB" and opened.size == (50, 30)
    if kind != "JPEG" and (kind, mode) != ("GIF", "RGB"):  # which keep not all colours
        assert np.array_equal(np.asarray(opened), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_an_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (20, 10), color) for color in ("red", "lime", "blue")]
    data = written(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    assert picture_from_bytes(data, LIMITS).getpixel((3, 3)) == (255, 0, 0)


def test_exif_orientation_is_applied():
    image = make_image(50, 30)
    for orientation, size in ((1, (50, 30)), (3, (50, 30)), (6, (30, 50)), (8, (30, 50))):
        exif = Image.Exif()
        exif[0x0112] = orientation
        assert picture_from_bytes(written(image, "JPEG", exif=exif), LIMITS).size == size
    broken = written(image, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12" * 9)
    assert picture_from_bytes(broken, LIMITS).size == (50, 30)


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "not an image that can be read, allowed are PNG, JPEG, WEBP, GIF, BMP"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (written(make_image(9, 9), "TIFF"), "not an image"),
        (written(make_image(9, 9), "ICO"), "not an image"),
        (b"x" * 200_001, "an image of 200,001 bytes, allowed are 200,000"),
        (png_header(0, 5), "not an image"),
        (png_header(201, 200), "an image of 201 x 200 pixels, allowed are 40,000 pixels altogether"),
        (png_header(301, 2), "an image of 301 x 2 pixels, allowed are 300 for the longer side"),
        (png_header(60_000, 60_000), "an image of (60,000 x 60,000|too many) pixels"),
        (webp_header(16_000, 16_000), "an image of 16,000 x 16,000 pixels"),
        (webp_header(16_000, 15_000, "VP8L"), "an image of 16,000 x 15,000 pixels"),
        (webp_header(15_000, 16_000, "VP8 "), "an image of 15,000 x 16,000 pixels"),
        (written(make_image(50, 30))[:-700], "damaged or cut short"),
        (written(make_image(50, 30), "JPEG")[:400], "damaged or cut short"),
        (b"GIF89a\x05\0\x05\0", "(damaged or cut short|not an image)"),
    ],
    ids=range(16),
)
def test_refused_with_a_sentence(data, words):
    with pytest.raises(ImageRefused, match=words) as refusal:
        picture_from_bytes(data, LIMITS)
    assert len(str(refusal.value)) < 300 and "\n" not in str(refusal.value)


def test_webp_headers_are_read_as_pillow_reads_them():
    for options in (
        {"lossless": True},
        {"quality": 50},
        {"lossless": True, "exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0"},
    ):
        data = written(make_image(61, 97), "WEBP", **options)
        assert picture_from_bytes(data, LIMITS).size == (61, 97)
        with pytest.raises(ImageRefused, match="an image of 61 x 97 pixels"):
            picture_from_bytes(data, ImageLimits(max_pixels=61 * 97 - 1))


def test_bombs_are_refused_before_they_are_decoded():
    """36 MP of zeros in 100 kB, and headers of billions of pixels: memory does not grow by a tenth of what they hold."""
    zeros = zlib.compress(b"\0" * (3 * 6000 + 1) * 6000, 9)
    limits = ImageLimits(max_pixels=30_000_000)
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    bombs = [png_header(6000, 6000, zeros), png_header(50_000, 50_000, zeros), webp_header(16_383, 16_383)]
    bombs += [
        written(Image.new("1", (8000, 8000)), "GIF"),
        b"BM" + struct.pack("<IIIIiiHHI", 0, 0, 54, 40, 30000, 30000, 1, 24, 0) + b"\0" * 24,
    ]
    for bomb in bombs:
        assert len(bomb) < 200_000
        with pytest.raises(ImageRefused, match="pixels"):
            picture_from_bytes(bomb, limits)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before < 60 << 20


def test_data_urls():
    data = written(make_image(50, 30))
    assert picture_from_data_url(data_url(data), LIMITS).size == (50, 30)
    # What the type says does not count: the content does.
    assert picture_from_data_url(data_url(data, "image/jpeg;charset=x"), LIMITS).size == (50, 30)
    # Case, blanks and line breaks do not matter, as where a file was folded into lines.
    lines = base64.encodebytes(data).decode()
    for head in (
        "DATA:image/png;base64,",
        "Data:Image/PNG;BASE64,",
        " data: image/png; base64 ,",
        "\ndata:image/png;\nbase64,",
    ):
        for body in (lines, lines.replace("\n", "\r\n"), " " + lines.replace("\n", "\t ")):
            assert picture_from_data_url(head + body + "\n", LIMITS).size == (50, 30)
    for url, words in (
        ("data:text/html;base64,AAAA", "a data URL that begins with 'data:text/html;base64'"),
        ("data:image/png,AAAA", "allowed is data:image/...;base64"),
        ("data:image/png;base64", "allowed is data:image/...;base64"),
        ("data:", "allowed is data:image/...;base64"),
        ("data:image/png;base64,****", "base64 cannot be read"),
        ("data:image/png;base64,AAA", "base64 cannot be read"),
        ("data:image/png;base64,\u00e9\ud800", "base64 cannot be read"),
        ("data:image/png;base64,", "not an image"),
        (data_url(b"<html>"), "not an image"),
        (data_url(b"x" * 200_010), "an image of some 200,010 bytes, allowed are 200,000"),
    ):
        with pytest.raises(ImageRefused, match=words):
            picture_from_data_url(url, LIMITS)


@pytest.fixture
def folders(tmp_path):
    """Two allowed folders, with links that lead out of them, beside a secret."""
    for folder in ("allowed/inner", "also", "secret"):
        (tmp_path / folder).mkdir(parents=True)
    data = written(make_image(50, 30))
    for name in ("allowed/a b.png", "allowed/inner/c.png", "also/d.png", "secret/s.png"):
        (tmp_path / name).write_bytes(data)
    (tmp_path / "allowed/text.png").write_text("no image")
    (tmp_path / "allowed/out.png").symlink_to(tmp_path / "secret/s.png")
    (tmp_path / "allowed/out").symlink_to(tmp_path / "secret")
    (tmp_path / "allowed/in.png").symlink_to("inner/c.png")
    (tmp_path / "allowed/loop").symlink_to("loop")
    os.mkfifo(tmp_path / "allowed/pipe.png")
    return tmp_path


def test_files_of_allowed_folders(folders):
    allowed = [folders / "allowed", folders / "also"]
    for name in (
        *("a b.png", "inner/c.png", "inner/../a b.png", "d.png", "in.png"),
        str(folders / "allowed/a b.png"),
        f"file://{folders}/allowed/a%20b.png",
        f"file://localhost{folders}/also/d.png",
    ):
        assert picture_from_folders(name, allowed, LIMITS).size == (50, 30)


def test_nothing_else_can_be_reached(folders):
    allowed, secret = [folders / "allowed"], folders / "secret/s.png"
    outside = "is not a file below a folder that images may come from"
    for name in (
        *("../secret/s.png", "out.png", "out/s.png", "inner/../../secret/s.png", str(secret), f"file://{secret}"),
        *("d.png", "missing.png", "", ".", "inner", "loop", "pipe.png", "/etc/passwd", "/dev/zero", "~", "a b.png\0"),
        *(f"file://elsewhere{folders}/allowed/a%20b.png", f"file://{folders}/allowed/a%20b.png?x", "file://[", "file:"),
        *(f"file://{folders}/allowed/%2e%2e/secret/s.png", "..%2fsecret%2fs.png", "x" * 5000, "\ud800", "//" * 3000),
        f"{folders}/allowed/../secret/s.png",
    ):
        with pytest.raises(ImageRefused, match=outside) as refusal:
            picture_from_folders(name, allowed, LIMITS)
        assert len(str(refusal.value)) < 300 and "\n" not in str(refusal.value)
    with pytest.raises(ImageRefused, match=outside):
        picture_from_folders("a b.png", [], LIMITS)
    # What there is elsewhere cannot be told from what there is not.
    answers = []
    for name in (secret, folders / "secret/t.png"):
        with pytest.raises(ImageRefused) as refusal:
            picture_from_folders(str(name), allowed, LIMITS)
        answers.append(str(refusal.value).replace(name.name, ""))
    assert answers[0] == answers[1]
    with pytest.raises(ImageRefused, match=r"^text.png: not an image"):
        picture_from_folders("text.png", allowed, LIMITS)


def test_files_of_the_user(folders):
    assert picture_from_file(folders / "secret/s.png", LIMITS).size == (50, 30)
    for name, words in (
        ("missing.png", r"missing.png cannot be read \(No such file or directory\)"),
        ("allowed", "allowed is no file"),
        ("allowed/pipe.png", "pipe.png is no file"),
        ("allowed/text.png", "text.png: not an image"),
        ("a\0b", r"cannot be read \(embedded null byte\)"),
    ):
        with pytest.raises(ImageRefused, match=words):
            picture_from_file(str(folders / name), LIMITS)
    (folders / "large.png").write_bytes(b"x" * 200_001)
    with pytest.raises(ImageRefused, match="large.png has more than 200,000 bytes"):
        picture_from_file(folders / "large.png", LIMITS)


def test_no_file_stays_open(folders):
    def open_files():
        return len(list(Path("/proc/self/fd").iterdir()))

    if not Path("/proc/self/fd").exists():
        pytest.skip("open files are counted under /proc, which this system does not have")
    before = open_files()
    for name in ("a b.png", "text.png", "missing.png", "pipe.png"):
        for _ in range(5):
            try:
                picture_from_folders(name, [folders / "allowed"], LIMITS)
            except ImageRefused:
                continue
    assert open_files() == before
