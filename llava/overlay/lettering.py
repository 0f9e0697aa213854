"""Text on pictures: a font that has the letters, lines that fit a width, blocks of text as images. Without torch."""

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
    """A font file at one size. Cached, because a page asks for the same few fonts hundreds of times."""
    return ImageFont.truetype(path, size)


@lru_cache(maxsize=1)
def _own() -> tuple[str, str]:
    """Paths of DejaVu Sans, regular and bold, from the package matplotlib."""
    # find_spec does not import matplotlib, which would take about a second.
    folder = Path(importlib.util.find_spec("matplotlib").origin).parent / "mpl-data" / "fonts" / "ttf"
    return str(folder / "DejaVuSans.ttf"), str(folder / "DejaVuSans-Bold.ttf")


def _has(path: str, text: str) -> bool:
    """True if a font has all letters of `text`."""
    font = _font(path, SIZE)
    # Pillow does not say whether a letter is missing, so its bitmap is compared with the box for a missing letter.
    nothing = bytes(font.getmask(_NOWHERE))
    return all(letter.isspace() or bytes(font.getmask(letter)) != nothing for letter in set(text))


@lru_cache(maxsize=256)
def _path_for(text: str, bold: bool) -> str:
    """Path of the font for `text`: DejaVu Sans, else the first installed font with all letters, else DejaVu Sans."""
    own = _own()[bold]
    if text.isascii() or _has(own, text):
        return own
    from matplotlib.font_manager import findSystemFonts

    for path in sorted(findSystemFonts()):  # sorted: the order of a folder differs between machines
        try:
            if _has(path, text):
                return path
        except OSError:  # a file that FreeType cannot read
            continue
    return own


def font_for(text: str, size: int = SIZE, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The font for `text`: DejaVu Sans, or the first installed font that has all of its letters.

    If no font has them, DejaVu Sans draws boxes for the missing letters. `legible` reports that case.
    """
    return _font(_path_for(text, bold), size)


def legible(text: str) -> bool:
    """True if an installed font has all letters of `text`."""
    return _has(_path_for(text, False), text)


def line_height(size: int = SIZE) -> int:
    """Pixels from one line of text to the next."""
    return round(size * 1.45)


def wrapped(text: str, width: int, size: int = SIZE, lines: int = 3, bold: bool = False) -> list[str]:
    """Lines of `text`: at most `lines` lines of at most `width` pixels. A text that is too long ends in "…".

    Lines break at spaces. A word breaks only if it is wider than a line, for example in Chinese, which has no spaces.
    """
    # No letter is narrower than a pixel. The cut bounds the work on a very long text.
    text = " ".join(str(text).split())[: lines * width]
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
    """Number of letters of `text` that fit into `width` pixels, by bisection."""
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    return low


def text_block(
    text: str, width: int, size: int = SIZE, color=INK, lines: int = 3, bold: bool = False, exactly: bool = False
) -> Image.Image:
    """An image of `width` pixels with the text. exactly: it is `lines` lines high, even if the text has fewer."""
    parts = wrapped(text, width, size, lines, bold)
    height = line_height(size)
    block = Image.new("RGB", (width, height * (lines if exactly else len(parts))), PAGE)
    draw = ImageDraw.Draw(block)
    for nth, part in enumerate(parts):
        draw.text((0, nth * height + height // 2), part, color, font_for(part, size, bold), anchor="lm")
    return block
