"""The patch that is drawn as kept is the patch that was kept: judged by colours that say where a pixel came from."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from llava.mm_utils import cut_tiles, expand_to_square, merge_order, tile_plan
from llava.model.token_selection import Selection
from llava.serve.overlay import draw_overlay, kept_views

SIDE = 6  # patches per tile side
TILE = 48
PINPOINTS = [(TILE, 2 * TILE), (2 * TILE, TILE), (2 * TILE, 2 * TILE), (3 * TILE, TILE), (TILE, 3 * TILE)]
SIZES = {(1, 2): (41, 93), (2, 1): (94, 40), (2, 2): (90, 84), (3, 1): (140, 37), (1, 3): (38, 141)}
SIZES |= {"pad": (60, 37), "crop": (70, 40)}  # one tile, in either way of making an image square
BLUE = 90


def where_image(size):
    """Red says how far right a pixel lies (140 to 255), green how far down; blue is the same everywhere."""
    width, height = size
    pixels = np.full((height, width, 3), float(BLUE))
    pixels[..., 0] = np.linspace(140, 255, width)[None, :]
    pixels[..., 1] = np.linspace(140, 255, height)[:, None]
    return Image.fromarray(pixels.round().astype(np.uint8))


def make_case(grid, merge="spatial_unpad"):
    ratio = grid if grid in ("pad", "crop") else "anyres"
    config = SimpleNamespace(
        mm_tile_size=TILE, image_aspect_ratio=ratio, image_grid_pinpoints=PINPOINTS, mm_patch_merge_type=merge
    )
    image = where_image(SIZES[grid])
    plan = tile_plan(image.size, config)
    assert plan.grid == (grid if ratio == "anyres" else None)
    return image, plan


def tile_colors(image, plan):
    """{(tile, row, column): [pixels, 2] red and green of what the tower sees}, for the patches without any padding."""
    if plan.grid:
        tiles = cut_tiles(image, plan)
    elif plan.offset[0] < 0 or plan.offset[1] < 0:
        (x, y), (width, height) = plan.offset, plan.canvas
        tiles = [image.crop((-x, -y, width - x, height - y)).resize((TILE, TILE))]
    else:
        tiles = [expand_to_square(image, (0, 0, 0)).resize((TILE, TILE))]
    patch, colors = TILE // SIDE, {}
    for t, tile in enumerate(tiles):
        pixels = np.asarray(tile).astype(float)
        for r in range(SIDE):
            for c in range(SIDE):
                block = pixels[r * patch : (r + 1) * patch, c * patch : (c + 1) * patch].reshape(-1, 3)
                if (abs(block[:, 2] - BLUE) < 4).all():
                    colors[t, r, c] = block[:, :2]
    return colors


def selection_of(places, total=100):
    tile, row, column = torch.tensor(places, dtype=torch.long).reshape(-1, 3).T
    return Selection(torch.arange(len(tile)), torch.zeros(len(tile), 2), tile, row, column, total=total)


def bright_colors(picture):
    """[n, 2] red and green of all undarkened image pixels: no text, padding, outline or page has this blue."""
    pixels = np.asarray(picture).astype(float)
    image = (abs(pixels[..., 2] - BLUE) < 4) & (pixels[..., 0] > 130) & (pixels[..., 1] > 130)
    return pixels[image][:, :2]


def within(shown, patch):
    """[n] which of the colours belong to a patch; its edge is half a pixel further out than its outermost pixels."""
    low, high = patch.min(0), patch.max(0)
    margin = 1.5 + (high - low) / (TILE // SIDE - 1) / 2
    return ((shown > low - margin) & (shown < high + margin)).all(1)


@pytest.mark.parametrize("grid", SIZES, ids=str)
def test_one_kept_patch_is_the_only_bright_one(grid):
    image, plan = make_case(grid)
    colors = tile_colors(image, plan)
    assert {t for t, _, _ in colors} == set(range(plan.tiles))
    for place, patch in list(colors.items())[::2]:
        shown = [bright_colors(view) for _, view in kept_views(image, plan, SIDE, selection_of([place]))]
        here = shown.pop(0 if place[0] == 0 else 1)
        assert len(here) > 4 and within(here, patch).all(), place
        # Neighbours are more than twice as far apart.
        assert abs(here.mean(0) - patch.mean(0)).max() < 1.6, place
        assert all(len(other) == 0 for other in shown), "tile 0 and the crops are not mixed up"


@pytest.mark.parametrize("grid", SIZES, ids=str)
def test_many_kept_patches(grid):
    image, plan = make_case(grid)
    colors = tile_colors(image, plan)
    draw = np.random.default_rng(0)
    kept = [list(colors)[i] for i in draw.choice(len(colors), len(colors) // 3, replace=False)]
    for number, (_, view) in enumerate(kept_views(image, plan, SIDE, selection_of(kept))):
        shown = bright_colors(view)
        patches = [colors[place] for place in kept if min(place[0], 1) == number]
        belongs = np.stack([within(shown, patch) for patch in patches])
        assert belongs.any(1).all(), "every kept patch is bright"
        assert belongs.any(0).all(), "nothing else is"


def test_panels_show_their_own_method_and_no_image_shows_none():
    image, plan = make_case((2, 2))
    colors = tile_colors(image, plan)
    one, other = (1, 2, 3), (4, 3, 2)
    drawn = draw_overlay(
        image, plan, SIDE, {"one": selection_of([one]), "none": selection_of([]), "two": selection_of([other])}
    )
    third = drawn.width // 3
    parts = [bright_colors(drawn.crop((i * third, 0, (i + 1) * third, drawn.height))) for i in range(3)]
    assert abs(parts[0].mean(0) - colors[one].mean(0)).max() < 1.6
    assert len(parts[1]) == 0
    assert abs(parts[2].mean(0) - colors[other].mean(0)).max() < 1.6


@pytest.mark.parametrize("grid", SIZES, ids=str)
def test_all_tokens_of_an_unpadded_image_leave_only_padding_dark(grid):
    image, plan = make_case(grid)
    order = [divmod(i, SIDE * SIDE) for i in merge_order(plan, SIDE).tolist()]
    places = [(t, *divmod(i, SIDE)) if t >= 0 else (-1, 0, -1) for t, i in order]
    for number, (_, view) in enumerate(kept_views(image, plan, SIDE, selection_of(places))):
        pixels = np.asarray(view).astype(int)
        cell = view.width // (SIDE * (plan.grid[0] if number else 1))
        dark = pixels.max(-1) < 120
        padding = dark & (np.ptp(pixels, axis=-1) == 0)
        for y in range(0, view.height, cell):
            for x in range(0, view.width, cell):
                patch = (slice(y, y + cell), slice(x, x + cell))
                # Unpadding removes whole patches, and so a little of the image with the padding.
                assert not dark[patch].any() or padding[patch].any(), (x, y)


def test_dropped_patches_stay_recognisable_but_dark():
    image, plan = make_case("pad")
    ((_, view),) = kept_views(image, plan, SIDE, selection_of([]))
    assert 0 < np.asarray(view).mean() < 60
    ((_, view),) = kept_views(image, plan, SIDE, selection_of([(0, r, c) for r in range(SIDE) for c in range(SIDE)]))
    assert np.asarray(view).mean() > 120


@pytest.mark.parametrize("grid", [(2, 2), "pad"], ids=str)
def test_made_tokens_are_counted_and_not_drawn(grid):
    image, plan = make_case(grid)
    made = (-1, -1, -1)
    plain, merged = selection_of([(0, 2, 3)]), selection_of([made, (0, 2, 3), made, made])
    for (_, one), (_, other) in zip(
        kept_views(image, plan, SIDE, plain), kept_views(image, plan, SIDE, merged), strict=True
    ):
        assert np.array_equal(np.asarray(one), np.asarray(other))
    drawn = [np.asarray(draw_overlay(image, plan, SIDE, {"m": kept})) for kept in (plain, merged)]
    assert drawn[0].shape == drawn[1].shape and not np.array_equal(*drawn), "the line says 1 token or 4"


def test_long_texts_and_many_methods_stay_on_the_page():
    image, plan = make_case((3, 1))
    kept = selection_of([(1, 2, 3)])
    answers = {f"m{i}": "a very long answer\nover lines " * 9 for i in range(7)}
    wide = draw_overlay(image, plan, SIDE, {f"m{i}": kept for i in range(7)}, answers, title="why " * 200)
    narrow = draw_overlay(image, plan, SIDE, {f"m{i}": kept for i in range(4)}, answers)
    assert wide.width == narrow.width and wide.height > 1.8 * narrow.height
    right_edge = np.asarray(wide)[:, -8:]
    assert (right_edge == right_edge[0, 0]).all(), "the margin is empty"


def test_needs_no_torch():
    code = "import sys, llava.serve.overlay; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
