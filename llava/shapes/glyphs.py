"""Masks of the objects: which part of each pixel a circle, a star or the digit 7 covers."""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from llava.shapes.vocabulary import SHAPES

_OVERSAMPLING = 4  # Pillow's shapes are not anti-aliased, so they are drawn larger and averaged


@lru_cache(maxsize=1024)
def glyph_mask(kind, size):
    """Coverage of one object, float32 [size, size] in 0..1. kind: one of vocabulary.KINDS. size: pixels per side.

    Digits and letters come from Pillow's own font, so that every machine draws the same picture.
    """
    canvas = Image.new("L", (size * _OVERSAMPLING,) * 2, 0)
    draw = ImageDraw.Draw(canvas)
    if kind in SHAPES:
        _draw_shape(draw, kind, size * _OVERSAMPLING)
    else:
        _draw_character(draw, kind.upper(), size * _OVERSAMPLING)
    mask = np.asarray(canvas.resize((size, size), Image.Resampling.BOX), dtype=np.float32) / 255.0
    mask.setflags(write=False)  # the cache returns the same array to every caller
    return mask


def _draw_character(draw, character, side):
    # At this font size a capital fills the box. The stroke makes thin letters bold.
    font = ImageFont.load_default(size=side * 1.18)
    stroke = max(1, side // 28)
    left, top, right, bottom = draw.textbbox((0, 0), character, font=font, stroke_width=stroke)
    x, y = (side - (right - left)) / 2 - left, (side - (bottom - top)) / 2 - top
    draw.text((x, y), character, fill=255, font=font, stroke_width=stroke)


def _draw_shape(draw, kind, side):
    last = side - 1
    if kind == "circle":
        draw.ellipse((0, 0, last, last), fill=255)
    elif kind == "square":
        inset = side * 0.06
        draw.rectangle((inset, inset, last - inset, last - inset), fill=255)
    elif kind == "triangle":
        draw.polygon(((last / 2, 0), (last, last * 0.92), (0, last * 0.92)), fill=255)
    elif kind == "cross":
        arm = side * 0.17
        draw.rectangle((last / 2 - arm, 0, last / 2 + arm, last), fill=255)
        draw.rectangle((0, last / 2 - arm, last, last / 2 + arm), fill=255)
    elif kind == "ring":
        draw.ellipse((0, 0, last, last), outline=255, width=max(1, round(side * 0.2)))
    elif kind == "star":
        angles = np.pi * (np.arange(10) / 5 - 0.5)
        radii = np.where(np.arange(10) % 2 == 0, 0.53, 0.22) * side
        points = np.stack((last / 2 + radii * np.cos(angles), side * 0.53 + radii * np.sin(angles)), axis=1)
        draw.polygon([tuple(point) for point in points], fill=255)
    else:
        raise ValueError(f"unknown shape {kind!r}")
