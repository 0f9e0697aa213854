"""Methods that zoom: which crops are encoded, by hand; and that each tile of an image is encoded once, when it is needed."""

import math
from types import SimpleNamespace

import pytest
import torch
from support.image_tokens import flat_image
from tiny_checkpoints import build_reference, make_image, save_llava_hf

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.inference.loaded_checkpoint import LoadedCheckpoint
from llava.methods.before_llm.adav_zoom import AdaVZoom
from llava.methods.before_llm.fastervlm import FasterVLM
from llava.mm_utils import TilePlan, crop_overlap
from llava.model.image_tokens import layout_of

SIZES = [(40, 30), (100, 50), (31, 90), (57, 57)]
ASKED = ["What colour is the shape?", "Yes?", "How many digits are there in the picture?", "Is the square red?"]
ZOOMING = [
    ("adav_zoom", {"crops": 1}),
    ("adav_zoom", {"crop_share": 0.4}),
    ("fastervlm", {"crops": 1}),
    ("visionzip", {"crops": 1}),
]


# ------------------------------------------------------------------------------------------------------------ by hand
def test_overlap_of_patches_and_crops_by_hand():
    # Two crops of 4 x 4 pixels. The image lies at x = 1 .. 7, so a patch of tile 0 is 2 pixels wide: 1 .. 3, 3 .. 5, 5 .. 7.
    plan = TilePlan((60, 40), 4, (2, 1), (8, 4), (6, 4), (1, 0))
    torch.testing.assert_close(crop_overlap(plan, 3), torch.tensor([[1, 0.5, 0] * 3, [0, 0.5, 1] * 3]).double())
    # The image lies at y = 1 .. 7 of two crops above each other; each row of 2 patches is 3 pixels high.
    plan = TilePlan((40, 60), 4, (1, 2), (4, 8), (4, 6), (0, 1))
    torch.testing.assert_close(crop_overlap(plan, 2), torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]]).double())


@pytest.mark.parametrize("size", [(100, 30), (35, 80), (61, 60)])
def test_overlap_is_the_share_of_the_points_of_a_patch(size):
    tile, side, grid = 20, 5, (2, 3)
    canvas = (tile * grid[0], tile * grid[1])
    scale = min(c / s for c, s in zip(canvas, size, strict=True))
    resized = tuple(int(s * scale) for s in size)
    plan = TilePlan(
        size, tile, grid, canvas, resized, tuple((c - r) // 2 for c, r in zip(canvas, resized, strict=True))
    )
    # Points in the middle of a fine raster over the image: the patch and the crop of each of them.
    points, found = 40, torch.zeros(6, side * side)
    place = torch.arange(side * points)
    x, y = (
        ((place + 0.5) / (side * points) * length + offset).div(tile, rounding_mode="floor").long()
        for length, offset in zip(plan.resized, plan.offset, strict=True)
    )
    crop = y[:, None] * grid[0] + x
    patch = (place // points)[:, None] * side + place // points
    found.index_put_((crop.flatten(), patch.flatten()), torch.tensor(1 / points**2), accumulate=True)
    torch.testing.assert_close(crop_overlap(plan, side).float(), found, atol=1.5 / points, rtol=0)


SIZES_OF_TILES, IMPORTANCE = (4, 4, 4, 2, 0), (0.1, 0.5, 0.4, 9.0)  # unpadding left nothing of the last crop


@pytest.mark.parametrize(
    "options, budget, tiles",
    [
        ({"crops": 0}, 3, (0,)),
        ({"crops": 1}, 3, (0, 2)),
        ({"crops": 2}, 3, (0, 2, 3)),
        ({"crops": 9}, 3, (0, 1, 2, 3)),
        ({"crop_share": 0}, 3, (0,)),
        ({"crop_share": 0.5}, 3, (0, 2)),
        ({"crop_share": 0.6}, 3, (0, 2, 3)),
        ({"crop_share": 1}, 3, (0, 1, 2, 3)),
        ({"crops": 1}, 8, (0, 2)),
        ({"crops": 1}, 9, (0, 2, 3)),
        ({"crop_share": 0.1}, 11, (0, 1, 2, 3)),
        ({"crops": 0}, 99, (0, 1, 2, 3)),
    ],
)
def test_which_crops_are_encoded_by_hand(options, budget, tiles):
    method = FasterVLM(**options)
    assert method.tiles(SIZES_OF_TILES, IMPORTANCE, budget) == tiles
    every = options.get("crops", 0) >= 3 or budget >= 14
    assert method.needs_every_crop(SIZES_OF_TILES, budget) == every


def test_equal_crops_come_in_raster_order():
    assert FasterVLM(crops=2).tiles((4,) * 5, (0.2, 0.3, 0.2, 0.2), 3) == (0, 1, 2)


def test_importance_by_hand():
    # Cosines with the word are 1 and 0, so the text score is (e, 1) / (1 + e). Of the splits of two tokens, one and one
    # has the largest product, so both scores have half of the weight.
    whole = flat_image([[1.0, 0.0], [0.0, 1.0]], [0.1, 0.3])
    method, word = AdaVZoom(temperature=1.0), torch.tensor([[2.0, 0.0]])
    e = math.e
    expected = [(e / (1 + e) + 0.25) / 2, (1 / (1 + e) + 0.75) / 2]
    assert method.importance(whole, word, 2).tolist() == pytest.approx(expected)
    assert method.importance(whole, word[:0], 2).tolist() == pytest.approx([0.25, 0.75])
    assert FasterVLM(crops=1).importance(whole, word, 2).tolist() == pytest.approx([0.1, 0.3])


def test_what_contradicts_itself_is_refused():
    with pytest.raises(UserError, match="'crops' is 1 and 'crop_share' is 0.5, allowed is one of them"):
        FasterVLM(crops=1, crop_share=0.5)
    with pytest.raises(UserError, match="allowed for adav_zoom is null"):
        AdaVZoom(compat="public")
    assert not FasterVLM().zooms and AdaVZoom().zooms and FasterVLM(crop_share=0.0).zooms


# ---------------------------------------------------------------------------------------------------------- the model
@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava_next")
    save_llava_hf(build_reference("llava_next"), folder)
    return LoadedCheckpoint(folder, device="cpu")


@pytest.fixture
def tower(loaded, monkeypatch):
    """What goes through the tower: `passes` has the tiles of each pass, `tiles` all of them."""
    model_tower, seen = loaded.model.get_vision_tower(), SimpleNamespace(passes=[], tiles=[])
    run = model_tower.forward

    def forward(pixels, wanted=()):
        seen.passes.append(len(pixels))
        seen.tiles += [tile.numpy().tobytes() for tile in pixels]
        return run(pixels, wanted)

    monkeypatch.setattr(model_tower, "forward", forward)
    return seen


def pictures(sizes=SIZES):
    return [make_image(*size, seed=n) for n, size in enumerate(sizes)]


def config(method, tokens=7, **options):
    return AdaVConfig(method=method, overall_tokens=tokens, options=options)


def kept(prepared):
    return [selection for row in prepared.selections for selection in row]


@pytest.mark.parametrize("method", ["adav_zoom", "fastervlm", "visionzip"])
@pytest.mark.parametrize("tokens", [1, 7, 30, 500])
def test_with_all_crops_it_is_the_method_itself(loaded, method, tokens):
    whole = loaded.prepare(ASKED, pictures(), config(method.removesuffix("_zoom"), tokens))
    for options in ({"crops": 9}, {"crop_share": 1.0}):
        zoomed = loaded.prepare(ASKED, pictures(), config(method, tokens, **options))
        if "crops" in options:  # one pass over all tiles, so that not even the rounding differs
            assert torch.equal(zoomed.inputs_embeds, whole.inputs_embeds)
        torch.testing.assert_close(zoomed.inputs_embeds, whole.inputs_embeds)
        for ours, theirs in zip(kept(zoomed), kept(whole), strict=True):
            assert torch.equal(ours.indices, theirs.indices) and torch.equal(ours.tile, theirs.tile)
            assert ours.sources == theirs.sources and ours.total == theirs.total
            assert ours.report.get("k_text") == theirs.report.get("k_text")


def test_one_tile_is_adav(tmp_path):
    save_llava_hf(build_reference("llava"), tmp_path)
    loaded = LoadedCheckpoint(tmp_path, device="cpu")
    ours, adav = (loaded.prepare(ASKED, pictures(), config(name, 5)) for name in ("adav_zoom", "adav"))
    assert torch.equal(ours.inputs_embeds, adav.inputs_embeds) and all(one.tiles is None for one in kept(ours))


@pytest.mark.parametrize("method, options", ZOOMING, ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 20, 33, 40])
def test_the_budget_is_exact_and_places_are_those_of_the_image(loaded, method, options, tokens):
    images = pictures()
    setting = config(method, tokens, **options)
    encoded = loaded.encode([loaded.pixels(image, setting) for image in images], setting)
    prepared = loaded.splice(ASKED, [[one] for one in encoded], setting)
    for one, selection in zip(encoded, kept(prepared), strict=True):
        layout = layout_of(one.plan, loaded.shape.side, one.plan.tiles)
        patches, whole = len(layout.patches), len(layout.tile)
        assert selection.total == whole and len(selection.indices) == (tokens if tokens < patches else whole)
        places = selection.indices[selection.indices >= 0]
        assert torch.equal(layout.tile[places], selection.tile[selection.indices >= 0])
        assert torch.equal(layout.row[places], selection.row[selection.indices >= 0])
        seen = {int(layout.tile[token]) for group in [places.tolist(), *selection.sources] for token in group}
        assert seen - {-1} <= set(selection.tiles)
        if (
            method == "adav_zoom" and tokens <= 20
        ):  # a budget that reaches all patches of the encoded tiles needs no scores
            inside = torch.isin(layout.tile, torch.tensor(selection.tiles))
            for name in ("text_score", "saliency_score"):
                assert torch.equal(selection.report[name].isfinite(), inside)


@pytest.mark.parametrize("method, options", ZOOMING, ids=str)
def test_a_batch_is_its_rows(loaded, method, options):
    setting = config(method, **options)
    together = kept(loaded.prepare(ASKED, pictures(), setting))
    for n, batch in enumerate(together):
        (alone,) = kept(loaded.prepare(ASKED[n : n + 1], pictures()[n : n + 1], setting))
        assert torch.equal(alone.indices, batch.indices) and alone.tiles == batch.tiles
        torch.testing.assert_close(alone.features, batch.features)


def test_a_prompt_with_two_images(loaded):
    setting = config("adav_zoom", crops=1)
    images = loaded.encode([loaded.pixels(image, setting) for image in pictures()[:2]], setting)
    (both,) = loaded.splice(ASKED[:1], [images], setting).selections
    assert [len(one.indices) for one in both] == [7, 7] and all(len(one.tiles) == 2 for one in both)


@pytest.mark.parametrize("method", ["adav_zoom", "fastervlm", "visionzip"])
@pytest.mark.parametrize("crops", [0, 1, 2])
def test_the_tower_gets_one_tile_and_the_crops(loaded, tower, method, crops):
    (selection,) = kept(loaded.prepare(ASKED[:1], pictures([(90, 90)]), config(method, crops=crops)))
    assert tower.passes == ([1, crops] if crops else [1])
    assert len(selection.tiles) == 1 + crops == len(set(tower.tiles))


def test_no_tile_is_encoded_twice_for_eight_questions(loaded, tower):
    setting = config("adav_zoom", crops=1)
    (image,) = loaded.encode([loaded.pixels(pictures([(90, 90)])[0], setting)], setting)
    size = image.nbytes
    words = [*ASKED, "red green", "What?", "two three circle", "The left digits?"]
    chosen = [
        selection.tiles
        for start in (0, 4)
        for selection in kept(loaded.splice(words[start : start + 4], [[image]] * 4, setting))
    ]
    wanted = set().union(*chosen)
    assert len(wanted) > 2, "the questions must want different crops for this to be a test"
    assert len(tower.tiles) == len(set(tower.tiles)) == len(wanted)
    assert len(tower.passes) <= 3 and image.nbytes == size, "room for all tiles was counted from the start"
    again = [selection.tiles for selection in kept(loaded.splice(words, [[image]] * 8, setting))]
    assert again == chosen and len(tower.tiles) == len(wanted)
    # Another budget and another number of crops use what is there.
    more = kept(loaded.splice(words, [[image]] * 8, config("adav_zoom", 9, crops=2)))
    assert loaded.model.encoding(setting) == loaded.model.encoding(config("adav_zoom", 9, crops=2))
    assert len(tower.tiles) == len(set(tower.tiles)) == len(wanted.union(*(one.tiles for one in more)))


def test_questions_that_want_the_same_tiles_share_them(loaded):
    """So that their prefix can be prefilled once where the method does not read the question."""
    setting = config("fastervlm", crops=1)
    images = loaded.encode([loaded.pixels(image, setting) for image in pictures()[1:3]], setting)
    method, clock = setting.make_method(), loaded.prepare(ASKED[:1], pictures()[:1], setting).clock
    texts = [torch.zeros(0, loaded.shape.width)] * 4
    a, b, c, d = loaded.model.zoom([images[0], images[1], images[0], images[1]], texts, method, 7, clock)
    assert a is c and b is d and a is not b


def test_the_crop_with_what_stands_out_is_encoded(loaded, monkeypatch):
    """The importance of one patch of tile 0 alone decides which crop is taken."""
    side = loaded.shape.side
    for row, column, tile in ((0, 0, 1), (0, side - 1, 2), (side - 1, 0, 3), (side - 1, side - 1, 4)):
        spike = torch.zeros(side * side)
        spike[row * side + column] = 1
        monkeypatch.setattr(FasterVLM, "importance", lambda *_, spike=spike: spike)
        (selection,) = kept(loaded.prepare(ASKED[:1], pictures([(90, 90)]), config("fastervlm", crops=1)))
        assert selection.tiles == (0, tile)
