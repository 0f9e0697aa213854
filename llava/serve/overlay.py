"""Draws which vision tokens each method kept of one image: methods side by side, dropped patches dark.

    picture = draw_overlay(image, tile_plan(image.size, model.config), side, {"adav": selection}, {"adav": "red"})
    picture.save("kept.png")

Geometry comes from the TilePlan that cut the image; nothing here knows a model. Imports no torch.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from llava.mm_utils import TilePlan
    from llava.model.token_selection import Selection

VIEW, THUMBNAIL = 384, 240  # pixels: the longer side of a view of the crops (or the only tile), of tile 0 beside crops
GAP, LINE, TEXT = 14, 19, 14  # pixels: between things, between text lines, size of letters
DARK = 0.3  # brightness that a dropped patch keeps
OUTLINE = (255, 214, 0)
PAGE, INK, FAINT = (250, 250, 250), (20, 20, 20), (110, 110, 110)
PADDING, PADDING_LINE = (150, 150, 150), (190, 190, 190)


def draw_overlay(
    image: Image.Image,
    plan: TilePlan,
    side: int,
    selections: dict[str, Selection],
    answers: dict[str, str] | None = None,
    title: str = "",
    columns: int = 4,
) -> Image.Image:
    """One panel per method: its name, how many tokens it kept, its answer, and the patches that they stand for.

    image:      the picture as it was opened, any mode
    plan:       how it was cut into tiles (llava.mm_utils.tile_plan)
    side:       patches per tile side
    selections: method name (or any other label) -> what it kept of this image
    answers:    label -> answer, where there is one
    title:      a line above everything, for example the question
    columns:    panels beside each other

    An image of one tile has one view. An image with crops has two: tile 0, which is the whole image squeezed into a
    square, and the crops put back where they were cut. Padding is hatched. Tokens that are no patch (newline, merged)
    count as kept but have no place to be drawn.
    """
    image = image.convert("RGB")
    panels = [_panel(name, kept_views(image, plan, side, kept), kept, answers) for name, kept in selections.items()]
    columns = max(1, min(columns, len(panels)))
    width = max((panel.width for panel in panels), default=VIEW)
    height = max((panel.height for panel in panels), default=0)
    top = GAP + (LINE + GAP if title else 0)
    rows = -(-len(panels) // columns)
    page = Image.new("RGB", (GAP + columns * (width + GAP), top + rows * (height + GAP)), PAGE)
    if title:
        _write(page, (GAP, GAP), title, INK, page.width - 2 * GAP)
    for nth, panel in enumerate(panels):
        page.paste(panel, (GAP + nth % columns * (width + GAP), top + nth // columns * (height + GAP)))
    return page


def kept_views(image: Image.Image, plan: TilePlan, side: int, selection: Selection) -> list[tuple[str, Image.Image]]:
    """(label, picture) of the views of an RGB image: the only tile, or tile 0 and the canvas of crops."""
    places = list(zip(*(getattr(selection, name).tolist() for name in ("tile", "row", "column")), strict=True))
    if plan.grid is None:
        kept = np.zeros((side, side), dtype=bool)
        for tile, row, column in places:
            if tile == 0:
                kept[row, column] = True
        return [("", _view(image, plan.canvas, plan.resized, plan.offset, kept, VIEW))]
    across, down = plan.grid
    whole = np.zeros((side, side), dtype=bool)
    crops = np.zeros((down * side, across * side), dtype=bool)
    for tile, row, column in places:
        if tile == 0:
            whole[row, column] = True
        elif tile > 0:
            crop_row, crop_column = divmod(tile - 1, across)
            crops[crop_row * side + row, crop_column * side + column] = True
    square = (plan.tile_size, plan.tile_size)
    return [
        ("the whole image as one tile", _view(image, square, square, (0, 0), whole, THUMBNAIL)),
        (f"{across} x {down} crops", _view(image, plan.canvas, plan.resized, plan.offset, crops, VIEW)),
    ]


def _view(image, canvas, resized, offset, kept: np.ndarray, longest: int) -> Image.Image:
    """The image (resized, at an offset, on a canvas; all in canvas pixels) with dropped patches darkened.

    kept: bool [rows, columns] over the canvas. Every patch is drawn as a square of the same whole number of pixels.
    """
    rows, columns = kept.shape
    cell = max(5, longest // max(rows, columns))
    scale_x, scale_y = columns * cell / canvas[0], rows * cell / canvas[1]
    left, top = round(offset[0] * scale_x), round(offset[1] * scale_y)
    right, bottom = round((offset[0] + resized[0]) * scale_x), round((offset[1] + resized[1]) * scale_y)
    picture = _hatched(columns * cell, rows * cell)
    picture.paste(image.resize((max(1, right - left), max(1, bottom - top)), Image.Resampling.BICUBIC), (left, top))

    bright = np.kron(kept, np.ones((cell, cell), dtype=bool))
    pixels = np.asarray(picture)
    pixels = np.where(bright[..., None], pixels, (pixels * DARK).astype(np.uint8))
    # A kept pixel is outline where it touches a dropped patch or the edge of the view.
    framed = np.pad(bright, 1)
    inside = framed[:-2, 1:-1] & framed[2:, 1:-1] & framed[1:-1, :-2] & framed[1:-1, 2:]
    pixels[bright & ~inside] = OUTLINE
    return Image.fromarray(pixels)


def _hatched(width: int, height: int) -> Image.Image:
    diagonal = np.add.outer(np.arange(height), np.arange(width)) % 8 < 2
    return Image.fromarray(np.where(diagonal[..., None], PADDING_LINE, PADDING).astype(np.uint8))


def _panel(name: str, views, selection: Selection, answers: dict[str, str] | None) -> Image.Image:
    width = max(220, *(view.width for _, view in views))
    lines = [(f"{name}: {len(selection.indices)} of {selection.total} tokens", INK)]
    if answers is not None:
        lines.append((f"answer: {answers.get(name, '-')}", INK))
    height = LINE * len(lines) + sum(view.height + 6 + (LINE if label else 0) for label, view in views)
    panel = Image.new("RGB", (width, height), PAGE)
    y = 0
    for line, color in lines:
        _write(panel, (0, y), line, color, width)
        y += LINE
    for label, view in views:
        if label:
            _write(panel, (0, y), label, FAINT, width)
            y += LINE
        panel.paste(view, (0, y))
        y += view.height + 6
    return panel


def _write(picture: Image.Image, place: tuple[int, int], text: str, color, width: int) -> None:
    """One line of text, cut to `width` pixels."""
    font = ImageFont.load_default(TEXT)
    text = " ".join(str(text).split())[:width]  # no letter is narrower than a pixel
    if font.getlength(text) > width:
        fits = bisect_right(range(len(text)), width, key=lambda n: font.getlength(text[:n] + "..."))
        text = text[: max(0, fits - 1)] + "..."
    ImageDraw.Draw(picture).text(place, text, color, font)
