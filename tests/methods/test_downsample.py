"""The baseline downsample: sizes and cells by hand, the model against transformers' own interpolation, and its costs."""

import pytest
import torch
from tiny_checkpoints import build_reference, make_image, save_llava_hf

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.constants import IMAGE_TOKEN_INDEX as IMAGE
from llava.costs.model_shape import ImageCounts
from llava.methods.before_llm.downsample import cells, smaller_side
from llava.mm_utils import left_pad, merge_order, process_images, tile_plan
from llava.model.builder import load_pretrained_model
from llava.model.image_tokens import layout_of, tokens_kept

SIZES = [(97, 61), (40, 30), (57, 57)]


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def loaded(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    save_llava_hf(build_reference(request.param), folder)
    _, model, processor, _ = load_pretrained_model(folder, device_map="cpu")
    return model, processor


def prepare(model, processor, tokens, sizes=SIZES, method="downsample"):
    images = [make_image(*size, seed=i) for i, size in enumerate(sizes)]
    pixels = list(process_images(images, processor, model.config))
    ids, mask = left_pad([torch.tensor([1, 9, IMAGE, 10][i % 2 :]) for i in range(len(sizes))], 3)
    config = AdaVConfig(method=method, overall_tokens=tokens)
    return pixels, model.prepare(ids, pixels, list(sizes), mask, config=config)


def test_sizes_by_hand():
    assert [smaller_side(24, budget, 0) for budget in (144, 58, 29, 192, 576, 1000, 1)] == [12, 7, 5, 13, 24, 24, 1]
    # A newline token behind the picture: 144 leave 143 for patches, which is 11 x 11.
    assert [smaller_side(24, budget, 1) for budget in (144, 145, 577, 2)] == [11, 12, 24, 1]
    with pytest.raises(UserError, match="a budget of 1, allowed is at least 2: one patch and the newline token"):
        smaller_side(24, 1, 1)


def test_cells_by_hand():
    assert cells(4, 2) == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    # Three columns on two: the middle one has its centre on the line and belongs to the right.
    assert cells(3, 2) == [[0], [1, 2], [3, 6], [4, 5, 7, 8]]
    assert sorted(patch for cell in cells(24, 7) for patch in cell) == list(range(576)) and all(cells(24, 7))


@pytest.mark.parametrize("tokens", [2, 5, 10, 15])
def test_tokens_are_those_of_a_smaller_picture(loaded, tokens):
    """Of 16 patches per tile: 1, 4, 9 and again 9 (or 1, 4, 9, 9 with a newline token)."""
    model, processor = loaded
    pixels, prepared = prepare(model, processor, tokens)
    tower, newline = model.get_vision_tower(), int(model.config.mm_patch_merge_type == "spatial_unpad")
    for row, (one, size) in enumerate(zip(pixels, SIZES, strict=True)):
        (kept,) = prepared.selections[row]
        side = smaller_side(4, tokens, newline)
        assert len(kept.indices) == side**2 + newline <= tokens
        tiles = one if one.dim() == 4 else one[None]
        plan = tile_plan(size, model.config)
        assert kept.total == len(merge_order(plan, 4, len(tiles))) and (kept.indices == -1).all()
        assert kept.sources == cells(4, side) + [[]] * newline
        # transformers' tower on tile 0, resized; its position embeddings are interpolated.
        patch = tower.config.patch_size
        small = torch.nn.functional.interpolate(tiles[:1], size=(patch * side,) * 2, mode="bicubic", antialias=True)
        with torch.no_grad():
            out = tower.vision_tower(small, interpolate_pos_encoding=True, output_hidden_states=True)
            want = model.model.mm_projector(out.last_hidden_state[0, 1:])
        torch.testing.assert_close(kept.features[: side**2], want, rtol=1e-4, atol=1e-5)
        if newline:
            assert torch.equal(kept.features[-1], model.model.image_newline)


def test_an_image_of_few_patches_stays(loaded):
    model, processor = loaded
    _, whole = prepare(model, processor, 5, method="none")
    most = max(int((kept.tile >= 0).sum()) for (kept,) in whole.selections)
    _, prepared = prepare(model, processor, most)
    assert torch.equal(prepared.inputs_embeds, whole.inputs_embeds)


def test_the_whole_picture_comes_before_a_smaller_one(loaded):
    """A budget that is below all tiles but not below one: tile 0 in full."""
    model, processor = loaded
    newline = int(model.config.mm_patch_merge_type == "spatial_unpad")
    _, prepared = prepare(model, processor, 16 + newline)
    assert [len(kept.indices) for (kept,) in prepared.selections] == [16 + newline] * 3
    assert prepared.selections[0][0].total >= 16 + newline


@pytest.mark.parametrize("size", [(300, 7), (7, 300), (1, 1), (120, 110)])
def test_tokens_are_known_from_the_size_of_the_image(loaded, size):
    """Also of a thin image, of whose crops unpadding leaves nothing: its smaller picture still ends with a newline."""
    model, processor = loaded
    plan = tile_plan(size, model.config)
    for tokens in (2, 6, 12, 15, 17):
        config = AdaVConfig(method="downsample", overall_tokens=tokens)
        (kept,) = prepare(model, processor, tokens, [size])[1].selections[0]
        assert tokens_kept(config.make_method(), layout_of(plan, 4, plan.tiles), tokens) == len(kept.indices)
        assert ImageCounts.from_plan(plan, 4).smaller(4, tokens).tokens == len(kept.indices)


def test_rows_are_those_of_batches_of_one(loaded):
    model, processor = loaded
    _, together = prepare(model, processor, 17)
    for row, size in enumerate(SIZES):
        image = make_image(*size, seed=row)
        pixels = list(process_images([image], processor, model.config))
        config = AdaVConfig(method="downsample", overall_tokens=17)
        alone = model.prepare(torch.tensor([[1, IMAGE, 10]]), pixels, [size], config=config).selections[0][0]
        torch.testing.assert_close(alone.features, together.selections[row][0].features)


def test_encodings_of_other_budgets_are_not_shared(loaded):
    model, _ = loaded
    keys = {model.encoding(AdaVConfig(method="downsample", overall_tokens=tokens)) for tokens in (5, 10, 10)}
    assert len(keys) == 2


def test_a_budget_below_one_patch_is_a_sentence(loaded):
    model, processor = loaded
    if model.config.mm_patch_merge_type == "spatial_unpad":
        with pytest.raises(UserError, match="allowed is at least 2"):
            prepare(model, processor, 1)
    else:
        assert [len(kept.indices) for (kept,) in prepare(model, processor, 1)[1].selections] == [1] * 3
