"""Parts of the vLLM plugin for grids of tokens that need no vLLM: places as digits, whole prompts, requests, the store."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from tiny_checkpoints import QUESTIONS
from tiny_qwen import IMAGE, save_qwen
from transformers import AutoTokenizer

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.integrations.transformers.selectors import check_selector
from llava.integrations.vllm.grid_positions import PLACE, digits_of, places_of, whole_prompt
from llava.integrations.vllm.prompt_images import GridImages
from llava.integrations.vllm.row_store import RowStore
from llava.integrations.vllm.settings import check_engine, of_request
from llava.model.image_tokens import sample_key

SIZES = [(5, 3), (2, 4)]  # (width, height) in tokens


# ----------------------------------------------------------------------------------------------------------- positions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_digits_hold_every_row_and_column(dtype):
    places = torch.arange(1 << 14)
    digits = digits_of(places, places.flip(0), dtype)
    assert digits.shape == (1 << 14, PLACE) and digits.dtype == dtype
    assert torch.equal(places_of(digits), torch.stack([places, places.flip(0)]))


@dataclass(frozen=True)
class Place:
    offset: int
    length: int


@dataclass(frozen=True)
class Feature:
    """As vLLM's MultiModalFeatureSpec."""

    modality: str
    mm_position: Place
    data: dict


def image(offset, length, width, height, selected=True):
    grid = SimpleNamespace(data=torch.tensor([1, 2 * height, 2 * width]))
    data = {"image_grid_thw": grid} | ({"request": None} if selected else {})
    return Feature("image", Place(offset, length), data)


def test_a_whole_prompt_has_all_tokens_of_selected_images_alone():
    # Two of 6 tokens are kept, all 2 of a second image, a third one was not selected from, and a video of 3 tokens.
    tokens = [1, 90, 90, 2, 90, 90, 90, 90, 3, 91, 91, 91, 4]
    video = Feature("video", Place(9, 3), {})
    features = [video, image(1, 2, 3, 2), image(4, 2, 2, 1), image(6, 2, 1, 2, selected=False)]
    whole = whole_prompt(tokens, features, 2, "request")
    assert whole.tokens == [1, *[90] * 6, 2, *[90] * 4, 3, 91, 91, 91, 4]
    assert whole.columns == [0, 1, 1, 7, 8, 8, 10, 11, 12, 13, 14, 15, 16]
    assert [one.mm_position for one in whole.features] == [Place(1, 6), Place(8, 2), Place(10, 2), Place(13, 3)]
    assert whole_prompt(tokens, [], 2, "request").columns == list(range(len(tokens)))


# ------------------------------------------------------------------------------------------------------------ requests
@pytest.fixture(scope="module", params=["Qwen2_5_VL", "Qwen3VL"])
def images(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    config = save_qwen(folder, request.param).config
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return GridImages(config, tokenizer), config, tokenizer


def prompt(tokenizer, *questions):
    said = "".join(IMAGE + question for question in questions)
    return tokenizer(f"<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n").input_ids


def test_a_question_has_no_marks_of_images(images):
    images, config, tokenizer = images
    ids = prompt(tokenizer, *QUESTIONS[:2])
    first, second = images.requests(ids, SIZES, ["x", "y"], AdaVConfig(overall_tokens=5))
    said = [tokenizer(question, add_special_tokens=False).input_ids for question in QUESTIONS[:2]]
    tail = tokenizer("<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False).input_ids
    assert list(second.question) == said[1] + tail and list(first.question) == said[0] + said[1] + tail
    turn = AdaVConfig(overall_tokens=5, options={"text_scope": "turn"})
    assert list(images.requests(ids, SIZES, ["x", "y"], turn)[0].question)[-len(said[1]) :] == said[1]
    with pytest.raises(UserError, match="2 image placeholders, but 1 images"):
        images.requests(ids, SIZES[:1], ["x"], turn)


def test_random_draws_with_the_key_that_compress_has(images):
    images, config, tokenizer = images
    ids, whole = prompt(tokenizer, "Yes?", "No?"), []
    sizes = iter(SIZES)
    for token in ids:
        width, height = next(sizes) if token == config.image_token_id else (1, 1)
        whole += [token] * (width * height)
    requests = images.requests(ids, SIZES, ["x", "y"], AdaVConfig(method="random", overall_tokens=5))
    expected = [sample_key(torch.tensor(whole), size, nth) for nth, size in enumerate(SIZES)]
    assert [request.key for request in requests] == expected


def test_identity_has_what_the_method_reads(images):
    images, _, tokenizer = images

    def identity(question, **keys):
        ids = prompt(tokenizer, question)
        return images.requests(ids, SIZES[:1], ["x"], AdaVConfig(overall_tokens=5, **keys))[0].to_bytes()

    assert identity("Yes?", method="cls") == identity("No?", method="cls")
    assert identity("Yes?") == identity("Yes?") != identity("No?")
    assert identity("Yes?", method="cls") != identity("Yes?", method="cls", options={"saliency": "distance"})


def test_tokens_are_counted(images):
    images, *_ = images
    for tokens, kept in ((1, 1), (14, 14), (15, 15), (99, 15)):
        assert images.tokens(SIZES[0], AdaVConfig(overall_tokens=tokens)) == kept
    assert images.tokens(SIZES[0], AdaVConfig(method="none", overall_tokens=1)) == 15


@pytest.mark.parametrize(
    "given, words",
    [
        ({"method": "no_image"}, "needs one per image"),
        ({"method": "fastv"}, "drops tokens inside the LLM"),
        ({"method": "apet", "options": {"second_stage": True}}, '"options.second_stage" drops tokens inside the LLM'),
        ({"prefill_filter_flag": True}, '"prefill_filter_flag" drops tokens inside the LLM'),
        ({"text_pruning_flag": True}, "the KV cache of all layers"),
        ({"method": "hiprune"}, "of a CLIP tower"),
        ({"method": "visionzip"}, "of a CLIP tower"),
        ({"method": "mmtok"}, "of a CLIP tower"),
        ({"method": "downsample"}, "makes the image smaller"),
        ({"method": "adav_zoom"}, "encodes only some crops"),
        ({"method": "fastervlm", "options": {"crops": 2}}, "encodes only some crops"),
        ({"options": {"detail_share": 0.5}}, "rates the pixels of patches"),
        ({"options": {"positions": "reindexed"}}, "its default there"),
        ({"options": {"compat": "public"}}, "LLaVA's tiles"),
        ({"method": "adav", "overall_tokens": 0}, "at least 1"),
    ],
)
def test_what_a_request_may_not_have_is_said_in_one_sentence(given, words):
    def refuse(config):
        check_engine(config)
        check_selector(config, "Qwen-VL")

    with pytest.raises(UserError, match=words) as error:
        of_request(given, {}, refuse)
    assert "\n" not in str(error.value)
    assert of_request({"options": {"positions": "original"}}, {}, refuse).method == "adav"


# --------------------------------------------------------------------------------------------------------------- store
def test_images_of_different_numbers_of_rows_share_the_store():
    def rows(count, value):
        return {"features": torch.full((count, 3), float(value)), "saliency": torch.full((count,), float(value))}

    store = RowStore({"features": ((3,), torch.float32), "saliency": ((), torch.float32)}, 160, torch.device("cpu"))
    assert store.rows == 10 and store.nbytes == 160
    for key, count in (("a", 4), ("b", 5), ("c", 1)):
        store.put({key: rows(count, count)})
    assert set(store.get(["a", "b", "c"])) == {"a", "b", "c"}
    store.put({"d": rows(6, 6)})  # "a" and "b" make room
    found = store.get(["a", "b", "c", "d"])
    assert set(found) == {"c", "d"}
    for key, count in (("c", 1), ("d", 6)):
        for name, expected in rows(count, count).items():
            assert torch.equal(found[key][name], expected)


def test_images_of_one_call_are_stored_in_turn():
    """The third makes room for itself by dropping the first; the fourth alone is too large."""
    def rows(count, value):
        return {"features": torch.full((count, 1), float(value))}

    store = RowStore({"features": ((1,), torch.float32)}, 4 * 5, torch.device("cpu"))
    store.put({"old": rows(5, 9)})
    store.put({"a": rows(2, 1), "b": rows(3, 2), "c": rows(1, 3), "d": rows(6, 4)})
    found = store.get(["old", "a", "b", "c", "d"])
    assert {key: tensors["features"].flatten().tolist() for key, tensors in found.items()} == {"b": [2] * 3, "c": [3]}


def test_a_tensor_that_an_image_lacks_is_not_read_from_another_image():
    row = {"features": ((2,), torch.float32), "extra": ((), torch.float32)}
    store = RowStore(row, 36, torch.device("cpu"))
    store.put({"a": {"features": torch.ones(2, 2), "extra": torch.ones(2)}})
    store.put({"b": {"features": torch.zeros(1, 2)}})
    store.put({"c": {"features": torch.full((2, 2), 2.0)}})  # in the place of "a"
    found = store.get(["a", "b", "c"])
    assert {key: set(tensors) for key, tensors in found.items()} == {"b": {"features"}, "c": {"features"}}
    assert store.rows == 3 and torch.equal(found["c"]["features"], torch.full((2, 2), 2.0))
