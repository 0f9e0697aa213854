"""options.detail_share: the detail of a patch by hand, exact budgets of every method, batches, padding, and refusals."""

import math

import pytest
import torch
from image_tokens import flat_image, make_image, make_text
from shapes import PRESETS, random_model
from tiny_checkpoints import build_reference, save_llava_hf
from tiny_checkpoints import make_image as make_picture

from llava.common.errors import UserError
from llava.config import AdaVConfig, ConfigError
from llava.constants import IMAGE_TOKEN_INDEX
from llava.methods.before_llm import SELECTORS, ImageTokens, Selection, Selector, select, select_all
from llava.methods.before_llm.base import take
from llava.methods.before_llm.detail import gradient_energy, with_finest
from llava.methods.before_llm.tiles import members_of_tiles
from llava.mm_utils import TilePlan, picture_bounds, process_images
from llava.model.builder import load_pretrained_model

CHOOSERS = [name for name in SELECTORS if SELECTORS[name].uses_budget]


def whole(tiles, side):
    return torch.tensor([[0, side, 0, side]] * tiles)


def detailed(grid=(2, 1), seed=0):
    image = make_image(grid, seed=seed)
    image.detail = torch.rand(len(image.tile), generator=torch.Generator().manual_seed(seed + 100))
    return image


# --- the detail of a patch -------------------------------------------------------------------------------------------


def test_gradient_energy_by_hand():
    """Two patches of 2 x 2 pixels beside each other. Pairs across their border do not count."""
    pixels = torch.tensor([[0.0, 3.0, 9.0, 9.0], [0.0, 1.0, 9.0, 7.0]]).expand(1, 2, 2, 4)
    square = torch.cat([pixels, torch.zeros(1, 2, 2, 4)], dim=2)
    # Left: across (9 + 1) / 2, down (0 + 4) / 2. Right: across (0 + 4) / 2, down (0 + 4) / 2. Two channels.
    assert gradient_energy(square, whole(1, 4), 2).tolist() == [[14.0, 8.0, 0.0, 0.0]]


def test_pairs_with_padding_do_not_count():
    picture = torch.ones(1, 1, 4, 4)
    picture[..., 3] = 5.0
    assert gradient_energy(picture, whole(1, 4), 2)[0].tolist() == [0.0, 16.0, 0.0, 16.0]
    assert gradient_energy(picture, torch.tensor([[0, 4, 0, 3]]), 2).eq(0).all(), "column 3 is padding"
    assert gradient_energy(picture, torch.tensor([[2, 4, 0, 4]]), 2)[0].tolist() == [0.0, 0.0, 0.0, 16.0]


def test_tiles_do_not_change_each_other():
    pixels = torch.rand(5, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    together = gradient_energy(pixels, whole(5, 24), 8)
    alone = [gradient_energy(pixels[i : i + 1], whole(1, 24), 8) for i in range(5)]
    assert torch.equal(together, torch.cat(alone)) and together.shape == (5, 9)


def test_bounds_of_the_picture():
    square = TilePlan((8, 4), 16, None, (8, 8), (8, 4), (0, 2))
    # Twice as large: the bicubic filter mixes four pixels with padding.
    assert picture_bounds(square).tolist() == [[8, 8, 0, 16]]
    assert picture_bounds(TilePlan((64, 32), 16, None, (64, 64), (64, 32), (0, 16))).tolist() == [[6, 10, 0, 16]]
    assert picture_bounds(TilePlan((8, 4), 16, None, (4, 4), (8, 4), (-2, 0))).tolist() == [[0, 16, 0, 16]]
    crops = TilePlan((30, 10), 16, (2, 1), (32, 16), (30, 10), (1, 3), "spatial_unpad")
    assert picture_bounds(crops).tolist() == [[0, 16, 0, 16], [3, 13, 1, 16], [3, 13, 0, 15]]
    assert picture_bounds(crops, tiles=1).tolist() == [[0, 16, 0, 16]]


# --- every method ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid, budget, share", [(None, 7, 0.1), ((2, 1), 58, 0.5), ((1, 3), 144, 1)], ids=str)
@pytest.mark.parametrize("name", CHOOSERS)
def test_the_finest_patches_stay(name, grid, budget, share):
    image, text = detailed(grid), make_text()
    kept = select(name, image, text, budget, share)
    asked = math.floor(share * budget + 1e-9)
    patches = image.patches
    finest = patches[image.detail[patches].argsort(descending=True)[:asked]]
    assert len(kept.indices) == len(kept.features) == budget
    assert kept.indices[kept.report["detail"]].tolist() == sorted(finest.tolist())
    real = kept.indices[kept.indices >= 0]
    assert (real[1:] > real[:-1]).all() and (image.tile[real] >= 0).all()
    assert torch.equal(kept.features[kept.indices >= 0], image.features[real])
    assert torch.equal(kept.tile[kept.indices >= 0], image.tile[real])
    merged = [index for source in kept.sources for index in source]
    assert not set(merged) & set(finest.tolist()), "patches that are kept for their detail are not merged"
    assert len(kept.sources) == int((kept.indices < 0).sum())


@pytest.mark.parametrize("name", CHOOSERS)
def test_a_batch_with_detail_is_its_images(name):
    images, texts = [detailed(grid, seed) for seed, grid in enumerate([None, (2, 1), (2, 2)])], [make_text()] * 3
    for image, text, kept in zip(images, texts, select_all(name, images, texts, 29, 0.4), strict=True):
        alone = select(name, image, text, 29, 0.4)
        assert torch.equal(alone.indices, kept.indices) and alone.sources == kept.sources
        torch.testing.assert_close(alone.features, kept.features)


@pytest.mark.parametrize("name", CHOOSERS)
def test_the_method_chooses_among_the_other_patches(name):
    """As if the image did not have the patches that are kept for their detail."""
    image, text = detailed(None), make_text()
    kept = select(name, image, text, 20, 0.5)
    tile = image.tile.clone()
    tile[kept.indices[kept.report["detail"]]] = -1
    rest = ImageTokens(image.features, image.saliency, tile, image.row, image.column, image.key, image.tower)
    others = ~kept.report["detail"]
    alone = select(name, rest, text, 10)
    assert torch.equal(kept.indices[others], alone.indices) and kept.sources == alone.sources
    torch.testing.assert_close(kept.features[others], alone.features)


def test_patches_without_detail_leave_their_share_to_the_method():
    image = flat_image(torch.randn(6, 4), torch.tensor([6.0, 5, 4, 3, 2, 1]))
    image.detail = torch.tensor([0.0, 0, 0, 0, 2, math.nan])
    kept = select("cls", image, make_text(), 4, 0.75)
    assert kept.indices.tolist() == [0, 1, 2, 4] and kept.report["detail"].tolist() == [False, False, False, True]


def test_a_tile_may_have_no_patch_left():
    class Seen(Selector):
        def keep(self, image, text, budget):
            members, real, sizes = members_of_tiles(image)
            assert (
                sizes == [2, 0, 1]
                and members[real].tolist() == [0, 1, 2]
                and image.place("blank").tolist() == [0, 1, 0]
            )
            return take(image, image.patches[:budget])

    tile, zero = torch.tensor([0, 0, 1, 1, 2]), torch.zeros(5, dtype=torch.long)
    image = ImageTokens(torch.randn(5, 4), torch.rand(5), tile, zero, torch.tensor([0, 1, 0, 1, 0]))
    image.detail = torch.tensor([1.0, 1, 9, 8, 1])
    image.on_host.blank = torch.tensor([False, True, False, False, False])
    SELECTORS["seen"] = Seen
    try:
        assert select("seen", image, make_text(), 4, 0.5).indices.tolist() == [0, 1, 2, 3]
    finally:
        del SELECTORS["seen"]


def test_made_tokens_stay_behind_the_token_before_them():
    image = flat_image(torch.arange(8.0)[:, None], torch.zeros(8))
    chosen = Selection(torch.tensor([-1, 2, -1, 5]), torch.tensor([[-1.0], [2], [-2], [5]]), sources=[[], [0]])
    kept = with_finest(image, torch.tensor([7, 3]), chosen)
    assert kept.indices.tolist() == [-1, 2, -1, 3, 5, 7]
    assert kept.features.flatten().tolist() == [-1, 2, -2, 3, 5, 7]
    assert kept.report["detail"].tolist() == [False, False, False, True, False, True]


@pytest.mark.parametrize("name", ["cdpruner", "visionzip", "fastervlm"])
def test_kept_patches_have_a_gradient(name):
    image = detailed(None)
    image.features = image.features.requires_grad_()
    kept = select(name, image, make_text(), 10, 0.5)
    kept.features[kept.report["detail"]].sum().backward()
    assert image.features.grad[kept.indices[kept.report["detail"]]].eq(1).all()


# --- the model -------------------------------------------------------------------------------------------------------


def test_the_model_rates_the_pixels_of_the_tiles(tmp_path):
    """One line of text in a plain picture with newline tokens and padding: only the patches that it touches stay."""
    save_llava_hf(build_reference("llava_next"), tmp_path)
    _, model, processor, _ = load_pretrained_model(tmp_path, device_map="cpu")
    picture = make_picture(100, 50, seed=0)
    picture.paste((90, 90, 90), (0, 0, 100, 50))
    picture.paste((250, 250, 250), (40, 20, 43, 30))
    pixels, sizes = list(process_images([picture], processor, model.config)), [picture.size]
    ids = torch.tensor([[1, IMAGE_TOKEN_INDEX, 5]])
    prepared = model.prepare(ids, pixels, sizes, config=AdaVConfig(method="cls", overall_tokens=8))
    assert "detail" not in prepared.selections[0][0].report
    guarded = AdaVConfig(method="cls", overall_tokens=8, options={"detail_share": 1})
    kept = model.prepare(ids, pixels, sizes, config=guarded).selections[0][0]
    (image,) = model.encode(pixels, sizes, guarded)
    detail, tokens = image.tokens.detail, image.tokens
    has = torch.nonzero((detail > 1e-6) & (tokens.tile >= 0)).flatten()
    assert 1 <= len(has) <= 8 and set(has.tolist()) <= set(kept.indices.tolist())
    side = model.get_vision_tower().config.patch_size
    for index in has.tolist():
        tile, row, column = (int(place[index]) for place in (tokens.tile, tokens.row, tokens.column))
        shown = pixels[0][tile, :, row * side : (row + 1) * side, column * side : (column + 1) * side]
        assert float(shown.max()) > float(shown.min())


def test_encodings_with_and_without_detail_are_not_shared():
    model = random_model(PRESETS["tiny"].model_config(newline=True), "cpu", torch.float32, seed=0)
    plain, guarded = AdaVConfig(method="adav"), AdaVConfig(method="adav", options={"detail_share": 0.2})
    assert model.encoding(plain) != model.encoding(guarded)
    assert model.encoding(plain) == model.encoding(plain.replaced(options={"detail_share": 0}))


# --- what is refused -------------------------------------------------------------------------------------------------


def test_wrong_shares():
    with pytest.raises(ConfigError, match='"options.detail_share" is 1.5, allowed is a number from 0 to 1'):
        AdaVConfig(options={"detail_share": 1.5})
    with pytest.raises(UserError, match="'detail_share' is -1, allowed is a number from 0 to 1"):
        select("cls", detailed(), make_text(), 5, -1)
    with pytest.raises(UserError, match="ImageTokens.detail does not have the detail of each patch"):
        select("cls", make_image(), make_text(), 5, 0.5)
    with pytest.raises(ConfigError, match='"options.detail_share" is 0.5, but "options.compat" is "public"'):
        AdaVConfig(method="adav", options={"detail_share": 0.5, "compat": "public"})


@pytest.mark.parametrize("method", ["none", "no_image", "downsample", "fastv"])
def test_methods_that_choose_nothing_before_the_llm_ignore_it(method):
    config = AdaVConfig(method=method, options={"detail_share": 0.5})
    assert config.detail_share == 0 and config.unused_options() == ["detail_share"]


def test_vllm_refuses_it():
    from llava.integrations.vllm.settings import check

    check(AdaVConfig(method="adav", options={"detail_share": 0}))
    with pytest.raises(
        UserError, match='"options.detail_share" is 0.3, but the plugin for vLLM does not rate the pixels'
    ):
        check(AdaVConfig(method="adav", options={"detail_share": 0.3}))
