"""Image files as LLaVA reads them and as a person sees them: transparency, EXIF orientation, 16 bits."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from tiny_checkpoints import make_image

from llava.common.pictures import as_seen, rgb


def opened(image, kind="PNG", **options):
    stream = BytesIO()
    image.save(stream, kind, **options)
    return Image.open(BytesIO(stream.getvalue()))


def with_alpha(mode, alpha):
    """Half black, half white; `alpha` is the value of all pixels."""
    image = Image.new("L", (4, 2))
    image.paste(255, (2, 0, 4, 2))
    image = image.convert(mode)
    image.putalpha(alpha)
    return image


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("alpha, black", [(0, 255), (255, 0), (51, 204)])
def test_transparent_pictures_lie_on_white(mode, alpha, black):
    image = opened(with_alpha(mode, alpha))
    seen = as_seen(image)
    assert seen.mode == "RGB" and seen.getpixel((0, 0)) == (black,) * 3 and seen.getpixel((3, 1)) == (255,) * 3
    assert rgb(image).getpixel((0, 0)) == (0, 0, 0)  # LLaVA's way


@pytest.mark.parametrize(
    "kind, mode, clear",
    [*(("PNG", mode, 0) for mode in ("P", "L", "1")), ("PNG", "RGB", (0, 0, 0)), ("GIF", "P", 0), ("GIF", "L", 0)],
)
def test_a_transparent_colour_is_white(kind, mode, clear):
    image = opened(Image.new(mode, (4, 2)), kind, transparency=clear)
    assert as_seen(image).getpixel((1, 1)) == (255, 255, 255) and rgb(image).getpixel((1, 1)) == (0, 0, 0)


def test_a_webp_with_alpha():
    assert as_seen(opened(with_alpha("RGBA", 0), "WEBP", lossless=True)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_photo_is_upright_where_a_person_looks(kind):
    pixels = np.zeros((30, 50, 3), np.uint8)
    pixels[:, :10] = 255  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter to the right: white is then at the top
    image = opened(Image.fromarray(pixels), kind, exif=exif)
    seen = as_seen(image)
    assert seen.size == (30, 50) and min(seen.getpixel((15, 4))) > 200 and max(seen.getpixel((15, 45))) < 50
    assert rgb(opened(Image.fromarray(pixels), kind, exif=exif)).size == (50, 30)


@pytest.mark.parametrize("convert", [rgb, as_seen])
def test_16_bits_are_scaled(convert):
    grey = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    found = np.asarray(convert(opened(Image.fromarray(grey))))
    assert np.array_equal(found, np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2))


def test_16_bits_with_a_transparent_grey_and_an_orientation():
    grey = np.full((3, 5), 20_000, np.uint16)
    grey[:, 0] = 300  # whose upper 8 bits others may share
    exif = Image.Exif()
    exif[0x0112] = 6
    seen = np.asarray(as_seen(opened(Image.fromarray(grey), transparency=300, exif=exif)))
    assert seen.shape == (5, 3, 3) and (seen[0] == 255).all() and (seen[1:] == 20_000 >> 8).all()


def test_an_ordinary_picture_stays_as_it_is():
    for image in (make_image(50, 30), make_image(50, 30).convert("L"), make_image(50, 30).convert("P")):
        for found in (rgb(image), as_seen(image)):
            assert np.array_equal(np.asarray(found), np.asarray(image.convert("RGB")))
