"""Views of one image: its patches at the places where they were cut, drawn as kept or dropped, by score, or by class.

An image of one tile has one view. An image with crops has two: tile 0, which is the whole image squeezed into a square,
and the crops at the places where they were cut. All geometry comes from the TilePlan of the image. This file needs no
model and does not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from llava.methods.before_llm import Selection
    from llava.mm_utils import TilePlan

# Longer side in pixels: of the view of the crops (or of the only tile), and of tile 0 beside crops.
VIEW, THUMBNAIL = 384, 240
DARK = 0.3  # brightness of a dropped patch: still visible, but clearly darker than a kept one
OUTLINE, DETAIL_OUTLINE = (255, 214, 0), (0, 220, 255)
PADDING, PADDING_LINE = (150, 150, 150), (190, 190, 190)

# Colours of a heat map, from score 0 to the largest. Brightness rises all the way, so that a grey print shows the same.
HEAT = ((8, 8, 40), (60, 20, 110), (140, 35, 105), (205, 70, 65), (245, 135, 25), (252, 200, 70), (255, 255, 210))
# Classes of a vision token in an adaptive KV cache. They are small integers, because states are uint8 arrays.
ABSENT, MINOR, SECONDARY, CORE = range(4)
CLASS_COLORS = {CORE: (255, 170, 0), SECONDARY: (60, 130, 255), MINOR: (150, 145, 150)}

Place = tuple[int, int, int]  # (tile, row, column); the tile is -1 for a token that is no patch


@dataclass(frozen=True)
class View:
    """Geometry of one view: the image of size `resized` at `offset` on a canvas, under rows x columns patches.

    canvas, resized, offset: (width, height) or (x, y) in pixels of the canvas, as in TilePlan.
    longest: pixels of the longer side at full size. first: the tile in the upper left corner.
    """

    label: str
    canvas: tuple[int, int]
    resized: tuple[int, int]
    offset: tuple[int, int]
    rows: int
    columns: int
    longest: int
    first: int

    def at(self, place: Place, side: int) -> tuple[int, int] | None:
        """(row, column) of a patch in this view; None if the view does not show it."""
        tile, row, column = place
        across, down = self.columns // side, self.rows // side
        if not self.first <= tile < self.first + across * down:
            return None
        tile_row, tile_column = divmod(tile - self.first, across)
        return tile_row * side + row, tile_column * side + column


def views_of(plan: TilePlan, side: int) -> list[View]:
    """The views of an image. side: patches per tile side."""
    if plan.grid is None:
        return [View("", plan.canvas, plan.resized, plan.offset, side, side, VIEW, 0)]
    across, down = plan.grid
    square = (plan.tile_size, plan.tile_size)
    return [
        View("the whole image as one tile", square, square, (0, 0), side, side, THUMBNAIL, 0),
        View(f"{across} x {down} crops", plan.canvas, plan.resized, plan.offset, down * side, across * side, VIEW, 1),
    ]


def places_of(selection: Selection) -> list[Place]:
    """Place of each token of a selection; the tile is -1 for tokens that are no patch (newline, made)."""
    return list(zip(*(getattr(selection, name).tolist() for name in ("tile", "row", "column")), strict=True))


def left_of(selection: Selection) -> list[Place]:
    """Places of the tokens that stay at the end: after the last cut inside the LLM, or all if there is no cut."""
    stages = selection.report.get("survivors")
    return survivors_of(selection, stages[-1]) if stages else places_of(selection)


def detailed(selection: Selection) -> list[Place]:
    """Places of the patches that are kept for their fine detail (options.detail_share) and stay."""
    if "detail" not in selection.report:
        return []
    left, marks = set(left_of(selection)), selection.report["detail"].tolist()
    return [place for place, mark in zip(places_of(selection), marks, strict=True) if mark and place in left]


def survivors_of(selection: Selection, slots) -> list[Place]:
    """Places of the tokens that stay after one cut inside the LLM. slots: an entry of report["survivors"]."""
    places = places_of(selection)
    return [places[slot] if slot >= 0 else (-1, -1, -1) for slot in slots.tolist()]


def on_view(view: View, side: int, places: Sequence[Place], values: np.ndarray, elsewhere) -> np.ndarray:
    """The value of each patch of a view, [rows, columns]. Patches that are not among `places` have `elsewhere`."""
    seen = np.full((view.rows, view.columns), elsewhere, dtype=values.dtype)
    for place, value in zip(places, values, strict=True):
        at = view.at(place, side)
        if at is not None:
            seen[at] = value
    return seen


def kept_views(
    image: Image.Image, plan: TilePlan, side: int, selection: Selection, scale: float = 1
) -> list[tuple[str, Image.Image]]:
    """(label, picture) per view: kept patches are bright and outlined, dropped ones dark, padding is hatched.

    The outline of patches that are kept for their fine detail has another colour. Crops that were not encoded are crossed
    out, and the label counts the others.
    """
    return kept_at(image, plan, side, left_of(selection), scale, detailed(selection), selection.tiles)


def kept_at(
    image: Image.Image,
    plan: TilePlan,
    side: int,
    places: Sequence[Place],
    scale: float = 1,
    detail: Sequence[Place] = (),
    tiles: Sequence[int] | None = None,
) -> list[tuple[str, Image.Image]]:
    """kept_views with the patches at `places` as the kept ones, and those at `detail` as kept for their detail.

    tiles: those that were encoded; None: all of them.
    """
    drawn = []
    for view in views_of(plan, side):
        pixels, cell = _canvas(image, view, scale)
        kept, fine = (on_view(view, side, own, np.ones(len(own), bool), False) for own in (places, detail))
        picture = _kept(pixels, cell, kept, fine)
        label, crops = view.label, range(view.first, view.first + (view.rows // side) * (view.columns // side))
        missing = [] if tiles is None else [tile for tile in crops if tile not in tiles]
        if missing:
            label = f"{label}, {len(crops) - len(missing)} of them encoded"
            _cross_out(picture, [view.at((tile, 0, 0), side) for tile in missing], side, cell)
        drawn.append((label, picture))
    return drawn


def _cross_out(picture: Image.Image, corners: Sequence[tuple[int, int]], side: int, cell: int) -> None:
    """Draw both diagonals of tiles. corners: (row, column) of the first patch of each tile."""
    # One pixel inside of the tile, because a line of two pixels reaches beyond its ends.
    draw, length = ImageDraw.Draw(picture), side * cell - 3
    for row, column in corners:
        top, left = row * cell + 1, column * cell + 1
        draw.line((left, top, left + length, top + length), PADDING, 2)
        draw.line((left, top + length, left + length, top), PADDING, 2)


def heat_views(
    image: Image.Image,
    plan: TilePlan,
    side: int,
    places: Sequence[Place],
    levels: np.ndarray,
    kept: Sequence[Place] = (),
    scale: float = 1,
) -> list[tuple[str, Image.Image]]:
    """(label, picture) per view: every patch in the colour of its level over the image in grey; `kept` is outlined.

    places, levels: [N], levels from 0 to 1. Patches without a level (cut away as padding) are dark.
    """
    drawn = []
    for view in views_of(plan, side):
        pixels, cell = _canvas(image, view, scale)
        seen = on_view(view, side, places, np.asarray(levels, dtype=float), np.nan)
        none = np.isnan(seen)
        color = heat_color(np.where(none, 0, seen))
        grey = pixels.mean(axis=-1, keepdims=True)
        # A quarter of the image's contrast is enough to recognise it, and too little to look like a score.
        pixels = np.where(_cells(none, cell), DARK * pixels, 0.25 * grey + 0.75 * _cells(color, cell))
        chosen = on_view(view, side, kept, np.ones(len(kept), bool), False)
        drawn.append((view.label, Image.fromarray(_outlined(pixels.astype(np.uint8), chosen, cell, (255, 255, 255)))))
    return drawn


def class_views(
    image: Image.Image, plan: TilePlan, side: int, places: Sequence[Place], classes: np.ndarray, scale: float = 1
) -> list[tuple[str, Image.Image]]:
    """(label, picture) per view: patches in the colour of their class in the KV cache (CORE, SECONDARY, MINOR).

    Patches that no layer holds (ABSENT) and patches that are no token are nearly black.
    """
    drawn = []
    for view in views_of(plan, side):
        pixels, cell = _canvas(image, view, scale)
        seen = on_view(view, side, places, np.asarray(classes), ABSENT)
        grey = pixels.mean(axis=-1, keepdims=True)
        color = np.zeros((*seen.shape, 3))
        for name, value in CLASS_COLORS.items():
            color[seen == name] = value
        pixels = np.where(_cells(seen == ABSENT, cell), 0.12 * grey, 0.35 * grey + 0.65 * _cells(color, cell))
        drawn.append((view.label, Image.fromarray(pixels.astype(np.uint8))))
    return drawn


def heat_color(levels: np.ndarray) -> np.ndarray:
    """Colours [..., 3] (float, 0 to 255) of levels [...] from 0 to 1."""
    at = np.linspace(0, 1, len(HEAT))
    return np.stack([np.interp(levels, at, [color[c] for color in HEAT]) for c in range(3)], axis=-1)


def _canvas(image: Image.Image, view: View, scale: float) -> tuple[np.ndarray, int]:
    """(canvas [h, w, 3] uint8 with hatched padding, side of a patch in its pixels)."""
    # All patches are squares of the same whole number of pixels, so the picture is scaled to fit them. Below 5 pixels
    # an outline would cover the patch; small views have no outlines and may go down to 2.
    cell = max(5 if scale == 1 else 2, int(view.longest * scale) // max(view.rows, view.columns))
    width, height = view.columns * cell, view.rows * cell
    across = _visible(view.offset[0], view.resized[0], view.canvas[0], width, image.width)
    down = _visible(view.offset[1], view.resized[1], view.canvas[1], height, image.height)
    diagonal = np.add.outer(np.arange(height), np.arange(width)) % 8 < 2
    picture = Image.fromarray(np.where(diagonal[..., None], PADDING_LINE, PADDING).astype(np.uint8))
    # The visible part alone: resized as a whole, an image of which the middle is cut out can be a thousand times wider.
    (left, right, *box_x), (top, bottom, *box_y) = across, down
    box = (box_x[0], box_y[0], box_x[1], box_y[1])
    seen = image.convert("RGB").resize((right - left, bottom - top), Image.Resampling.BICUBIC, box)
    picture.paste(seen, (left, top))
    return np.asarray(picture), cell


def _visible(offset: int, resized: int, canvas: int, drawn: int, pixels: int) -> tuple[int, int, float, float]:
    """On one axis, what is seen of an image that lies at `offset` of a canvas, `resized` long: (from, to) on a drawing of
    `drawn` pixels, and (from, to) on the image's own `pixels`."""
    first, last = max(0, offset), min(canvas, offset + resized)
    start = round(first * drawn / canvas)
    stop = max(start + 1, round(last * drawn / canvas))
    return start, stop, (first - offset) * pixels / resized, (last - offset) * pixels / resized


def _cells(values: np.ndarray, cell: int) -> np.ndarray:
    """Values [rows, columns, ...] as pixels [rows * cell, columns * cell, 1 or 3]: every patch becomes a square."""
    grown = values.repeat(cell, axis=0).repeat(cell, axis=1)
    return grown if grown.ndim == 3 else grown[..., None]


def _kept(pixels: np.ndarray, cell: int, kept: np.ndarray, fine: np.ndarray) -> Image.Image:
    """The picture with dark patches where `kept` [rows, columns] is False, and outlines around the others.

    The outline of the patches `fine` [rows, columns] has another colour.
    """
    pixels = np.where(_cells(kept, cell), pixels, (pixels * DARK).astype(np.uint8))
    return Image.fromarray(_outlined(_outlined(pixels, kept, cell, OUTLINE), fine, cell, DETAIL_OUTLINE))


def _outlined(pixels: np.ndarray, chosen: np.ndarray, cell: int, color) -> np.ndarray:
    """The picture with the outline of the chosen patches: their pixels that touch another patch or the edge."""
    if cell < 5:  # the outline would leave nothing of so small a patch
        return pixels
    # A pixel is deep if its four neighbours are chosen too. The padding of 1 makes the edge count as not chosen.
    inside = np.pad(_cells(chosen, cell)[..., 0], 1)
    deep = inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
    pixels = pixels.copy()
    pixels[inside[1:-1, 1:-1] & ~deep] = color
    return pixels
