"""Every cache policy behind every kind of method, on ragged batches and all layer shapes, against a plain recomputation
and recorded logits.

A new policy gets the whole matrix by adding its rows to CASES (cache_cases.py) and its rule to cache_reference.py.
"""

import functools
import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_cases import CASES, FILTER, FRONTS, PUBLISHED, by_hand, setting, text, vision
from cache_reference import AFTER, replay
from tiny_checkpoints import build_reference, make_image, save_llava_hf
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.constants import IMAGE_TOKEN_INDEX
from llava.methods.kv_cache import CACHES, cache_names
from llava.mm_utils import left_pad, process_images
from llava.model.builder import load_pretrained_model
from llava.model.decoding.adaptive_cache import AdaptiveCache
from llava.model.decoding.layer_loop import ATTENTION

pytestmark = pytest.mark.filterwarnings("ignore:no FitPrune table was fitted")

# Nine steps: an update after every fourth comes twice, and a step after it.
IMAGE, LAYERS, STEPS = IMAGE_TOKEN_INDEX, 3, 9
# LLM shapes: Vicuna's, Yi's (a KV head for several heads), Mistral's (that, and a window).
SHAPES = {
    "vicuna": {},
    "yi": {"num_key_value_heads": 2, "head_dim": 20},
    "mistral": {"text": "mistral", "sliding_window": 4096},
}
# Four rows: a long text, two images with text between them, text alone, and an image with nothing behind it.
PROMPTS = [
    [1, 9, 8, IMAGE, 10, 11, 12, 14, 15, 16],
    [1, IMAGE, 13, 7, 24, IMAGE, 20, 21],
    [1, 9, 11, 8, 7],
    [1, 7, 9, 8, 7, 30, IMAGE],
]
SIZES = [(97, 61), (40, 30), (31, 90), (57, 57)]
IMAGES_OF_ROW = [slice(0, 1), slice(1, 3), slice(3, 3), slice(3, 4)]
GREEDY = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None, "pad_token_id": 3}


def load(folder, shape):
    save_llava_hf(build_reference("llava_next", seed=3, num_hidden_layers=LAYERS, **SHAPES[shape]), folder)
    _, model, processor, _ = load_pretrained_model(folder, device_map="cpu")
    return model, processor


@pytest.fixture(scope="module", params=SHAPES)
def loaded(request, tmp_path_factory):
    return load(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module", params=["vicuna", "yi"])
def vicuna_or_yi(request, tmp_path_factory):
    return load(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def yi(tmp_path_factory):
    return load(tmp_path_factory.mktemp("yi"), "yi")


@functools.cache
def pixels_of(model, processor):
    """The four images, as the vision tower reads them."""
    images = [make_image(*size, seed=i) for i, size in enumerate(SIZES)]
    return list(process_images(images, processor, model.config))


def batch(model, processor, rows=range(4)):
    """prepare()'s arguments for some of the four rows."""
    pixels = pixels_of(model, processor)
    ids, mask = left_pad([torch.tensor(PROMPTS[row]) for row in rows], 3)
    chosen = [i for row in rows for i in range(4)[IMAGES_OF_ROW[row]]]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "images": [pixels[i] for i in chosen] or None,
        "image_sizes": [SIZES[i] for i in chosen] or None,
    }


def forced(rows, steps=STEPS):
    return torch.randint(4, 40, (4, steps), generator=torch.Generator().manual_seed(5))[list(rows)]


def new_cache(model, prepared, steps=STEPS):
    return prepared.caching.cache(steps)


def entries(layer, row):
    """Keys [G, n, d] of a row's entries in the order front, image, evictable region from old to new."""
    fixed = int(layer.front_len[row] + layer.image_len[row])
    slots = layer.text[row, :, : layer.text_len[row, 0]].long()
    return torch.cat(
        [layer.keys[row, :, :fixed], layer.keys[row].gather(1, slots[..., None].expand(-1, -1, layer.keys.shape[-1]))],
        dim=1,
    )


def check_against_replay(model, prepared, tokens, config, rows=None):
    """Logits at every step, and the keys that are stored at the end; of all rows of the batch, or of some."""
    cache = new_cache(model, prepared, tokens.shape[1])
    logits = by_hand(model, prepared, tokens, cache)
    for row in range(len(tokens)) if rows is None else rows:
        want, layers, counts = replay(model, prepared, row, tokens[row].tolist(), config)
        torch.testing.assert_close(logits[row], want, atol=1e-4, rtol=0)
        for layer, seen, count in zip(cache.layers, layers, counts, strict=True):
            assert count == [layer.stored(row, step) for step in range(len(count))]
            # Where everything is kept it lies as it stood in the prompt; H2O knows no kinds.
            plain = seen.h2o or not prepared.caching.adaptive
            order = [sorted(kept, key=lambda i: (not plain and seen.kinds[i], i)) for kept in seen.kept]  # noqa: B023
            keys = torch.stack([seen.key[head, slots] for head, slots in enumerate(order)])
            torch.testing.assert_close(entries(layer, row), keys, atol=1e-4, rtol=0)
    return cache, logits


# --- the matrix ------------------------------------------------------------------------------------------------------


def test_every_policy_has_its_rows():
    assert {policy for policy, _ in CASES.values()} == set(CACHES) == set(cache_names())
    for case, (policy, _) in CASES.items():
        for front in FRONTS:
            config = setting(case, front)
            assert config.cache_policy == policy and type(config.make_cache_policy()) is CACHES[policy]


def cases_behind_fronts():
    """Every case behind every front, and which rows of the batch are recomputed: two of the four in turn, so that each
    case and each front comes with every row. The other two are for the long tests.

    All rows without a front are recomputed in test_every_shape_and_batches_of_one.
    """
    halves = [0, 2], [1, 3]
    for (i, case), (j, front) in product(enumerate(CASES), enumerate(FRONTS)):
        if front != "none":
            yield pytest.param(case, front, halves[(i + j) % 2])
            yield pytest.param(case, front, halves[(i + j + 1) % 2], marks=pytest.mark.long)


@pytest.mark.parametrize("case, front, rows", cases_behind_fronts())
def test_steps_equal_a_recomputation(yi, case, front, rows):
    model, processor = yi
    config = setting(case, front)
    prepared = model.prepare(**batch(model, processor), config=config)
    assert prepared.caching.adaptive == (CASES[case][0] != "full")
    check_against_replay(model, prepared, forced(range(4)), config, rows)


def cases_of_shapes():
    """Every case on every shape. Yi's, which the tests above use, and Mistral's take turns; the rest is for long tests."""
    for (i, case), shape in product(enumerate(CASES), SHAPES):
        short = shape == "vicuna" or shape == ("yi", "mistral")[i % 2]
        yield pytest.param(shape, case, marks=() if short else pytest.mark.long)


@pytest.mark.parametrize("loaded, case", cases_of_shapes(), indirect=["loaded"])
def test_every_shape_and_batches_of_one(loaded, case):
    """Alone, each row gives what it gives in the batch, to the token."""
    model, processor = loaded
    config = setting(case)
    together = model.prepare(**batch(model, processor), config=config)
    assert together.caching.adaptive == (CASES[case][0] != "full")
    _, logits = check_against_replay(model, together, forced(range(4)), config)
    for row in range(4):
        alone = model.prepare(**batch(model, processor, [row]), config=config)
        own = by_hand(model, alone, forced([row]), new_cache(model, alone))
        torch.testing.assert_close(own[0], logits[row], atol=1e-4, rtol=0)
        assert torch.equal(own[0].argmax(dim=-1), logits[row].argmax(dim=-1))


def check_keeping_everything(model, processor, front, rows, tokens):
    """Rates of 0, the full policy on storage of its own, and budgets with room for all, against transformers' cache."""
    inputs, method, options = batch(model, processor, rows), setting("full", front), GREEDY | {"max_new_tokens": tokens}
    want = model.generate(**inputs, config=method, **options)
    for keys in (vision(0.0, 0.0, 3), text("h2o", rate=0.0), text("history", minimum=100)):
        if not (method.prefill_filter_flag and "vision_adaptive_attention" in keys):  # the filter may not drop more
            config = AdaVConfig(**(method.to_dict() | keys))
            assert torch.equal(model.generate(**inputs, config=config, **options), want)
    prepared = model.prepare(**inputs, config=method)
    cache = new_cache(model, prepared, tokens - 1)
    assert torch.equal(model.generate(prepared=prepared, past_key_values=cache, **options), want)
    assert cache.steps == tokens - 1 and cache.get_seq_length() == prepared.inputs_embeds.shape[1] + tokens - 1


@pytest.mark.parametrize("front", FRONTS)
def test_keeping_everything_changes_nothing(yi, front):
    check_keeping_everything(*yi, front, [0, 1, 2, 3], 8)


@pytest.mark.parametrize("rows", [[1], [0, 1, 3]], ids=["batch 1", "batch 3"])
def test_keeping_everything_is_the_plain_model_for_64_tokens(loaded, rows):
    check_keeping_everything(*loaded, "none", rows, 64)


@functools.cache
def plain_tokens(model, processor):
    """64 tokens of rows 0, 1 and 3 where the cache keeps everything."""
    return model.generate(**batch(model, processor, [0, 1, 3]), config=setting("full"), **GREEDY)


@pytest.mark.parametrize("case", ["core", "published", "core and history", "h2o", "h2o of the paper"])
def test_64_generated_tokens_in_a_batch_and_alone(vicuna_or_yi, case):
    """generate() feeds what steps by hand are fed, and a batch of three is three batches of one."""
    model, processor = vicuna_or_yi
    rows, config = [0, 1, 3], setting(case)
    together = model.generate(**batch(model, processor, rows), config=config, **GREEDY)
    for place, row in enumerate(rows):
        alone = model.generate(**batch(model, processor, [row]), config=config, **GREEDY)
        assert torch.equal(alone[0], together[place])
    prepared = model.prepare(**batch(model, processor, rows), config=config)
    logits = by_hand(model, prepared, together[:, :-1], new_cache(model, prepared, 63))
    assert torch.equal(logits.argmax(dim=-1), together)
    assert not torch.equal(together, plain_tokens(model, processor)), "a policy that changes nothing would pass as well"


def test_64_tokens_against_the_recomputation(vicuna_or_yi):
    model, processor = vicuna_or_yi
    for case in ("published", "core and history", "h2o"):
        config = setting(case)
        prepared = model.prepare(**batch(model, processor, [0, 1]), config=config)
        check_against_replay(model, prepared, forced([0, 1], 64), config)


# --- A-VL's limits ---------------------------------------------------------------------------------------------------


def test_interval_1_reads_all_that_is_kept(loaded):
    model, processor = loaded
    logits = []
    for keys in (vision(0.5, 0.8, 1), vision(0.5, 0.5, -1), vision(0.5, 0.5, 4)):
        prepared = model.prepare(**batch(model, processor), config=AdaVConfig(method="none", **keys))
        logits.append(by_hand(model, prepared, forced(range(4)), new_cache(model, prepared)))
    torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits[2], logits[0], atol=1e-5, rtol=0)


def test_interval_minus_1_is_plain_eviction(yi):
    """transformers' own cache with the evicted entries cut out of it by hand, and transformers' own steps on it."""
    model, processor = yi
    config = AdaVConfig(method="none", **vision(0.5, 0.9, -1))
    prepared = model.prepare(**batch(model, processor, [1]), config=config)
    tokens = forced([1])
    want = by_hand(model, prepared, tokens, new_cache(model, prepared))
    _, layers, _ = replay(model, prepared, 0, [], config)
    prepared.caching, cache = None, DynamicCache()
    by_hand(model, prepared, tokens[:, :0], cache)
    for layer, seen in zip(cache.layers, layers, strict=True):
        kept = torch.tensor(sorted(seen.kept[0]))
        assert len(kept) < seen.key.shape[1]
        layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
    got = []
    with torch.no_grad():
        for step, token in enumerate(tokens[0].tolist()):
            position = torch.tensor([[prepared.lengths[0] + step]])
            got.append(
                model(input_ids=torch.tensor([[token]]), position_ids=position, past_key_values=cache).logits[0, -1]
            )
    torch.testing.assert_close(want[0, 1:], torch.stack(got), atol=1e-5, rtol=0)


def test_text_between_images_is_text_and_images_are_ranked_together(yi):
    model, processor = yi
    config = AdaVConfig(method="none", **vision(0.9, 0.9, 2), **text("direct", minimum=1, rate=0.5))
    prepared = model.prepare(**batch(model, processor, [1]), config=config)
    cache, _ = check_against_replay(model, prepared, forced([1]), config)
    (first, one), (second, two) = prepared.image_spans[0]
    between = second - first - one
    assert between == 3 and cache.layers[0].plans[0].prompt == between + 2 and cache.layers[0].plans[0].front == 1
    assert cache.layers[0].plans[0].image == int(0.1 * (one + two) + 1e-6)
    _, layers, _ = replay(model, prepared, 0, [], config)
    assert all(seen.kinds[second - 1] == AFTER for seen in layers)
    shares = [len([i for i in seen.image() if i < second]) / (one + two) for seen in layers]
    assert len(set(shares)) > 1, "how many of each image stay is what the attention says, layer by layer"


def test_the_filter_alone_is_a_method_inside_the_llm(yi):
    model, processor = yi
    prepared = model.prepare(**batch(model, processor), config=AdaVConfig(method="none", **FILTER))
    assert not prepared.caching.adaptive
    for row, images in enumerate(prepared.image_spans):
        for image, (_, count) in enumerate(images):
            seen = [tokens.attention for tokens in prepared.dropping.schedule(row, image)]
            assert seen == [count] * 2 + [int(count / 2)] * (LAYERS - 2)


def test_rows_that_have_ended_disturb_no_other(yi):
    """generate() goes on feeding padding to a row after its end."""
    model, processor = yi
    options = GREEDY | {"max_new_tokens": 24}
    for case in ("published", "h2o", "text history"):
        config = setting(case)
        free = model.generate(**batch(model, processor, [0, 1, 3]), config=config, **options | {"eos_token_id": None})
        ends = int(free[1, 2])
        options["eos_token_id"] = ends
        together = model.generate(**batch(model, processor, [0, 1, 3]), config=config, **options)
        for place, row in enumerate([0, 1, 3]):
            alone = model.generate(**batch(model, processor, [row]), config=config, **options)[0]
            assert torch.equal(together[place, : len(alone)], alone)
            assert (together[place, len(alone) :] == 3).all()
        assert (together[1] == ends).nonzero()[0] <= 2


def test_sampling_several_answers_repeats_rows(yi):
    model, processor = yi
    config = setting("published")
    options = GREEDY | {"do_sample": True, "top_k": 1, "num_return_sequences": 2, "max_new_tokens": 9}
    both = model.generate(**batch(model, processor, [0, 1]), config=config, **options)
    want = model.generate(**batch(model, processor, [0, 1]), config=config, **GREEDY | {"max_new_tokens": 9})
    assert torch.equal(both, want.repeat_interleave(2, dim=0))


# --- recorded logits -------------------------------------------------------------------------------------------------
REFERENCE = Path(__file__).parents[1] / "data" / "avl_public"
# The public code's switches -> ours.
NAMES = {"text_h20_hh_rate_in_cache": "text_heavy_share"}


def translated(settings):
    """A-VL's published settings as keys of adav_configs.json: three overlapping switches are one text_rule."""
    keys = {NAMES.get(name, name): value for name, value in settings.items()}
    if keys.get("text_pruning_flag"):
        direct = keys.pop("compare_text_direct_pruning", False)
        keys["text_rule"] = "h2o" if keys.pop("text_use_h2o") else "direct" if direct else "history"
    return AdaVConfig(method="none", **keys)


@pytest.mark.parametrize(
    "name",
    [
        *("plain", "evict50", "core_50_70_3", "core_0_90_4", "core_60_80_1", "text_h2o", "text_direct"),
        *("text_history", "prefill50", "published", "all_h2o"),
    ],
)
def test_recorded_logits_of_public_code(name):
    """Prefill, then 24 forced tokens, recorded from A-VL's public code; and the entries that were left."""
    cases = np.load(REFERENCE / "cases.npz")
    _, model, _, _ = load_pretrained_model(REFERENCE, device_map="cpu")
    ids = torch.from_numpy(cases["input_ids"])
    config = translated(json.loads(str(cases[f"{name}_settings"])))
    assert config.cache_policy == {"plain": "full", "prefill50": "full", "all_h2o": "h2o"}.get(name, "avl")
    prepared = model.prepare(ids.masked_fill(ids == 4, IMAGE), torch.from_numpy(cases["pixel_values"]), config=config)
    cache = new_cache(model, prepared, 24)
    logits = by_hand(model, prepared, torch.from_numpy(cases["forced"])[None], cache)
    torch.testing.assert_close(logits[0, :-1], torch.from_numpy(cases[f"{name}_logits"]), atol=1e-4, rtol=0)
    assert [entries(layer, 0).shape[1] for layer in cache.layers] == cases[f"{name}_cache"].tolist()


# --- requests and their limits ---------------------------------------------------------------------------------------


def test_requests_that_an_adaptive_cache_does_not_serve(yi):
    model, processor = yi
    inputs, config = batch(model, processor, [0]), AdaVConfig(method="none", **PUBLISHED)
    for more, words in (
        ({"num_beams": 2}, "does not go with beam search, allowed are greedy"),
        ({"assistant_model": model}, "does not go with assisted generation"),
        ({"cache_implementation": "static"}, "cache_implementation is 'static'"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size is 4"),
        ({"past_key_values": DynamicCache()}, "a DynamicCache of another making"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions does not go with"),
    ):
        with pytest.raises(UserError, match=words):
            model.generate(**inputs, config=config, **GREEDY | more)
    prepared = model.prepare(**inputs, config=config)
    of_another = model.prepare(**inputs, config=config).caching.cache(4)
    for cache, words in ((None, "past_key_values is none"), (of_another, "a AdaptiveCache of another making")):
        with pytest.raises(UserError, match=words):
            by_hand(model, prepared, forced([0]), cache)
    cache = prepared.caching.cache(2)
    with pytest.raises(UserError, match="made for 2 decode steps, which have all been taken"):
        by_hand(model, prepared, forced([0]), cache)
    cache = prepared.caching.cache(4)
    by_hand(model, prepared, forced([0], 1), cache)
    with pytest.raises(UserError, match="got 3 tokens per row, but an adaptive KV cache takes one at a time"):
        model(input_ids=torch.tensor([[5, 6, 7]]), past_key_values=cache, caching=prepared.caching)
    cache.reset()
    with pytest.raises(UserError, match="got a batch of 1 x 1 tokens.*it is prefilled in one piece"):
        model(input_ids=torch.tensor([[5]]), past_key_values=cache, caching=prepared.caching)
    with pytest.raises(UserError, match="asked for -1 decode steps"):
        prepared.caching.cache(-1)
    model.config._attn_implementation = "eager"
    try:
        with pytest.raises(UserError, match='was set to "eager"'):
            model.generate(**inputs, config=config, **GREEDY)
    finally:
        model.config._attn_implementation = ATTENTION


def test_a_plain_forward_leaves_no_cache(yi):
    model, processor = yi
    inputs = batch(model, processor, [0])
    want = model(**inputs)
    model.adav_config = AdaVConfig(method="none", **PUBLISHED)
    try:
        out = model(**inputs)
        with pytest.raises(UserError, match="forward\\(\\) cannot make by itself"):
            model(**inputs, use_cache=True)
    finally:
        model.adav_config = AdaVConfig(method="none")
    assert out.past_key_values is None and isinstance(want.past_key_values, DynamicCache)
    torch.testing.assert_close(out.logits, want.logits, atol=1e-5, rtol=0)


def test_a_window_is_a_limit(tmp_path):
    save_llava_hf(build_reference("llava", text="mistral", sliding_window=24, num_hidden_layers=LAYERS), tmp_path)
    _, model, processor, _ = load_pretrained_model(tmp_path, device_map="cpu")
    pixels = process_images([make_image(40, 30)], processor, model.config)
    config = AdaVConfig(method="none", **PUBLISHED)
    prepared = model.prepare(torch.tensor([[1, IMAGE, 9, 10]]), pixels, config=config)  # 19 tokens: five more fit
    check_against_replay(model, prepared, forced([0], 5), config)
    with pytest.raises(UserError, match="has reached 25 tokens.*at most 24 are allowed"):
        model.generate(prepared=prepared, **GREEDY | {"max_new_tokens": 7})


def test_half_precision_stays_finite(yi):
    model, processor = yi
    model = model.bfloat16()
    try:
        for case in CASES:
            prepared = model.prepare(**batch(model, processor), config=setting(case))
            cache = new_cache(model, prepared)
            assert by_hand(model, prepared, forced(range(4)), cache).isfinite().all()
            assert isinstance(cache, AdaptiveCache) and cache.layers[0].keys.dtype == torch.bfloat16
    finally:
        model.float()


class HostReads(TorchDispatchMode):
    """Counts what brings a value from the device to the host."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        names = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero")
        self.count += function.overloadpacket.__name__ in names
        return function(*arguments, **(keywords or {}))


def test_a_step_changes_storage_in_place(yi):
    """A step works on the same tensors every time and needs nothing from the host, so that it can be captured."""
    model, processor = yi
    for case in ("published", "core and history", "h2o", "text direct"):
        prepared = model.prepare(**batch(model, processor), config=setting(case))
        cache = new_cache(model, prepared)
        by_hand(model, prepared, forced(range(4), 1), cache)

        def tensors(cache=cache):
            return {
                (number, name): (value.data_ptr(), value.shape)
                for number, layer in enumerate(cache.layers)
                for name, value in vars(layer).items()
                if isinstance(value, torch.Tensor)
            }

        before = tensors()
        for step in forced(range(4)).T[1:]:
            with torch.no_grad(), HostReads() as reads:
                model(input_ids=step[:, None], past_key_values=cache, caching=prepared.caching)
            # decode_attention's plain reference reads three lengths; nothing else may ask the host.
            assert reads.count == 3 * LAYERS
        assert tensors() == before and cache.steps == STEPS
