"""From images and prompts to the sequence that the LLM reads: splicing, scopes, positions, batches."""

import dataclasses

import pytest
import torch
from tiny_checkpoints import build_reference, make_image, save_llava_hf

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import single_turn
from llava.methods.before_llm import SELECTORS, select
from llava.mm_utils import left_pad, process_images, tile_plan, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.decoding.cache_argument import CACHE
from llava.model.decoding.prepared import StageClock
from llava.model.image_tokens import layout_of

IMAGE = IMAGE_TOKEN_INDEX
SIZES = [(40, 30), (100, 50), (31, 90), (57, 57)]
BUDGETED = sorted(name for name in SELECTORS if SELECTORS[name].uses_budget)


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def loaded(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    save_llava_hf(build_reference(request.param), folder)
    tokenizer, model, processor, _ = load_pretrained_model(folder, device_map="cpu")
    return tokenizer, model, processor


def pixels(model, processor, sizes, anyres=None):
    images = [make_image(w, h, seed=i) for i, (w, h) in enumerate(sizes)]
    return list(process_images(images, processor, model.config, anyres)), sizes


def rows(*prompts):
    ids, mask = left_pad([torch.tensor(p) for p in prompts], 3)
    return {"input_ids": ids, "attention_mask": mask}


def config(method="adav", tokens=5, **options):
    return AdaVConfig(method=method, overall_tokens=tokens, options=options)


def patches(model, size, anyres=None):
    plan = tile_plan(size, model.config, anyres)
    images, _ = [torch.zeros(plan.tiles, 3, plan.tile_size, plan.tile_size)], None
    prepared = model.prepare(torch.tensor([[1, IMAGE, 5]]), images, [size], config=AdaVConfig(method="none"))
    return int((prepared.selections[0][0].tile >= 0).sum())


@pytest.mark.parametrize("method", BUDGETED)
def test_requested_is_kept_through_the_model(loaded, method):
    _, model, processor = loaded
    total = patches(model, SIZES[1])
    for tokens in (1, 3, total - 1, total, total + 5):
        images, sizes = pixels(model, processor, SIZES[1:2])
        prepared = model.prepare(torch.tensor([[1, 9, IMAGE, 10, 11]]), images, sizes, config=config(method, tokens))
        kept = prepared.selections[0][0]
        if tokens >= total:  # everything, newline tokens included: the plain model
            plain = model.prepare(torch.tensor([[1, 9, IMAGE, 10, 11]]), images, sizes, config=config("none"))
            assert torch.equal(prepared.inputs_embeds, plain.inputs_embeds)
        else:
            made = kept.indices < 0
            assert len(kept.indices) == tokens and (kept.tile[~made] >= 0).all()
            assert SELECTORS[method].makes_tokens or not made.any()
            assert prepared.lengths == [4 + tokens] and prepared.image_spans == [[(2, tokens)]]


@pytest.mark.parametrize("method", BUDGETED + ["none", "downsample"])
def test_training_after_an_answer(loaded, method):
    """What is kept of a tile plan was made for an answer, in inference mode, and gradients go through it."""
    _, model, processor = loaded
    images, sizes = pixels(model, processor, SIZES[:1])
    ids = torch.tensor([[1, 9, IMAGE, 10, 11]])
    layout_of.cache_clear()
    with torch.inference_mode():
        model.prepare(ids, images, sizes, config=config(method))
    prepared = model.prepare(ids, images, sizes, config=config(method))
    (gradient,) = torch.autograd.grad(prepared.inputs_embeds.sum(), model.model.mm_projector[2].weight)
    assert gradient.any()


@pytest.mark.parametrize("method", BUDGETED + ["none", "no_image", "downsample"])
@pytest.mark.parametrize("positions", ["reindexed", "original"])
def test_batch_of_four_is_four_batches_of_one(loaded, method, positions):
    _, model, processor = loaded
    prompts = [[1, 9, 8, IMAGE, 10, 11, 12], [1, IMAGE, 13], [1, 7, 9, 8, 7, IMAGE, 20, 21], [1, 5, IMAGE, 6, 7, 8, 9]]
    images, sizes = pixels(model, processor, SIZES)
    setting = config(method, 6, positions=positions)
    if positions == "original" and SELECTORS[method].makes_tokens:
        with pytest.raises(UserError, match=f'"original", but method "{method}" makes tokens'):
            model.prepare(**rows(*prompts), images=images, image_sizes=sizes, config=setting)
        return
    new = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 3}
    together = model.generate(**rows(*prompts), images=images, image_sizes=sizes, config=setting, **new)
    batch = model.last_selection
    for i, prompt in enumerate(prompts):
        alone = model.generate(
            torch.tensor([prompt]), images=images[i : i + 1], image_sizes=sizes[i : i + 1], config=setting, **new
        )
        assert torch.equal(alone[0], together[i])
        kept = model.last_selection[0]
        assert torch.equal(kept.indices, batch[i].indices) and kept.sources == batch[i].sources
        torch.testing.assert_close(kept.features, batch[i].features)


@pytest.mark.parametrize(
    "method, positions",
    [
        (method, positions)
        for method in (*BUDGETED, "none", "no_image", "downsample")
        for positions in ("reindexed", "original")
        if positions == "reindexed" or not SELECTORS[method].makes_tokens
    ],
)
def test_cached_decoding_is_a_recomputation_on_the_kept_tokens(loaded, method, positions):
    """A padded batch decoded with its cache, against each row by itself in one pass without cache and padding."""
    _, model, processor = loaded
    prompts = [[1, 9, 8, IMAGE, 10, 11, 12], [1, IMAGE, 13], [1, 7, 9, 8, 7, IMAGE, 20, 21], [1, 5, 6, 7]]
    images, sizes = pixels(model, processor, SIZES[:3])
    setting = config(method, 6, positions=positions)
    prepared = model.prepare(**rows(*prompts), images=images, image_sizes=sizes, config=setting)
    steps = 6
    new = {"max_new_tokens": steps, "do_sample": False, "eos_token_id": None, "pad_token_id": 3}
    out = model.generate(prepared=prepared, output_logits=True, return_dict_in_generate=True, **new)
    for b, length in enumerate(prepared.lengths):
        words = model.get_input_embeddings()(out.sequences[b, :-1])
        embeds = torch.cat([prepared.inputs_embeds[b, -length:], words])[None]
        end = prepared.unpruned_lengths[b] if positions == "original" else length
        places = torch.cat([prepared.position_ids[b, -length:], end + torch.arange(steps - 1)])[None]
        with torch.no_grad():
            # Without a mask or a cache, transformers would take the holes for seams between packed sequences.
            ones = torch.ones_like(places)
            plain = model(inputs_embeds=embeds, position_ids=places, attention_mask=ones, use_cache=False)
        want = plain.logits[0, length - 1 :]
        torch.testing.assert_close(torch.stack(out.logits, dim=1)[b], want, atol=1e-4, rtol=0)
        assert want.argmax(-1).tolist() == out.sequences[b].tolist()


def test_tower_states_lie_where_the_tokens_lie(loaded):
    _, model, processor = loaded
    images, sizes = pixels(model, processor, SIZES)
    tiles = [image if image.dim() == 4 else image[None] for image in images]
    encoded = model.encode_images(tiles, StageClock(torch.device("cpu")), ("hidden", "keys"))
    side = model.get_vision_tower().num_patches_per_side
    for i, (features, saliency, tower) in enumerate(encoded):
        tokens = model.image_tokens(features, saliency, tile_plan(sizes[i], model.config), 0, tower)
        assert tower.hidden.shape[:2] == tower.keys.shape[:2] == (len(tiles[i]), 1 + side**2)
        projected = tower.project(tokens.of_patches(tower.hidden[:, 1:]))
        torch.testing.assert_close(projected, tokens.features[tokens.patches])
        zipped = select("visionzip", tokens, projected[:0], 5)
        assert zipped.indices[0] == -1 and zipped.sources[0] == []
        torch.testing.assert_close(zipped.features[0], tower.project(tower.hidden[0, 0]))
    plain = model.encode_images(tiles, StageClock(torch.device("cpu")))
    assert all(tower.hidden is None and tower.keys is None for _, _, tower in plain)


def test_images_are_consumed_in_reading_order_and_text_rows_take_none(loaded):
    _, model, processor = loaded
    images, sizes = pixels(model, processor, SIZES[:3])
    inputs = rows([1, IMAGE, 9, IMAGE, 10], [1, 11, 12], [1, IMAGE, 13])
    together = model.prepare(**inputs, images=images, image_sizes=sizes, config=config("cls", 4))
    assert [len(row) for row in together.selections] == [2, 0, 1]
    assert together.lengths == [11, 3, 6] and together.image_spans[0] == [(1, 4), (6, 4)]
    for image, kept in zip(images, [*together.selections[0], *together.selections[2]], strict=True):
        size = [sizes[[i is image for i in images].index(True)]]
        alone = model.prepare(torch.tensor([[1, IMAGE, 9]]), [image], size, config=config("cls", 4))
        assert torch.equal(alone.selections[0][0].indices, kept.indices)
        torch.testing.assert_close(alone.selections[0][0].features, kept.features)


def test_a_count_that_does_not_match_is_an_error(loaded):
    _, model, processor = loaded
    images, sizes = pixels(model, processor, SIZES[:2])
    with pytest.raises(UserError, match="1 image placeholders, but 2 images"):
        model.prepare(torch.tensor([[1, IMAGE, 9]]), images, sizes)
    with pytest.raises(UserError, match="1 image placeholders, but 0 images"):
        model.prepare(torch.tensor([[1, IMAGE, 9]]))
    with pytest.raises(UserError, match="image_sizes"):
        model.prepare(torch.tensor([[1, IMAGE, 9, IMAGE]]), images, sizes[:1])
    with pytest.raises(UserError, match="attention_mask"):
        model.prepare(torch.tensor([[1, IMAGE, 9]]), images[:1], sizes[:1], torch.ones(1, 8))
    with pytest.raises(UserError, match="shape"):
        model.prepare(torch.tensor([[1, IMAGE, 9]]), [images[0][..., :-1]], sizes[:1])


def embeddings_seen(model, prompt, images, sizes, scope, monkeypatch):
    """The text that the selector is given for each image, as rows of the embedding table."""
    seen = []

    @dataclasses.dataclass
    class Spy(SELECTORS["adav"]):
        def keep_all(self, images, texts, budgets):
            seen.extend(texts)
            return super().keep_all(images, texts, budgets)

    monkeypatch.setitem(SELECTORS, "adav", Spy)
    model.prepare(torch.tensor([prompt]), images, sizes, config=config("adav", 3, text_scope=scope))
    table = model.get_input_embeddings().weight
    return [[int((table == row).all(dim=1).nonzero()[0]) for row in text] for text in seen]


def test_what_generate_takes_as_llava_does(loaded):
    """LLaVA's name for the ids, position_ids=None, a list of ids, and one image that is in no batch."""
    _, model, processor = loaded
    images, sizes = pixels(model, processor, SIZES[3:])
    image = images[0] if images[0].dim() == 3 else images[0][0]
    ids = [1, 9, IMAGE, 10, 11]
    new = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 3}
    expected = model.generate(torch.tensor([ids]), images=[image], image_sizes=sizes, **new)
    for given in (torch.tensor([ids]), torch.tensor(ids), ids, [ids]):
        found = model.generate(inputs=given, images=image, image_sizes=sizes, position_ids=None, **new)
        assert torch.equal(found, expected)
    found = model.generate(ids, images=image[None], image_sizes=sizes, attention_mask=[1] * 5, **new)
    assert torch.equal(found, expected)
    assert model.slots(image, sizes) == model.slots([image], sizes)
    assert len(model.encode(image, sizes)) == 1


def test_the_cache_has_either_name_and_nobody_is_warned(loaded, capfd, recwarn):
    """transformers calls it past_key_values up to 5.23 and cache from 5.24 on, where the old name gives a warning."""
    _, model, processor = loaded
    logits = []
    for name in ("past_key_values", "cache"):
        with torch.no_grad():
            kept = getattr(model(input_ids=torch.tensor([[1, 9, 10]]), use_cache=True), CACHE)
            logits.append(model(input_ids=torch.tensor([[11]]), **{name: kept}).logits)
        assert kept.get_seq_length() == 4
    assert torch.equal(*logits)
    images, sizes = pixels(model, processor, SIZES[:1])
    for settings in ({"method": "none"}, {"method": "fastv"}, {"method": "adav", "vision_adaptive_attention": True}):
        request = AdaVConfig(overall_tokens=5, **settings)
        model.generate([1, 9, IMAGE, 10], images, sizes, config=request, max_new_tokens=3, do_sample=False)
    assert "deprecated" not in capfd.readouterr().err + "".join(str(warning.message) for warning in recwarn)


@pytest.mark.parametrize(
    "given, words",
    [
        ({"images": make_image(40, 30)}, "images is of type Image, allowed is a tensor"),
        ({"images": [make_image(40, 30)]}, "image 0 is of type Image, allowed is a tensor"),
        ({"images": ["a.jpg"]}, "image 0 is of type str, allowed is a tensor"),
        ({"input_ids": [[1, IMAGE], [1]]}, "input_ids is of type list, allowed are whole numbers"),
        ({"input_ids": "USER: <image>"}, "input_ids is of type str"),
        ({"input_ids": torch.tensor([1.0, 2.0])}, r"input_ids is float32 of shape \[2\]"),
        ({"input_ids": []}, r"input_ids is float32 of shape \[0\]"),
        ({"input_ids": None}, "no prompt"),
        ({"inputs": torch.tensor([[1, IMAGE]])}, "input_ids and inputs, allowed is one"),
        ({"position_ids": torch.tensor([[0, 1]])}, "position_ids"),
        ({"inputs_embeds": torch.zeros(1, 2, 48)}, "inputs_embeds"),
    ],
)
def test_what_generate_does_not_take_is_one_sentence(loaded, given, words):
    _, model, processor = loaded
    images, sizes = pixels(model, processor, SIZES[:1])
    with pytest.raises(UserError, match=words):
        model.generate(**({"input_ids": torch.tensor([[1, IMAGE]]), "images": images, "image_sizes": sizes} | given))


def test_text_scope_after_is_every_text_token_after_the_image(loaded, monkeypatch):
    _, model, processor = loaded
    images, sizes = pixels(model, processor, SIZES[:2])
    seen = embeddings_seen(model, [1, 5, IMAGE, 6, IMAGE, 7, 8], images, sizes, "after", monkeypatch)
    assert seen == [[6, 7, 8], [7, 8]]


def test_text_scope_turn_is_the_turn_that_holds_the_image(loaded, monkeypatch):
    tokenizer, model, processor = loaded
    images, sizes = pixels(model, processor, SIZES[:1])
    prompt = single_turn("vicuna_v1", "<image>\nwhat color is the circle ?") + " red</s>USER: how many ? ASSISTANT:"
    ids = tokenizer_image_token(prompt, tokenizer)
    after = embeddings_seen(model, ids, images, sizes, "after", monkeypatch)[0]
    turn = embeddings_seen(model, ids, images, sizes, "turn", monkeypatch)[0]
    assert after == ids[ids.index(IMAGE) + 1 :]
    cue = tokenizer("ASSISTANT:", add_special_tokens=False).input_ids
    end = next(i for i in range(len(after)) if after[i : i + len(cue)] == cue)
    assert turn == after[:end] and len(turn) > 0


def test_no_text_after_the_image_leaves_saliency(loaded):
    _, model, processor = loaded
    images, sizes = pixels(model, processor, SIZES[:1])
    ids = torch.tensor([[1, 5, IMAGE]])
    adav = model.prepare(ids, images, sizes, config=config("adav", 4)).selections[0][0]
    cls = model.prepare(ids, images, sizes, config=config("cls", 4)).selections[0][0]
    assert torch.equal(adav.indices, cls.indices)


def test_original_positions_keep_the_holes_and_decoding_goes_on_behind_them(loaded):
    _, model, processor = loaded
    images, sizes = pixels(model, processor, SIZES[:1])
    for ids in ([1, 5, IMAGE, 6, 7], [1, 5, IMAGE]):
        ids = torch.tensor([ids])
        setting = config("cls", 4, positions="original")
        prepared = model.prepare(ids, images, sizes, config=setting)
        kept = prepared.selections[0][0]
        assert prepared.position_ids[0, :2].tolist() == [0, 1]
        assert prepared.position_ids[0, 2:6].tolist() == (kept.indices + 2).tolist()
        assert prepared.unpruned_lengths == [ids.shape[1] - 1 + kept.total]
        # Reference: the same embeddings and positions, every step recomputed without a cache.
        embeds, places = prepared.inputs_embeds, prepared.position_ids
        want = []
        with torch.no_grad():
            for step in range(6):
                # Without a mask or a cache, transformers would take the holes for seams between packed sequences.
                ones = torch.ones_like(places)
                out = model(inputs_embeds=embeds, position_ids=places, attention_mask=ones, use_cache=False)
                logits = out.logits[:, -1]
                want.append(int(logits.argmax()))
                embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor([[want[-1]]]))], dim=1)
                places = torch.cat([places, torch.tensor([[prepared.unpruned_lengths[0] + step]])], dim=1)
        got = model.generate(prepared=prepared, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=3)
        assert got[0].tolist() == want


def test_no_image_never_runs_the_tower(loaded, monkeypatch):
    _, model, processor = loaded
    images, sizes = pixels(model, processor, SIZES[:1])

    def fail(*args, **kwargs):
        raise AssertionError("the tower ran")

    monkeypatch.setattr(model.get_vision_tower(), "forward", fail)
    prepared = model.prepare(torch.tensor([[1, 5, IMAGE, 6]]), images, sizes, config=config("no_image"))
    assert prepared.lengths == [3] and len(prepared.selections[0][0].indices) == 0


def test_random_depends_on_the_sample_and_the_seed_only(loaded):
    _, model, processor = loaded
    images, sizes = pixels(model, processor, SIZES[:1])

    def choice(ids, **options):
        prepared = model.prepare(torch.tensor([ids]), images, sizes, config=config("random", 7, **options))
        return prepared.selections[0][0].indices.tolist()

    assert choice([1, 5, IMAGE, 6]) == choice([1, 5, IMAGE, 6])
    others = [choice([1, 5, IMAGE, 7]), choice([1, 5, IMAGE, 6], seed=1), choice([1, 5, IMAGE, 6, 6])]
    assert any(other != choice([1, 5, IMAGE, 6]) for other in others)


def test_the_request_leaves_nothing_behind(loaded):
    _, model, processor = loaded
    images, sizes = pixels(model, processor, SIZES[:2])
    ids = torch.tensor([[1, 5, IMAGE, 6]])
    first = model.prepare(ids, images[:1], sizes[:1], config=config("adav", 5))
    model.prepare(ids, images[1:], sizes[1:], config=config("t2i", 3))
    again = model.prepare(ids, images[:1], sizes[:1], config=config("adav", 5))
    assert torch.equal(first.inputs_embeds, again.inputs_embeds)
    assert model.adav_config.method == "none"


def test_labels_follow_the_splice(loaded):
    _, model, processor = loaded
    images, sizes = pixels(model, processor, SIZES[:1])
    inputs = rows([1, IMAGE, 6, 7], [1, 8])
    labels = torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], IGNORE_INDEX)
    prepared = model.prepare(**inputs, images=images, image_sizes=sizes, labels=labels, config=config("cls", 3))
    assert prepared.labels.tolist() == [[1, *[IGNORE_INDEX] * 3, 6, 7], [*[IGNORE_INDEX] * 4, 1, 8]]
    loss = model(**inputs, images=images, image_sizes=sizes, labels=labels).loss
    assert torch.isfinite(loss)


def test_fastervlm_tile_path_has_neither_newline_nor_unpadding(loaded):
    _, model, processor = loaded
    if model.config.image_aspect_ratio != "anyres":
        pytest.skip("one tile: there is no grid to choose")
    size = (100, 50)
    images, sizes = pixels(model, processor, [size], "fastervlm")
    setting = config("none", 5, anyres="fastervlm")
    kept = model.prepare(torch.tensor([[1, IMAGE, 6]]), images, sizes, config=setting).selections[0][0]
    side = model.get_vision_tower().num_patches_per_side
    assert len(kept.indices) == images[0].shape[0] * side**2 and (kept.tile >= 0).all()
    public = config("adav", 12, compat="public")
    kept = model.prepare(torch.tensor([[1, IMAGE, 6, 7]]), images, sizes, config=public).selections[0][0]
    assert (kept.tile >= 0).all() and len(kept.indices) == 12


def test_unused_options_are_warned_about(tmp_path):
    save_llava_hf(build_reference("llava"), tmp_path)
    with pytest.warns(UserWarning, match='options.temperature is set, but method "cls"'):
        load_pretrained_model(tmp_path, config=config("cls", 5, temperature=0.1), device_map="cpu")
