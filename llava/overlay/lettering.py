"""Text on pictures: a font that has the letters, lines that fit a width, and blocks of text as images. Imports no torch."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

PAGE, INK, FAINT = (250, 250, 250), (20, 20, 20), (105, 105, 105)
WARNING = (160, 70, 0)  # of words that must not be overlooked
SIZE, SMALL, LARGE = 13, 11, 15  # of letters, in pixels
_NOWHERE = "\U0010fffe"  # a code point that no font has a letter for


@lru_cache(maxsize=64)
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


@lru_cache(maxsize=1)
def _own() -> tuple[str, str]:
    """DejaVu Sans, regular and bold, which matplotlib brings: found without importing it."""
    folder = Path(importlib.util.find_spec("matplotlib").origin).parent / "mpl-data" / "fonts" / "ttf"
    return str(folder / "DejaVuSans.ttf"), str(folder / "DejaVuSans-Bold.ttf")


def _has(path: str, text: str) -> bool:
    font = _font(path, SIZE)
    nothing = bytes(font.getmask(_NOWHERE))
    return all(letter.isspace() or bytes(font.getmask(letter)) != nothing for letter in set(text))


@lru_cache(maxsize=256)
def _path_for(text: str, bold: bool) -> str:
    own = _own()[bold]
    if text.isascii() or _has(own, text):
        return own
    from matplotlib.font_manager import findSystemFonts

    for path in sorted(findSystemFonts()):
        try:
            if _has(path, text):
                return path
        except OSError:  # a file that FreeType cannot read
            continue
    return own


def font_for(text: str, size: int = SIZE, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The font that `text` is written in: DejaVu Sans, or the first installed one that has all of its letters.

    Where none has them, DejaVu Sans shows boxes in their place (`legible` says so).
    """
    return _font(_path_for(text, bold), size)


def legible(text: str) -> bool:
    """Whether an installed font has all letters of `text`."""
    return _has(_path_for(text, False), text)


def line_height(size: int = SIZE) -> int:
    return round(size * 1.45)


def wrapped(text: str, width: int, size: int = SIZE, lines: int = 3, bold: bool = False) -> list[str]:
    """`text` in at most `lines` lines of at most `width` pixels; what does not fit ends in "…".

    Broken at spaces, and inside a word only where it is wider than a line (as Chinese is, which has no spaces).
    """
    text = " ".join(str(text).split())[: lines * width]  # no letter is narrower than a pixel
    font, found = font_for(text, size, bold), []
    while text:
        last = len(found) == lines - 1
        fits = _prefix(text, width, font)
        if fits == len(text):
            return [*found, text]
        if last:
            return [*found, text[: _prefix(text, width - round(font.getlength("…")), font)].rstrip() + "…"]
        space = text.rfind(" ", 0, fits + 1)
        fits = space if space > 0 else max(1, fits)
        found.append(text[:fits].rstrip())
        text = text[fits:].lstrip()
    return found or [""]


def _prefix(text: str, width: float, font) -> int:
    """How many letters of `text` fit into `width` pixels."""
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    return low


def text_block(
    text: str, width: int, size: int = SIZE, color=INK, lines: int = 3, bold: bool = False, exactly: bool = False
) -> Image.Image:
    """An image of `width` pixels with the text in it. exactly: as high as `lines` lines, however many there are."""
    parts = wrapped(text, width, size, lines, bold)
    height = line_height(size)
    block = Image.new("RGB", (width, height * (lines if exactly else len(parts))), PAGE)
    draw = ImageDraw.Draw(block)
    for nth, part in enumerate(parts):
        # From the middle of the line: fonts differ in how far their letters rise.
        draw.text((0, nth * height + height // 2), part, color, font_for(part, size, bold), anchor="lm")
    return block
