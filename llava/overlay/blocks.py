"""Blocks of a page: images stacked, side by side or in a grid; legends and bars. This file does not import torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from llava.overlay.lettering import FAINT, INK, LARGE, PAGE, SMALL, line_height, text_block
from llava.overlay.views import DARK, DETAIL_OUTLINE, HEAT, OUTLINE, PADDING, PADDING_LINE, heat_color

PANEL, ROOM = 300, 460  # pixels: minimum width of a panel; width in which the views of one image stand side by side
STAGE = 0.42  # scale of a view of one stage or step; 1 is full size
GAP = 14  # pixels between blocks
CLOSE = 5  # pixels between blocks that belong together


def stacked(blocks: Sequence[Image.Image], gap: int = CLOSE) -> Image.Image:
    """Blocks below each other, aligned left. gap: pixels between them."""
    height = sum(block.height for block in blocks) + gap * max(0, len(blocks) - 1)
    page = Image.new("RGB", (max((block.width for block in blocks), default=1), max(1, height)), PAGE)
    y = 0
    for block in blocks:
        page.paste(block, (0, y))
        y += block.height + gap
    return page


def beside(blocks: Sequence[Image.Image], gap: int = GAP) -> Image.Image:
    """Blocks side by side, aligned at the top. gap: pixels between them."""
    width = sum(block.width for block in blocks) + gap * max(0, len(blocks) - 1)
    page = Image.new("RGB", (max(1, width), max((block.height for block in blocks), default=1)), PAGE)
    x = 0
    for block in blocks:
        page.paste(block, (x, 0))
        x += block.width + gap
    return page


def padded(block: Image.Image, width: int) -> Image.Image:
    """A block that is at least `width` pixels wide, with empty page at its right."""
    return stacked([block, Image.new("RGB", (width, 1), PAGE)], 0) if block.width < width else block


def grid(blocks: Sequence[Image.Image], columns: int, gap: int = GAP) -> Image.Image:
    """Blocks in rows of `columns` blocks. All columns are as wide as the widest block."""
    width = max((block.width for block in blocks), default=1)
    blocks = [padded(block, width) for block in blocks]
    rows = [beside(blocks[at : at + columns], gap) for at in range(0, len(blocks), columns)]
    return stacked(rows, gap)


def flowed(blocks: Sequence[Image.Image], width: int, gap: int = GAP) -> Image.Image:
    """Blocks of similar size in a grid of at most `width` pixels. See `shelves` for blocks of different sizes."""
    widest = max((block.width for block in blocks), default=1)
    return grid(blocks, max(1, (width + gap) // (widest + gap)), gap)


def framed(blocks: Sequence[Image.Image]) -> Image.Image:
    """The finished page: blocks below each other, with a margin around them. None is skipped."""
    inside = stacked([block for block in blocks if block is not None], GAP)
    page = Image.new("RGB", (inside.width + 2 * GAP, inside.height + 2 * GAP), PAGE)
    page.paste(inside, (GAP, GAP))
    return page


def view_block(views: Sequence[tuple[str, Image.Image]], room: int) -> Image.Image:
    """The labelled views of one image: side by side if they fit into `room` pixels, else stacked."""
    blocks = [
        stacked([text_block(label, view.width, SMALL, FAINT, 1), view], 2) if label else view for label, view in views
    ]
    across = sum(block.width for block in blocks) + GAP * (len(blocks) - 1)
    return beside(blocks) if across <= room else stacked(blocks)


def section(title: str, body: Image.Image) -> Image.Image:
    """A part of the page: a thin line, the title, and the picture `body`."""
    line = Image.new("RGB", (body.width, 1), (215, 215, 215))
    return stacked([line, text_block(title, body.width, LARGE, INK, 2, bold=True), body], 8)


def shelves(blocks: Sequence[Image.Image], width: int, gap: int = 2 * GAP) -> list[Image.Image]:
    """Rows of blocks of any size, in order. A row takes blocks as long as they fit into `width` pixels."""
    rows, row = [], []
    for block in blocks:
        if row and sum(one.width + gap for one in row) + block.width > width:
            rows, row = [*rows, beside(row, gap)], []
        row.append(block)
    return [*rows, beside(row, gap)] if row else []


def split_bar(width: int, start: float, end: float, color) -> Image.Image:
    """A bar of `width` pixels. The part from `start` to `end` (0 to 1) is coloured, the rest is grey."""
    bar = np.full((8, width, 3), 222, dtype=np.uint8)
    bar[:, round(start * width) : round(end * width)] = color
    return Image.fromarray(bar)


def heat_scale(width: int, low: str, high: str) -> Image.Image:
    """The colour scale of a heat map, with the words `low` and `high` at its ends."""
    ramp = np.repeat(heat_color(np.linspace(0, 1, width))[None], 8, axis=0).astype(np.uint8)
    ends = Image.new("RGB", (width, line_height(SMALL)), PAGE)
    ends.paste(text_block(low, width // 2, SMALL, FAINT, 1))
    right = text_block(high, width // 2, SMALL, FAINT, 1)
    ink = (np.asarray(right) != PAGE).any(axis=(0, 2)).nonzero()[0]
    right = right.crop((0, 0, int(ink[-1]) + 1 if len(ink) else 1, right.height))
    ends.paste(right, (width - right.width, 0))
    return stacked([Image.fromarray(ramp), ends], 1)


def legend(entries: Sequence[tuple[str, str | tuple]], width: int) -> Image.Image:
    """A legend in rows of `width` pixels. entries: (swatch, its meaning).

    A swatch is an RGB colour, a name that `_swatch` draws, or "" for text alone.
    """
    side = line_height(SMALL)
    blocks = []
    for swatch, text in entries:
        words = text_block(text, width - side - CLOSE, SMALL, FAINT, 3)
        # text_block is as wide as it may be; cropped to its ink, several entries fit into a row.
        ink = (np.asarray(words) != PAGE).any(axis=(0, 2)).nonzero()[0]
        words = words.crop((0, 0, int(ink[-1]) + 1 if len(ink) else 1, words.height))
        blocks.append(beside([_swatch(swatch, side), words] if swatch else [words], 6))
    return padded(stacked(shelves(blocks, width)), width)


def _swatch(kind: str | tuple, side: int) -> Image.Image:
    """A square of `side` pixels that looks like a patch of this kind on the page."""
    square = np.zeros((side, side, 3), dtype=np.uint8)
    if isinstance(kind, tuple):
        square[:] = kind
    elif kind in ("kept", "detail"):
        square[:] = (120, 170, 200)
        square[[0, -1]] = square[:, [0, -1]] = OUTLINE if kind == "kept" else DETAIL_OUTLINE
    elif kind == "dropped":
        square[:] = [int(DARK * value) for value in (120, 170, 200)]
    elif kind == "padding":
        diagonal = np.add.outer(np.arange(side), np.arange(side)) % 8 < 2
        square[:] = np.where(diagonal[..., None], PADDING_LINE, PADDING)
    elif kind == "heat":
        square[:] = heat_color(np.linspace(0, 1, side))[None]
    elif kind == "chosen":
        square[:] = HEAT[2]
        square[[0, -1]] = square[:, [0, -1]] = 255
    return Image.fromarray(square)
