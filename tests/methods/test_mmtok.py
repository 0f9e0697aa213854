"""MMTok: recorded choices of the authors' code, cases worked by hand, a naive reference, and the words of a prompt."""

import json

import numpy as np
import pytest
import torch
from image_tokens import make_image, make_text
from recorded_choices import CASES, RECORDED, recorded, recorded_tile
from tiny_checkpoints import build_reference, save_llava_hf
from tiny_checkpoints import make_image as make_picture

from llava.config import AdaVConfig
from llava.constants import IMAGE_TOKEN_INDEX
from llava.methods.before_llm import SELECTORS, select, select_all
from llava.methods.before_llm.coverage import Coverage
from llava.methods.before_llm.mmtok import content_words, cover_greedily
from llava.methods.before_llm.tiles import split_evenly
from llava.mm_utils import TilePlan, blank_patches, process_images, tile_plan, tokenizer_image_token
from llava.model.builder import load_pretrained_model


@pytest.fixture(params=[False, True], ids=["changed rows", "all rows"])
def all_rows(request, monkeypatch):
    """Coverage as on a CPU and as on a GPU."""
    monkeypatch.setattr(Coverage, "all_rows", request.param)


def blanked(image, blank):
    """The same image, of which the patches `blank` [P] show only padding."""
    image.on_host.blank = blank
    return image


@pytest.mark.parametrize("case, budget", CASES)
def test_recorded_choices(case, budget, all_rows):
    text = recorded(f"{case}_text")
    kept = select("mmtok", recorded_tile(case), text, budget)
    assert kept.indices.tolist() == recorded(f"{case}_mmtok_{budget}").tolist()
    barred = torch.zeros(576, dtype=torch.bool)
    barred[recorded(f"{case}_barred").long()] = True
    kept = select("mmtok", blanked(recorded_tile(case), barred), text, budget)
    assert kept.indices.tolist() == recorded(f"{case}_mmtok_{budget}_barred").tolist()


@pytest.mark.parametrize("question, words", json.loads(str(RECORDED["mmtok_words"])))
def test_recorded_words(question, words):
    assert content_words(question) == words


def square(width, height, side=336):
    longer = max(width, height)
    return TilePlan(
        (width, height), side, None, (longer, longer), (width, height), ((longer - width) // 2, (longer - height) // 2)
    )


@pytest.mark.parametrize("width, height, barred", json.loads(str(RECORDED["mmtok_padding"])))
def test_recorded_padding(width, height, barred):
    assert torch.nonzero(blank_patches(square(width, height), 24)).flatten().tolist() == sorted(barred)


def test_words_by_hand():
    assert content_words("What is the colour of the bus?") == "colour of bus"
    # Letter A is a stop word in any case, B is none; a question of stop words stays as it is.
    assert content_words("A. cat\nB. dog") == "cat B dog" and content_words("Who is it?") == "Who is it?"
    assert content_words("") == "" and content_words("Answer the question using a single word or phrase.") == ""


def test_blank_patches_by_hand():
    # 8 x 4 pixels on a tile of 4 x 4 patches of 2 pixels: the image is rows 2 to 5 of 8, patches of rows 1 and 2.
    blank = blank_patches(square(8, 4, side=8), 4).view(4, 4)
    assert blank.all(dim=1).tolist() == [True, False, False, True] and int(blank.sum()) == 8
    # 4 x 8: the same for columns. 8 x 5: rows 1 to 5, the padding of one pixel before and two behind: the last row.
    assert torch.equal(blank_patches(square(4, 8, side=8), 4).view(4, 4), blank.T)
    assert blank_patches(square(8, 5, side=8), 4).view(4, 4).all(dim=1).tolist() == [False, False, False, True]
    # A square image has no padding, nor has one of which the middle is cut out, and crops are unpadded elsewhere.
    assert blank_patches(square(8, 8), 4) is None
    assert blank_patches(TilePlan((8, 4), 8, None, (4, 4), (8, 4), (-2, 0)), 4) is None
    assert blank_patches(TilePlan((8, 4), 8, (2, 1), (16, 8), (16, 8), (0, 0)), 4) is None


def test_coverage_by_hand(all_rows):
    # Two things, three patches. Gains at first: 0.9, 0.6, 0.8. After patch 0, m = (0.5, 0.4): patch 1 adds 0.1, patch 2
    # adds 0.3. After patch 2, m = (0.5, 0.7): patch 1 still adds 0.1.
    worth = torch.tensor([[[0.5, 0.6, 0.1], [0.4, 0.0, 0.7]]])
    coverage = Coverage(worth, symmetric=False)
    torch.testing.assert_close(coverage.gain, torch.tensor([[0.9, 0.6, 0.8]]).double())
    coverage.add(torch.tensor([0]))
    torch.testing.assert_close(coverage.gain, torch.tensor([[0.0, 0.1, 0.3]]).double())
    real, blank = torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 3, dtype=torch.bool)
    assert cover_greedily(worth, real, blank, 3).tolist() == [[0, 2, 1]]
    # Patch 0 shows only padding: it comes last, but it comes. Patch 2 adds 0.8, then patch 1 adds 0.5.
    blank[0, 0] = True
    assert cover_greedily(worth, real, blank, 3).tolist() == [[2, 1, 0]]
    # Patches that are not real are no candidates.
    real[0, 2] = False
    assert cover_greedily(worth, real, blank, 2).tolist() == [[1, 0]]


def naive_mmtok(features, hidden, text, budget, blank):
    """Patches of one tile, every gain recomputed."""

    def unit(vectors):
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def softmax(values):
        values = np.exp(values - values.max(axis=1, keepdims=True))
        return values / values.sum(axis=1, keepdims=True)

    features, hidden = unit(features), unit(hidden)
    rows = [0.5 * softmax(hidden @ hidden.T / 0.2) / len(hidden)]
    if len(text):
        rows.insert(0, softmax(unit(text) @ features.T / 0.02) / len(text))
    worth = np.concatenate(rows)
    covered, picks = np.zeros(len(worth)), []
    while len(picks) < budget:
        gain = np.maximum(worth - covered[:, None], 0).sum(axis=0)
        rest = [v for v in range(len(hidden)) if v not in picks]
        picks.append(max(rest, key=lambda v: (not blank[v], gain[v])))
        covered = np.maximum(covered, worth[:, picks[-1]])
    return picks


@pytest.mark.parametrize("words", [0, 1, 6])
@pytest.mark.parametrize("grid", [None, (1, 2), (2, 2)], ids=str)
def test_mmtok_equals_the_naive_rule(grid, words, all_rows):
    """Also for images together, whose tiles, quotas and numbers of words differ."""
    images = [make_image(grid, seed=seed, cut=cut, side=9) for seed, cut in ((0, 0), (1, 2))]
    texts = [make_text(words), make_text(3)]
    blanked(images[1], torch.rand(len(images[1].patches), generator=torch.Generator().manual_seed(2)) < 0.3)
    for budget in (3, 29, 70):
        batch = select_all("mmtok", images, texts, budget)
        for image, text, kept in zip(images, texts, batch, strict=True):
            patches = image.patches.tolist()
            tiles = [[i for i in patches if image.tile[i] == tile] for tile in range(int(image.tile.max()) + 1)]
            expected = []
            for tile, quota in zip(tiles, split_evenly(budget, [len(tile) for tile in tiles]), strict=True):
                hidden = torch.stack(
                    [image.tower.hidden[image.tile[i], 1 + image.row[i] * 9 + image.column[i]] for i in tile]
                )
                blank = image.on_host.blank[[patches.index(i) for i in tile]].tolist()
                inputs = (part.double().numpy() for part in (image.features[tile], hidden, text))
                expected += [tile[v] for v in naive_mmtok(*inputs, quota, blank)]
            assert kept.indices.tolist() == sorted(expected)


def test_more_tokens_than_patches_of_the_image():
    """The authors' code repeats patch 0 here: 37 of 64 tokens are distinct where 36 patches are free."""
    barred = torch.arange(576) >= 36
    kept = select("mmtok", blanked(recorded_tile(1), barred), recorded("1_text"), 64).indices
    assert len(kept.unique()) == 64 and set(range(36)) <= set(kept.tolist())


# --- in a model ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    save_llava_hf(build_reference("llava"), folder)
    return load_pretrained_model(folder, config=AdaVConfig(method="mmtok", overall_tokens=5), device_map="cpu")[:3]


def seen(loaded, prompts, monkeypatch, size=(40, 30)):
    """What the method is given: (images, texts)."""
    tokenizer, model, processor = loaded
    given = []
    keep_all = SELECTORS["mmtok"].keep_all

    def spy(self, images, texts, budgets):
        given.extend(zip(images, texts, strict=True))
        return keep_all(self, images, texts, budgets)

    monkeypatch.setattr(SELECTORS["mmtok"], "keep_all", spy)
    pixels = [process_images([make_picture(*size)], processor, model.config)[0]] * len(prompts)
    for prompt, image in zip(prompts, pixels, strict=True):
        ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
        model.prepare(ids[None], [image], [size])
    return given


def test_the_words_of_the_turn_are_read(loaded, monkeypatch):
    tokenizer, model, _ = loaded
    prompts = [
        "USER: <image>\nWhat colour is the shape? ASSISTANT:",
        "USER: <image>\nWhat is the? ASSISTANT:",
        "USER: <image> ASSISTANT:",
    ]
    words = [["colour", "shape"], ["What", "is", "the", "?"], []]
    for (_, text), expected in zip(seen(loaded, prompts, monkeypatch), words, strict=True):
        ids = [number for word in expected for number in tokenizer(word, add_special_tokens=False).input_ids]
        assert tokenizer.unk_token_id not in ids
        assert torch.equal(text, model.get_input_embeddings()(torch.tensor(ids, dtype=torch.long)))


def test_without_a_tokenizer_all_tokens_are_read(loaded, monkeypatch):
    tokenizer, model, _ = loaded
    monkeypatch.setattr(model, "word_ids", None)
    ((_, text),) = seen(loaded, ["USER: <image>\nWhat is it? ASSISTANT:"], monkeypatch)
    ids = tokenizer("\nWhat is it? ASSISTANT:", add_special_tokens=False).input_ids
    assert torch.equal(text, model.get_input_embeddings()(torch.tensor(ids)))


def test_padding_of_a_square_is_known(loaded, monkeypatch):
    _, model, _ = loaded
    monkeypatch.setattr(model.config, "image_aspect_ratio", "pad")
    ((image, _),) = seen(loaded, ["USER: <image>\nWhat is it? ASSISTANT:"], monkeypatch, size=(60, 20))
    expected = blank_patches(tile_plan((60, 20), model.config), model.get_vision_tower().num_patches_per_side)
    assert expected.any() and torch.equal(image.on_host.blank, expected)
