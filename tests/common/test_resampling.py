"""A part of a resized picture: Pillow's own pixels, without the rest of the picture."""

import numpy as np
import pytest
from PIL import Image
from tiny_checkpoints import make_image

from llava.common.resampling import Axis, resized_part

BICUBIC = Image.Resampling.BICUBIC


@pytest.mark.parametrize(
    "size, resized",
    [
        ((90, 3), (700, 70)),
        ((3, 90), (70, 700)),
        ((701, 50), (90, 7)),
        ((64, 640), (61, 200)),
        ((640, 48), (336, 336)),
        ((1, 1), (9, 9)),
    ],
)
def test_a_part_is_what_pillow_makes_of_it(size, resized):
    image = make_image(*size)
    whole = np.asarray(image.resize(resized, BICUBIC))
    for left, right, top, bottom in ((0, 1, 0, 1), (1 / 3, 2 / 3, 0, 1), (0.4, 0.5, 0.8, 1)):
        across, down = (
            Axis(length, new, int(first * new), max(1, int(last * new)))
            for length, new, first, last in zip(size, resized, (left, top), (right, bottom), strict=True)
        )
        found = np.asarray(resized_part(image, across, down))
        assert np.array_equal(found, whole[down.start : down.stop, across.start : across.stop])


@pytest.mark.parametrize("size", [(301, 2), (2, 301), (97, 61), (1, 8)])
def test_a_padded_square_is_what_pillow_makes_of_it(size):
    image, side, color = make_image(*size), max(size), (122, 116, 104)
    square = Image.new("RGB", (side, side), color)
    offsets = tuple((side - length) // 2 for length in size)
    square.paste(image, offsets)
    axes = [Axis(side, 40, 0, 40, offset) for offset in offsets]
    assert np.array_equal(np.asarray(resized_part(image, *axes, color)), np.asarray(square.resize((40, 40), BICUBIC)))
