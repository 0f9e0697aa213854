"""Parts of the vLLM plugin that need no vLLM: settings, the record of an image, the prompt's images, the tower store."""

import json

import pytest
import torch
from image_tokens import make_image as make_tokens
from image_tokens import make_text
from tiny_checkpoints import QUESTIONS, build_reference, make_image, save_llava_hf

from llava.common.errors import UserError
from llava.config import AdaVConfig, ConfigError
from llava.conversation import single_turn
from llava.integrations.vllm.image_request import ImageRequest
from llava.integrations.vllm.prompt_images import TiledImages
from llava.integrations.vllm.settings import STORE_BYTES, of_request, server_keys, store_bytes
from llava.integrations.vllm.tower_store import TileStates, TowerStore
from llava.methods.before_llm import SELECTORS, select
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model

METHODS = sorted(set(SELECTORS) - {"no_image"})  # which is refused


# ------------------------------------------------------------------------------------------------------------ settings
def test_keys_of_a_request_replace_those_of_the_server_one_by_one():
    server = server_keys({"method": "random", "overall_tokens": 58, "options": {"seed": 3}})
    assert of_request({}, server) == AdaVConfig(method="random", overall_tokens=58, options={"seed": 3})
    assert of_request({"overall_tokens": 7}, server).options == {"seed": 3}
    assert of_request({"method": "cls", "options": {}}, server) == AdaVConfig(method="cls", overall_tokens=58)
    assert of_request({"overall_tokens": 7}, {}) == AdaVConfig(overall_tokens=7)


def test_a_server_may_name_a_file(tmp_path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"method": "fastervlm", "overall_tokens": 9}))
    assert of_request({}, server_keys(str(path))) == AdaVConfig(method="fastervlm", overall_tokens=9)
    with pytest.raises(ConfigError, match="nowhere.json"):
        server_keys("nowhere.json")


@pytest.mark.parametrize(
    "given, words",
    [
        ("adav_configs.json", "allowed in a request is an object of keys"),
        (None, "allowed in a request is an object of keys"),
        ([], "allowed in a request is an object of keys"),
        ({"tokens": 9}, 'unknown key "tokens"'),
        ({"overall_tokens": 0}, "at least 1"),
        ({"overall_tokens": "9"}, "at least 1"),
        ({"overall_tokens": True}, "at least 1"),
        ({"method": "best"}, "allowed is one of"),
        ({"method": "no_image"}, "needs one per image"),
        ({"method": "fastervlm", "options": {"crops": 2, "crop_share": 0.5}}, "allowed is one of them"),
        ({"method": "fastv"}, "drops tokens inside the LLM"),
        ({"vision_adaptive_attention": True}, "the KV cache of all layers"),
        ({"text_pruning_flag": True}, "the KV cache of all layers"),
        ({"prefill_filter_flag": True}, '"prefill_filter_flag" drops tokens inside the LLM'),
        ({"method": "apet", "options": {"second_stage": True}}, '"options.second_stage" drops tokens inside the LLM'),
        ({"all_use_h2o": True}, "the KV cache of all layers"),
        ({"h2o_heavy_share": 0.2, "h2o_recent_share": 0.2}, "evicts nothing"),
        ({"options": {"positions": "original"}}, "one by one"),
        ({"options": {"text_tower": "/etc"}}, "command line alone"),
        ({"options": {"table": "table.json"}}, "command line alone"),
        ({"options": 3}, "an object of method options"),
        ({"method": "cls", "options": {"seed": 3}}, "does not use it"),
        ({"method": "visionzip", "options": {"dominant": 3}}, "go together"),
    ],
)
def test_what_a_request_may_not_have_is_said_in_one_sentence(given, words):
    with pytest.raises(UserError, match=words) as error:
        of_request(given, {})
    assert "\n" not in str(error.value)


def test_a_server_is_checked_as_a_request_is():
    for given in (3, {"method": "fastv"}, {"tokens": 3}, {"options": {"positions": "original"}}):
        with pytest.raises(UserError):
            server_keys(given)
    assert server_keys(None) == {}
    # A file may hold options of several methods, and the path of a text tower.
    keys = {"method": "cls", "options": {"seed": 3, "text_tower": "clip"}}
    assert of_request({}, server_keys(keys)).method == "cls"


def test_the_size_of_the_store_is_a_setting_of_the_server():
    assert store_bytes({}) == store_bytes({"other": 3}) == store_bytes(object()) == STORE_BYTES
    assert store_bytes({"adav": {"tower_bytes": 0}}) == 0
    for wrong in (3, {"bytes": 3}, {"tower_bytes": -1}, {"tower_bytes": "1"}, {"tower_bytes": True}):
        with pytest.raises(UserError, match="allowed is"):
            store_bytes({"adav": wrong})


# ---------------------------------------------------------------------------------------------------- what methods read
@pytest.mark.parametrize("method", SELECTORS)
def test_what_a_method_says_it_does_not_read_changes_nothing(method):
    def kept(seed=1, key=0):
        return select(method, make_tokens(key=key), make_text(seed=seed), 30)

    selector = SELECTORS[method]
    first, other_text, other_key = kept(), kept(seed=2), kept(key=1)
    assert torch.equal(first.features, other_text.features) == (not selector.reads_text)
    assert torch.equal(first.features, other_key.features) == (not selector.reads_key)


# --------------------------------------------------------------------------------------------------------- image request
def test_a_request_survives_the_way_to_the_model():
    request = ImageRequest("1f", (3000, 70), "adav", 9, {"min_share": 0.1}, "official", (3, 4, 70_000), "words", 2**55)
    again = ImageRequest.from_tensor(request.to_tensor())
    assert again == request and again.to_bytes() == request.to_bytes()
    assert ImageRequest.from_tensor(ImageRequest("1f", (1, 1), "cls", 9, {}, "official").to_tensor()).question is None


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    reference = build_reference(request.param)
    save_llava_hf(reference, folder)
    tokenizer, model, processor, _ = load_pretrained_model(folder, device_map="cpu")
    images = TiledImages(reference.config, processor.to_dict(), tokenizer, "tiny")
    return images, tokenizer, model, processor


def ids_of(tokenizer, model, text):
    prompt = single_turn("mistral_instruct" if "mistral" in model.config.model_type else "vicuna_v1", text)
    ids = tokenizer_image_token(prompt, tokenizer)
    return [tokenizer.convert_tokens_to_ids("<image>") if i < 0 else i for i in ids]


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"downsample"}))
@pytest.mark.parametrize("anyres", ["official", "fastervlm"])
def test_tokens_are_counted_as_the_model_keeps_them(checkpoint, method, anyres):
    images, tokenizer, model, processor = checkpoint
    ids = torch.tensor([1, 9, -200, 10, 11])
    for size in ((1, 1), (57, 57), (300, 7), (31, 90), (120, 110)):
        pixels = process_images([make_image(*size)], processor, model.config, anyres)
        settings = AdaVConfig(method=method, options={"anyres": anyres})
        encoded = model.encode(pixels, [size], settings)  # for all budgets
        for tokens in (1, 7, 16, 10_000):
            settings = settings.replaced(overall_tokens=tokens)
            (kept,) = model.prepare(ids, config=settings, encoded=encoded).selections[0]
            assert images.tokens(size, settings) == len(kept.indices)


def test_a_smaller_picture_is_made_and_counted_as_the_model_does_it(checkpoint):
    images, _, model, processor = checkpoint
    newline = model.config.mm_patch_merge_type == "spatial_unpad"
    for size in ((1, 1), (57, 57), (300, 7), (31, 90), (120, 110)):
        picture = make_image(*size)
        for tokens in (1 + newline, 6, 9, 16, 17, 10_000):
            settings = AdaVConfig(method="downsample", overall_tokens=tokens)
            tiles, plans = model._plans(process_images([picture], processor, model.config), [size], "official")
            (expected,), _ = model._made_smaller(tiles, plans, tokens)
            (request,) = images.requests([1, images.image_id, 9], [size], [str(size)], settings)
            assert torch.equal(images.pixels(picture, request, torch.float32), expected)
            (kept,) = model.prepare(torch.tensor([1, -200, 9]), tiles, [size], config=settings).selections[0]
            assert images.tokens(size, settings) == len(kept.indices)
    if newline:
        with pytest.raises(UserError, match="one patch and the newline token"):
            images.tokens((57, 57), AdaVConfig(method="downsample", overall_tokens=1))


def test_tokens_of_published_settings_are_counted(checkpoint):
    images, tokenizer, model, processor = checkpoint
    size = (100, 110)
    for method, options in (
        ("adav", {"compat": "public"}),
        ("visionzip", {"dominant": 2, "contextual": 1}),
        ("visionzip", {"dominant": 20, "contextual": 5}),
        *((method, {"compat": "public"}) for method in ("apet", "hiprune", "holov", "prunesid")),
    ):
        settings = AdaVConfig(method=method, overall_tokens=23, options=options)
        pixels = process_images([make_image(*size)], processor, model.config, settings.option("anyres"))
        (kept,) = model.prepare(torch.tensor([1, -200, 9]), pixels, [size], config=settings).selections[0]
        assert images.tokens(size, settings) == len(kept.indices), options


def test_options_that_do_not_fit_an_image_are_refused_before_the_model_gets_it(checkpoint):
    images = checkpoint[0]
    for method, option, value, words in (
        ("adav", "compat", "public", "down to nothing"),
        ("apet", "start", 1_000, "'start' is 1000, but a tile has"),
    ):
        with pytest.raises(UserError, match=words):
            images.tokens((100, 110), AdaVConfig(method=method, overall_tokens=1, options={option: value}))


def test_identity_has_the_question_exactly_for_methods_that_read_it(checkpoint):
    images, tokenizer, model, _ = checkpoint
    first, second = (ids_of(tokenizer, model, "<image>\n" + question) for question in QUESTIONS[:2])
    for method in METHODS:
        settings = AdaVConfig(method=method, overall_tokens=5)
        a, b, again, other = (
            images.requests(ids, [(60, 60)], [image], settings)[0].to_bytes()
            for ids, image in ((first, "x"), (second, "x"), (first, "x"), (first, "y"))
        )
        selector = SELECTORS[method]
        assert a == again and a != other
        assert (a == b) == (not selector.reads_text and not selector.reads_key), method


def test_a_method_that_reads_words_has_the_ids_of_those_words(checkpoint):
    images, tokenizer, model, _ = checkpoint

    def question(text, method="mmtok", **options):
        settings = AdaVConfig(method=method, overall_tokens=5, options=options)
        return images.requests(ids_of(tokenizer, model, text), [(60, 60)], ["x"], settings)[0].question

    words = [number for word in ("colour", "shape") for number in tokenizer(word, add_special_tokens=False).input_ids]
    # Words before the image count as well as those behind it, and the others are no part of the identity.
    for text in (
        "<image>\nWhat colour is the shape?",
        "colour of <image> the shape",
        "<image>\nWhich colour has a shape",
    ):
        assert question(text) == tuple(words) == question(text, text_scope="turn")
    assert question("<image>\nWhat colour is the shape?", "adav") != tuple(words)
    assert question("<image>") == ()


def test_each_image_has_its_own_question(checkpoint):
    images, tokenizer, model, _ = checkpoint
    ids = ids_of(tokenizer, model, "<image>\nYes?<image>\nNo?")
    settings = AdaVConfig(overall_tokens=5)
    first, second = images.requests(ids, [(60, 60), (9, 9)], ["x", "y"], settings)
    assert len(first.question) > len(second.question) > 0 and first.question[-len(second.question) :] == second.question
    with pytest.raises(UserError, match="2 image placeholders, but 1 images"):
        images.requests(ids, [(60, 60)], ["x"], settings)


def test_pixels_are_those_of_load_pretrained_model(checkpoint):
    images, _, model, processor = checkpoint
    for size in ((1, 1), (300, 7), (57, 57)):
        picture = make_image(*size)
        (expected,) = process_images([picture], processor, model.config)
        request = ImageRequest(str(size), size, "cls", 5, {}, "official")
        for _ in range(2):  # the second time from memory
            pixels = images.pixels(picture, request, torch.float32)
            assert torch.equal(pixels.flatten(), expected.flatten())
            picture = None


# ----------------------------------------------------------------------------------------------------------- tower store
TILE = 4 * (5 * 3 + 4 + 5 * 2 + 4 * 2)  # bytes


def states_of(tiles, value, received=True):
    shapes = ((5, 3), (4,), (5, 2), (4, 2))[: 4 if received else 3]
    return TileStates(*(torch.full((tiles, *shape), float(value)) for shape in shapes))


def test_the_store_drops_the_image_that_was_not_used_for_longest():
    store = TowerStore(4, 3, 2, 5 * TILE + TILE - 1, torch.float32, torch.device("cpu"))
    assert store.nbytes == 5 * TILE
    store.put({"a": states_of(2, 1)})
    store.put({"b": states_of(2, 2)})
    assert set(store.get(["a", "z"])) == {"a"}  # "b" is now the older one
    store.put({"c": states_of(3, 3)})
    found = store.get(["a", "b", "c"])
    assert set(found) == {"a", "c"} and len(store) == 2 and store.nbytes == 5 * TILE
    for key, value, tiles in (("a", 1, 2), ("c", 3, 3)):
        for name, expected in vars(states_of(tiles, value)).items():
            assert torch.equal(getattr(found[key], name), expected)
    store.put({"d": states_of(6, 4)})  # larger than the store
    assert not store.get(["d"]) and len(store) == 2
    store.put({"c": states_of(1, 5)})  # another number of tiles under the same key
    assert len(store.get(["c"])["c"]) == 1 and set(store.get(["a"])) == {"a"}


def test_states_that_were_read_do_not_change_when_their_place_is_used_again():
    store = TowerStore(4, 3, 2, TILE, torch.float32, torch.device("cpu"))
    store.put({"a": states_of(1, 1)})
    found = store.get(["a"])["a"]
    store.put({"b": states_of(1, 2)})
    assert torch.equal(found.hidden, states_of(1, 1).hidden) and not store.get(["a"])


def test_received_attention_is_there_exactly_where_it_was_given():
    store = TowerStore(4, 3, 2, 5 * TILE, torch.float32, torch.device("cpu"))
    store.put({"a": states_of(2, 1, received=False)})
    store.put({"b": states_of(1, 2)})
    found = store.get(["a", "b"])
    assert found["a"].received is None and torch.equal(found["b"].received, states_of(1, 2).received)
    assert [part.received for part in found["a"].split([1, 1])] == [None, None]
    store.put({"a": states_of(2, 3)})  # the tower ran once more, with it
    assert torch.equal(store.get(["a"])["a"].received, states_of(2, 3).received)
    assert len(store) == 2 and sorted(len(one) for one in store.get(["a", "b"]).values()) == [1, 2]


def test_a_store_without_memory_stores_nothing():
    store = TowerStore(4, 3, 2, 0, torch.float32, torch.device("cpu"))
    store.put({"a": states_of(1, 1)})
    assert store.nbytes == 0 and not store.get(["a"])
