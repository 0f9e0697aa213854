"""The patch that is drawn as kept is the patch that was kept: judged by colours that say where a pixel came from."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from llava.common.errors import UserError
from llava.methods.before_llm import Selection
from llava.mm_utils import cut_tiles, expand_to_square, merge_order, tile_plan
from llava.overlay.cache_strip import CacheStates, cache_frames, draw_caches, save_frames, shown
from llava.overlay.page import counted, draw_overlay, draw_scores, draw_stages
from llava.overlay.views import (
    ABSENT,
    CORE,
    DETAIL_OUTLINE,
    MINOR,
    OUTLINE,
    SECONDARY,
    class_views,
    detailed,
    heat_views,
    kept_at,
    kept_views,
    left_of,
)

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


def make_case(grid, merge="spatial_unpad", anyres="official", size=None):
    ratio = grid if grid in ("pad", "crop") else "anyres"
    config = SimpleNamespace(
        mm_tile_size=TILE, image_aspect_ratio=ratio, image_grid_pinpoints=PINPOINTS, mm_patch_merge_type=merge
    )
    image = where_image(size or SIZES[grid])
    plan = tile_plan(image.size, config, anyres)
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


@pytest.mark.parametrize("anyres", ["official", "fastervlm"])
@pytest.mark.parametrize("grid", SIZES, ids=str)
def test_one_kept_patch_is_the_only_bright_one(grid, anyres):
    image, plan = make_case(grid, anyres=anyres)
    colors = tile_colors(image, plan)
    assert {t for t, _, _ in colors} == set(range(plan.tiles))
    for place, patch in list(colors.items())[::2]:
        shown = [bright_colors(view) for _, view in kept_views(image, plan, SIDE, selection_of([place]))]
        here = shown.pop(0 if place[0] == 0 else 1)
        assert len(here) > 4 and within(here, patch).all(), place
        # Neighbours are more than twice as far apart.
        assert abs(here.mean(0) - patch.mean(0)).max() < 1.6, place
        assert all(len(other) == 0 for other in shown), "tile 0 and the crops are not mixed up"


def test_crops_that_were_not_encoded_are_crossed_out():
    image, plan = make_case((2, 2))
    selection = selection_of([(0, 1, 1), (2, 3, 3)])
    (_, thumbnail), (label, plain) = kept_views(image, plan, SIDE, selection)
    assert label == "2 x 2 crops"
    selection.tiles = (0, 2, 3)
    (_, same), (label, crossed) = kept_views(image, plan, SIDE, selection)
    assert label == "2 x 2 crops, 2 of them encoded" and np.array_equal(same, thumbnail)
    changed = (np.asarray(plain) != np.asarray(crossed)).any(-1)
    height, width = (length // 2 for length in changed.shape)
    corners = [changed[:height, :width], changed[:height, width:], changed[height:, :width], changed[height:, width:]]
    assert [corner.any() for corner in corners] == [True, False, False, True], "crops 1 and 4 in raster order"


@pytest.mark.parametrize("anyres", ["official", "fastervlm"])
@pytest.mark.parametrize("grid", SIZES, ids=str)
def test_many_kept_patches(grid, anyres):
    image, plan = make_case(grid, anyres=anyres)
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


REAL = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]  # the pinpoints of LLaVA-1.6, (width, height)
ODD = {(336, 672): (301, 667), (672, 336): (671, 299), (672, 672): (613, 599), (1008, 336): (997, 277)}
ODD |= {(336, 1008): (287, 1003)}


def blocks_image(columns, rows, size):
    """An image of columns x rows blocks, each of a colour of its own: red and green say which, blue is the same."""
    pixels = np.full((rows, columns, 3), BLUE, dtype=np.uint8)
    pixels[..., 0] = np.linspace(140, 255, columns).round()[None, :]
    pixels[..., 1] = np.linspace(140, 255, rows).round()[:, None]
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) == rows * columns
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


def centres(pixels, rows, columns):
    """[rows, columns, 3] the colour in the middle of every patch of a picture."""
    height, width = pixels.shape[:2]
    y = (np.arange(rows) + 0.5) * height / rows
    x = (np.arange(columns) + 0.5) * width / columns
    return pixels[y.astype(int)[:, None], x.astype(int)[None, :]].astype(float)


@pytest.mark.parametrize("canvas", REAL, ids=str)
def test_each_block_of_its_own_colour_at_full_size(canvas):
    """24 x 24 patches per tile, as in LLaVA-1.6: the colours that stay bright are those of the kept patches, in place."""
    config = SimpleNamespace(
        mm_tile_size=336, image_aspect_ratio="anyres", image_grid_pinpoints=REAL, mm_patch_merge_type="spatial_unpad"
    )
    side, (across, down) = 24, (canvas[0] // 336, canvas[1] // 336)
    draw = np.random.default_rng(sum(canvas))
    for image, number in ((blocks_image(across * side, down * side, canvas), 1), (blocks_image(side, side, canvas), 0)):
        plan = tile_plan(image.size, config)
        assert plan.grid == (across, down) and plan.canvas == plan.resized == canvas
        tiles = [centres(np.asarray(tile), side, side) for tile in cut_tiles(image, plan)]
        every = [
            (t, r, c) for t in range(number, plan.tiles if number else 1) for r in range(side) for c in range(side)
        ]
        kept = {every[i] for i in draw.choice(len(every), len(every) // 5, replace=False)}
        views = kept_views(image, plan, side, selection_of(sorted(kept)))
        rows, columns = (down * side, across * side) if number else (side, side)
        seen = centres(np.asarray(views[number][1]), rows, columns)
        bright = {tuple(color) for color in seen[seen[..., 2] > 0.6 * BLUE].round().astype(int)}
        expected = np.stack([tiles[t][r, c] for t, r, c in kept])
        nearest = abs(np.stack(sorted(bright))[:, None] - expected[None]).max(-1)
        # Colours of neighbouring blocks differ by 2 and more here, resizing moves the middle of a block by less than 1.
        assert len(bright) == len(kept) and (nearest.min(0) <= 1).all() and (nearest.min(1) <= 1).all()
        assert not bright_colors(views[1 - number][1]).size, "nothing of the other view is kept"


@pytest.mark.parametrize("hf", [False, True], ids=["llava", "llava_hf"])
@pytest.mark.parametrize("canvas", REAL, ids=str)
def test_odd_sizes_at_full_size(canvas, hf):
    """Images that do not fill their canvas: every patch that the LLM reads is drawn, and drawn where the image is."""
    form = "llava_hf" if hf else "llava"
    config = SimpleNamespace(
        mm_tile_size=336,
        image_aspect_ratio="anyres",
        image_grid_pinpoints=REAL,
        mm_patch_merge_type="spatial_unpad",
        mm_checkpoint_format=form,
    )
    image, side = where_image(ODD[canvas]), 24
    plan = tile_plan(image.size, config)
    assert plan.canvas == canvas and plan.resized != canvas
    order = [divmod(i, side * side) for i in merge_order(plan, side).tolist() if i >= 0]
    places = [(t, *divmod(i, side)) for t, i in order]
    tiles = [centres(np.asarray(tile), side, side) for tile in cut_tiles(image, plan)]
    across, down = plan.grid
    for number, (_, view) in enumerate(kept_views(image, plan, side, selection_of(places))):
        rows, columns = (down * side, across * side) if number else (side, side)
        seen = centres(np.asarray(view), rows, columns)
        kept = np.zeros((rows, columns), dtype=bool)
        for t, r, c in places:
            if min(t, 1) == number:
                at = (r, c) if t == 0 else ((t - 1) // across * side + r, (t - 1) % across * side + c)
                kept[at] = True
                if abs(tiles[t][r, c] - BLUE)[2] < 4 and abs(seen[at] - BLUE)[2] < 4:  # image, no padding
                    assert abs(seen[at] - tiles[t][r, c]).max() < 8, (t, r, c)
        image_part = abs(seen[..., 2] - BLUE) < 4
        assert image_part[kept].mean() > 0.97 and not (image_part & ~kept & (seen[..., 0] > 130)).any()


def box_of(picture):
    """(left, top, right, bottom) of what is bright in a picture of one kept patch."""
    pixels = np.asarray(picture).astype(int)
    ys, xs = np.nonzero((pixels[..., 0] > 130) & (pixels[..., 1] > 130) & (pixels[..., 2] < 120))
    return (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) if len(xs) else None


def cells(image, plan, places):
    """{place: (number of its view, box)}: where a patch is drawn, as the tests above have it."""
    found = {}
    for place in places:
        boxes = [box_of(view) for _, view in kept_views(image, plan, SIDE, selection_of([place]))]
        (number,) = [n for n, box in enumerate(boxes) if box]
        found[place] = number, boxes[number]
    return found


@pytest.mark.parametrize("anyres", ["official", "fastervlm"])
@pytest.mark.parametrize("grid", SIZES, ids=str)
def test_heat_is_where_the_score_is_high(grid, anyres):
    image, plan = make_case(grid, anyres=anyres)
    places = list(tile_colors(image, plan))
    levels = np.random.default_rng(1).permutation(len(places)) / (len(places) - 1)
    grey = Image.new("RGB", image.size, (120, 120, 120))
    views = [np.asarray(view).astype(float) for _, view in heat_views(grey, plan, SIDE, places, levels)]
    shown_at = []
    some = list(range(0, len(places), 3))
    for number, (left, top, right, bottom) in cells(image, plan, [places[i] for i in some]).values():
        block = views[number][top + 1 : bottom - 1, left + 1 : right - 1].reshape(-1, 3)
        assert (np.ptp(block, axis=0) <= 1).all(), "one patch, one colour"
        shown_at.append(block.mean(0) @ [0.299, 0.587, 0.114])
    by_level = np.array(shown_at)[levels[some].argsort()]
    assert (np.diff(by_level) > -1).all() and np.ptp(by_level) > 100, "brighter wherever the score is higher"


def scored_selection(image, plan, places, k_text=3, k_saliency=5):
    order, side2 = merge_order(plan, SIDE).tolist(), SIDE * SIDE
    draw = np.random.default_rng(2)
    text, saliency = (torch.tensor(draw.random(len(order)), dtype=torch.float32) for _ in range(2))
    newline = torch.tensor(order) < 0
    text[newline] = saliency[newline] = float("nan")
    selection = selection_of(places, total=len(order))
    selection.report = {"text_score": text, "saliency_score": saliency, "k_text": k_text, "k_saliency": k_saliency}
    at = [(-1, 0, -1) if i < 0 else (i // side2, *divmod(i % side2, SIDE)) for i in order]
    return selection, at


def inside(picture, page):
    """Whether a picture is somewhere on a page, pixel by pixel."""
    small, large = np.asarray(picture).astype(np.int16), np.asarray(page).astype(np.int16)
    height, width = small.shape[:2]
    if height > large.shape[0] or width > large.shape[1]:
        return False
    windows = np.lib.stride_tricks.sliding_window_view(large[: large.shape[0] - height + 1, :, 0], width, axis=1)
    rows, columns = np.nonzero((windows == small[0, :, 0]).all(-1))
    return any((large[y : y + height, x : x + width] == small).all() for y, x in zip(rows, columns, strict=True))


@pytest.mark.parametrize("grid", [(2, 2), (1, 3), "pad"], ids=str)
def test_page_of_scores(grid):
    image, plan = make_case(grid)
    kept = list(tile_colors(image, plan))[::9]
    selection, at = scored_selection(image, plan, kept)
    drawn = draw_scores(image, plan, SIDE, selection)
    for name in ("text_score", "saliency_score"):
        scores = np.nan_to_num(selection.report[name].numpy())
        for _, view in heat_views(image, plan, SIDE, at, np.sqrt(scores / scores.max()), kept):
            assert inside(view, drawn), name
    page = draw_overlay(image, plan, SIDE, {"adav": selection, "other": selection_of(kept)}, why=True)
    assert inside(drawn, page) and not inside(drawn, draw_overlay(image, plan, SIDE, {"adav": selection}))
    # The bar: k_text of K from the left under one map, the others under the other.
    pixels = np.asarray(drawn).astype(int)
    text = np.abs(pixels - [0, 130, 140]).sum(-1) == 0
    saliency = np.abs(pixels - [215, 105, 20]).sum(-1) == 0
    widths = [part.any(0).sum() for part in (text, saliency)]
    assert abs(widths[0] / sum(widths) - 3 / 8) < 0.01
    with pytest.raises(UserError, match="no scores"):
        draw_scores(image, plan, SIDE, selection_of(kept))


def test_what_is_left_inside_the_llm():
    image, plan = make_case((2, 1))
    all_ = list(tile_colors(image, plan))
    selection = selection_of(all_, total=len(all_))
    draw = np.random.default_rng(3)
    first = np.sort(draw.choice(len(all_), 20, replace=False))
    second = np.append(np.sort(draw.choice(first, 6, replace=False)), -1)
    selection.report = {
        "survivors": [torch.tensor(first), torch.tensor(second)],
        "cuts": ["after layer 1", "in layer 3"],
    }
    assert left_of(selection) == [all_[i] for i in second[:-1]] + [(-1, -1, -1)]
    assert counted(selection) == f"7 of {len(all_)} tokens after the last cut (1 made)"
    for ours, theirs in zip(
        kept_views(image, plan, SIDE, selection),
        kept_views(image, plan, SIDE, selection_of([all_[i] for i in second[:-1]])),
        strict=True,
    ):
        assert np.array_equal(np.asarray(ours[1]), np.asarray(theirs[1]))
    page = draw_stages(image, plan, SIDE, selection, width=600)
    for slots in (range(len(all_)), first, second[:-1]):
        for _, view in kept_at(image, plan, SIDE, [all_[i] for i in slots], 0.42):
            assert inside(view, page)
    assert inside(page, draw_overlay(image, plan, SIDE, {"fastv": selection}, why=True))


@pytest.mark.parametrize("grid", SIZES, ids=str)
def test_classes_of_the_cache_have_their_colours_in_place(grid):
    image, plan = make_case(grid)
    places = list(tile_colors(image, plan))
    classes = np.random.default_rng(4).integers(ABSENT, CORE + 1, len(places))
    views = [np.asarray(view).astype(float) for _, view in class_views(image, plan, SIDE, places, classes)]
    some = list(range(0, len(places), 3))
    where = cells(image, plan, [places[i] for i in some]).values()
    for (number, (left, top, right, bottom)), name in zip(where, classes[some], strict=True):
        red, green, blue = views[number][top:bottom, left:right].reshape(-1, 3).mean(0)
        found = (
            ABSENT if max(red, blue) < 60
            else CORE if red > blue + 60
            else SECONDARY if blue > red + 60
            else MINOR
        )  # fmt: skip
        assert found == name


def test_class_of_most_layers():
    layers = np.array([[CORE, CORE, MINOR, ABSENT], [MINOR, CORE, SECONDARY, MINOR], [MINOR, MINOR, SECONDARY, ABSENT]])
    assert shown(layers).tolist() == [MINOR, CORE, SECONDARY, ABSENT]
    assert shown(layers[:2]).tolist() == [CORE, CORE, SECONDARY, MINOR], "of equals the one that is read more"
    assert shown(layers, layer=2).tolist() == layers[1].tolist()


def test_strip_and_frames_of_the_cache(tmp_path):
    image, plan = make_case((3, 1))
    places = list(tile_colors(image, plan))[:12]
    draw = np.random.default_rng(5)
    states = [draw.integers(ABSENT, CORE + 1, (2, len(places))) for _ in range(5)]
    cache = CacheStates(selection_of(places), states, interval=2)
    strip = draw_caches(image, plan, SIDE, {"adav": cache}, layer=1)
    for state in states:
        for _, view in class_views(image, plan, SIDE, places, state[0], 0.42):
            assert inside(view, strip)
    frames = cache_frames(image, plan, SIDE, {"adav": cache, "cls": cache}, layer=2, title="why?")
    assert len(frames) == 5 and len({frame.size for frame in frames}) == 1
    for frame, state in zip(frames, states, strict=True):
        for _, view in class_views(image, plan, SIDE, places, state[1]):
            assert inside(view, frame)
    save_frames(frames, tmp_path / "steps.gif")
    with Image.open(tmp_path / "steps.gif") as written:
        assert (written.n_frames, written.size) == (5, frames[0].size)
        written.seek(3)
        difference = np.abs(np.asarray(written.convert("RGB")).astype(int) - np.asarray(frames[3]).astype(int))
    assert difference.mean() < 3, "256 colours, but the same picture"


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
    assert counted(plain) == "1 of 100 tokens"
    assert counted(merged) == "4 of 100 tokens (3 newline)", "rows of the image's tokens that are no patch"
    merged.indices = torch.tensor([-1, 20, -1, -1])
    assert counted(merged) == "4 of 100 tokens (3 made)"
    twice = selection_of([(0, 2, 3), (0, 2, 3)])
    assert counted(twice) == "2 of 100 tokens (1 twice)"
    assert counted(selection_of([], total=0)) == "no vision token"
    pages = [draw_overlay(image, plan, SIDE, {"m": kept}) for kept in (plain, merged)]
    assert pages[1].height > pages[0].height, "the legend says what made tokens are"


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
    code = "import sys, llava.serve.overlay, llava.overlay.cache_strip, llava.serve.overlay; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_patches_with_fine_detail_have_another_outline():
    image, plan = make_case("pad")
    places = [(0, 2, 1), (0, 3, 4)]
    selection = selection_of(places)
    outlines = []
    for report in ({}, {"detail": torch.tensor([False, True])}):
        selection.report = report
        ((_, view),) = kept_views(image, plan, SIDE, selection)
        pixels, cell = np.asarray(view), view.width // SIDE
        outlines.append([tuple(pixels[row * cell, column * cell].tolist()) for _, row, column in places])
    assert outlines == [[OUTLINE, OUTLINE], [OUTLINE, DETAIL_OUTLINE]]
    # After a cut inside the LLM, only what is left is drawn.
    for survivor, left in ((0, []), (1, places[1:])):
        selection.report["survivors"] = [torch.tensor([survivor])]
        assert detailed(selection) == left
