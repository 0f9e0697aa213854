"""Rows that begin alike: their prefix is prefilled once, and logits, tokens and cache are those of whole rows."""

from dataclasses import replace

import pytest
import torch
from shapes import Preset, Prompts, random_model
from support.graph_emulator import install

from llava.config import AdaVConfig
from llava.model import llava_arch
from llava.model.decoding import prefill as prefill_module
from llava.model.decoding import prepared as prepared_module
from llava.model.decoding.decode_step import Stepper
from llava.model.decoding.engine import Engine
from llava.model.decoding.prefill import prefill
from llava.model.decoding.prepared import PASS_TOKENS, SharedPrefixes, worth_sharing
from llava.model.decoding.sampling import Sampling
from llava.model.decoding.shared_prefill import prefill_shared

PLACE, STEPS = 9, 5  # of the image among the ids of a prompt; decode steps


class Asked:
    """A model with random weights, two images of different sizes, and questions about them."""

    def __init__(self, kv_heads: int):
        preset = Preset(56, (64, 3, 4, 128), (256, 3, 4, 320), 200, (PLACE, 7), kv_heads=kv_heads)
        self.model = random_model(preset.model_config(newline=True), "cpu", torch.float32, seed=0)
        self.prompts = Prompts.random(preset, self.model.config, self.model.lm_head.weight, 2, seed=0)
        whole = self.prompts.pixels[1]
        self.pixels, self.sizes = [self.prompts.pixels[0], whole[:1]], [self.prompts.sizes[0], (40, 40)]

    @torch.inference_mode()
    def prepare(self, images=(0, 0, 0, 1, 1), words=(7, 3, 5, 7, 1), method="none", front=None, **config):
        """Questions of some words about images by number. front: the first token of each row, alike by default."""
        config = AdaVConfig(method=method, **({"overall_tokens": 12} | config))
        encoded = self.model.encode(self.pixels, self.sizes, config)
        rows = len(images)
        ids = torch.randint(3, 200, (rows, PLACE + 1 + max(words)), generator=torch.Generator().manual_seed(1))
        ids[:, : PLACE + 1] = self.prompts.ids[0, : PLACE + 1]
        if front is not None:
            ids[:, 0] = torch.tensor(front)
        mask = torch.arange(ids.shape[1]) < PLACE + 1 + torch.tensor(words)[:, None]
        given = [encoded[n] for n in images if n is not None]
        for row, image in enumerate(images):
            if image is None:
                ids[row, PLACE] = 5
        return self.model.prepare(ids, attention_mask=mask, config=config, encoded=given)


@pytest.fixture(scope="module", params=[4, 2], ids=["heads alike", "grouped"])
def asked(request):
    return Asked(request.param)


@pytest.fixture(params=[False, True], ids=["modules", "fused"])
def stepper(request, asked):
    """Of the layers that run; fused ones over the references of their kernels."""
    if not request.param:
        yield None
        return
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        yield Stepper.for_model(asked.model)


CASES = {
    "one image": {"images": (0, 0, 0), "words": (7, 3, 5)},
    "two images of different sizes": {},
    "in turns": {"images": (0, 1, 0, 1, 0), "words": (1, 2, 3, 4, 5)},
    "a question alone": {"images": (0, 1, 0, 0), "words": (4, 4, 4, 4)},
    "a row without an image": {"images": (0, None, 0, 0), "words": (4, 6, 2, 7)},
    "selected tokens": {"images": (0,) * 6, "words": (3, 4, 5, 6, 7, 1), "method": "fastervlm"},
    "tokens of each question": {
        "images": (0,) * 6 + (1,) * 4,
        "words": (3, 4, 5, 6, 7, 1, 2, 3, 4, 5),
        "method": "adav",
    },
}


@pytest.fixture(params=[False, True], ids=["dear passes", "free passes"])
def levels(request, monkeypatch):
    """Function from a case to its number of levels. Free passes: of text and of images, else what saves most."""
    if request.param:
        monkeypatch.setattr(prepared_module, "PASS_TOKENS", 0)
    return lambda name: 1 + (request.param and CASES[name].get("method") != "adav")


@pytest.mark.parametrize("name", CASES)
def test_prefixes_are_prefilled_once(asked, stepper, name, levels):
    prepared = asked.prepare(**CASES[name])
    assert all(len(level.lengths) < len(prepared.lengths) for level in prepared.prefixes)
    assert len(prepared.prefixes) == levels(name)
    caches = [prepared.caching.cache(STEPS) for _ in range(2)]
    expected = prefill(asked.model, prepared, caches[0], stepper)
    found = prefill_shared(asked.model, prepared, caches[1], stepper)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for whole, shared in zip(*(cache.layers for cache in caches), strict=True):
        assert shared.is_initialized
        for row, length in enumerate(prepared.lengths):
            for part in ("keys", "values"):
                mine, theirs = (getattr(layer, part)[row, :, :length] for layer in (shared, whole))
                torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_engine_gives_the_same_tokens(asked, name, monkeypatch, levels):
    prepared, engine, seen = asked.prepare(**CASES[name]), Engine(asked.model), []
    engine.ends = set()
    real = prefill_module.run_layers
    for module in ("prefill", "shared_prefill"):
        monkeypatch.setattr(
            f"llava.model.decoding.{module}.run_layers",
            lambda *a, **k: seen.append(a[2].shape[:2].numel()) or real(*a, **k),
        )
    found, expected = (
        [answer.tokens for answer in engine.generate(one, Sampling(STEPS)).answers]
        for one in (prepared, replace(prepared, prefixes=()))
    )
    assert found == expected
    assert sum(seen[:-1]) < seen[-1], "shared prefixes did not reduce the tokens of prefill"


def test_where_nothing_is_shared(asked):
    assert asked.prepare(images=(0, 1), words=(5, 5)).prefixes == ()
    assert asked.prepare(method="adav").prefixes == ()  # the text before the image is short
    assert asked.prepare(front=(3, 4, 5, 6, 7)).prefixes == ()  # the text before the image differs
    assert asked.prepare(method="fastv").prefixes == ()  # drops tokens inside the LLM
    assert asked.prepare(all_use_h2o=True).prefixes == ()  # the cache ranks entries by the whole prompt
    (halves,) = asked.prepare(images=(0, 0, 0, 0), words=(5,) * 4, front=(3, 3, 4, 4)).prefixes
    assert halves.groups == (0, 0, 1, 1)


def test_methods_that_read_the_question_share_the_text_before_the_image(asked, monkeypatch):
    monkeypatch.setattr(prepared_module, "PASS_TOKENS", 0)
    for method in ("adav", "random"):
        assert asked.prepare(method=method).prefixes == (SharedPrefixes((0,) * 5, (PLACE,)),)
    text, image = asked.prepare(method="fastervlm").prefixes
    assert text == SharedPrefixes((0,) * 5, (PLACE,))
    assert image == SharedPrefixes((0, 0, 0, 1, 1), (PLACE + 12,) * 2)


def test_prefixes_of_rows():
    assert SharedPrefixes.of_rows("aa", [9, 9], [14, 10]) == SharedPrefixes((0, 0), (9,))
    # A row that ends with its prefix keeps one token of its own.
    assert SharedPrefixes.of_rows("aba", [9, 4, 9], [14, 9, 9]) == SharedPrefixes((0, 1, 0), (8, 4))


def test_the_cheapest_way_is_chosen():
    def chosen(rows, text, image, rest):
        """rows: number of questions about each image; the others: numbers of tokens."""
        asked = [n for n, number in enumerate(rows) for _ in range(number)]
        totals = [text + image + rest] * len(asked)
        levels = (
            SharedPrefixes.of_rows([0] * len(asked), [text] * len(asked), totals),
            SharedPrefixes.of_rows(asked, [text + image] * len(asked), totals),
        )
        found = worth_sharing(levels, totals)
        return ["text" if level is levels[0] else "image" for level in found]

    one = PASS_TOKENS
    assert chosen([1], 1000, 1000, 9) == []
    assert chosen([2], one - 1, 0, 9) == []  # a pass costs more than it saves
    assert chosen([2], one, 0, 9) == ["text"]  # as much
    assert chosen([2], 1, one - 1, 9) == ["image"]
    assert chosen([1, 1], one, 1000, 9) == ["text"]  # no image has two questions
    assert chosen([2, 2], one, one, 9) == ["text", "image"]
    assert chosen([2, 2], one - 1, one, 9) == ["image"]
    assert worth_sharing((), [5, 5]) == ()


@pytest.mark.parametrize("method, choices", [("fastervlm", 2), ("none", 2), ("fastv", 2), ("adav", 5), ("random", 5)])
def test_questions_about_one_image_share_a_choice_that_does_not_read_them(asked, monkeypatch, method, choices):
    seen, real = [], llava_arch.select_all
    monkeypatch.setattr(
        llava_arch,
        "select_all",
        lambda name, images, *rest, **own: seen.append(images) or real(name, images, *rest, **own),
    )
    together = asked.prepare(method=method)
    assert [len(images) for images in seen] == [choices]
    found = [selection for row in together.selections for selection in row]
    assert len({id(selection.report) for selection in found}) == 5, "a report belongs to one question"
    for row, (image, words) in enumerate(zip((0, 0, 0, 1, 1), (7, 3, 5, 7, 1), strict=True)):
        if method not in ("random", "adav"):  # the ids of a row depend on the batch here, and these two read them
            (alone,) = asked.prepare(images=(image,), words=(words,), method=method).selections[0]
            assert torch.equal(found[row].indices, alone.indices)
            torch.testing.assert_close(found[row].features, alone.features, rtol=0, atol=1e-5)
