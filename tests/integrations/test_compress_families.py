"""compress() on tiny random models of every family whose own generate() runs: the same checks for all of them.

References are the model itself: without compress(), with the dropped tokens hidden by a mask, and with an attention
function that records its weights. Nothing here says how well tokens are chosen: weights are random.
"""

from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from cache_cases import setting
from cache_reference import replay
from family_cases import CASES, IMAGE, others_long
from peft import LoraConfig, get_peft_model
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.integrations.transformers import FAMILIES, compress
from llava.integrations.transformers.prompts import Prompts
from llava.model.decoding.adaptive_cache import AdaptiveCache

METHODS = ("adav", "t2i", "cls", "mix", "fastervlm", "divprune", "cdpruner", "adav_cover", "random", "no_image")
# One of each kind of LLM and positions: M-RoPE, DeepStack, one dimension, newline tokens.
KINDS = ("qwen2_vl", "qwen3_vl", "internvl", "llava_onevision")
LINEAR = ("qwen3_5", "qwen3_5_moe")
MASKING = [name for name in CASES if name not in LINEAR]
PIECES = [[4, "large", 5], [2, "small", 3, "tall", 9], [7]]
K = 3


@pytest.fixture(scope="module")
def models():
    """Models by family, made on first use."""

    class Models(dict):
        def __missing__(self, name):
            self[name] = CASES[name].model()
            return self[name]

    return Models()


def prompts_of(name):
    return [CASES[name].prompt(pieces, seed) for seed, pieces in enumerate(PIECES)]


def answer(model, inputs, steps=5, **settings):
    """A whole result of generate(): sequences and the logits of every step."""
    settings = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True} | settings
    return model.generate(**inputs, max_new_tokens=steps, **settings)


def config(method="adav", tokens=K, **options):
    return AdaVConfig(method=method, overall_tokens=tokens, options=options)


def places_of(ids, selections):
    """Per image of a prompt [S]: the columns of its placeholders; images stand in the order of the selections."""
    return torch.nonzero(ids == IMAGE).flatten().split([selection.total for selection in selections])


@torch.no_grad()
def hidden_instead(model, inputs, sequence, selections, kept=None, first=0):
    """Logits [S + n, V] of the model itself for the whole prompt and what came after it, dropped tokens hidden by a mask.

    kept: per image, the tokens that stay; by default those of the selections
    first: the first layer that does not see the dropped tokens
    """
    kept = [selection.indices.tolist() for selection in selections] if kept is None else kept
    ids, size = inputs["input_ids"], sequence.shape[1]
    positions = model._prepare_position_ids_for_generation(ids, dict(inputs))
    positions = torch.cat([positions, positions[..., -1:] + 1 + torch.arange(size - ids.shape[1])], dim=-1)
    allowed = torch.ones(size, size, dtype=torch.bool).tril()
    everything = torch.zeros(size, size).masked_fill(~allowed, float("-inf"))[None, None]
    for columns, stay in zip(places_of(ids[0], selections), kept, strict=True):
        gone = set(range(len(columns))) - set(stay)
        allowed[:, columns[sorted(gone)]] = False
    allowed.fill_diagonal_(True)  # what is hidden still sees itself: a row of -inf would be NaN
    mask = torch.zeros(size, size).masked_fill(~allowed, float("-inf"))[None, None]
    given = {name: value for name, value in inputs.items() if name != "mm_token_type_ids"}
    given |= {"input_ids": sequence, "attention_mask": mask, "position_ids": positions}
    with ExitStack() as hooks:
        for layer in model.model.language_model.layers[:first]:
            hooks.enter_context(
                layer.register_forward_pre_hook(
                    lambda _, args, named: (args, named | {"attention_mask": everything}), with_kwargs=True
                )
            )
        return model(**given).logits[0]


# --- nothing dropped, and everything counted ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_keeping_everything_is_the_model_itself(models, name):
    model, prompts = models[name], prompts_of(name)
    for inputs in (prompts[0], CASES[name].batch(prompts)):
        stock = answer(model, inputs)
        with compress(model, config("none")) as compression:
            result = answer(model, inputs)
        assert torch.equal(result.sequences, stock.sequences)
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(result.logits, stock.logits, strict=True))
        assert all(len(kept.indices) == kept.total for kept in compression.last_selection)
    assert sum(kept.total for kept in compression.last_selection) == int((inputs["input_ids"] == IMAGE).sum())


@pytest.mark.parametrize("name", CASES)
def test_a_batch_gives_what_its_prompts_give(models, name):
    """Budgets are exact, per image; rows are padded left; one row has two images and one has none."""
    model, prompts = models[name], prompts_of(name)
    for method in ("adav", "divprune"):
        with compress(model, config(method)) as compression:
            together = answer(model, CASES[name].batch(prompts))
            kept = [selection.indices.tolist() for selection in compression.last_selection]
            alone, own = [], []
            for inputs in prompts:
                alone.append(answer(model, inputs).sequences[0, -5:].tolist())
                own += [selection.indices.tolist() for selection in compression.last_selection]
        assert [len(indices) for indices in kept] == [K, K, K] and kept == own
        assert together.sequences[:, -5:].tolist() == alone
    stock = answer(model, CASES[name].batch(prompts))
    assert not torch.equal(together.sequences[0], stock.sequences[0])
    assert torch.equal(together.sequences[2], stock.sequences[2]), "a prompt without images"


# --- dropping is hiding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, method",
    [(name, method) for name in KINDS for method in METHODS]
    + [(name, "adav") for name in MASKING if name not in KINDS],
)
def test_dropping_is_hiding(models, name, method):
    """Prefill and every decoding step give the logits of the whole sequence with the dropped tokens masked out."""
    model, inputs = models[name], CASES[name].prompt([2, "small", 3, "tall", 1, "large", 4])
    with compress(model, config(method)) as compression:
        # Sequences go back to the model, so they must have no placeholder without an image.
        result = answer(model, inputs, suppress_tokens=[IMAGE])
    kept = [len(selection.indices) for selection in compression.last_selection]
    assert kept == [0 if method == "no_image" else K] * 3
    logits = hidden_instead(model, inputs, result.sequences, compression.last_selection)
    length = inputs["input_ids"].shape[1]
    assert torch.allclose(torch.cat(result.logits), logits[length - 1 : -1], rtol=1e-4, atol=1e-4)
    dropped = sum(selection.total for selection in compression.last_selection) - sum(kept)
    assert result.past_key_values.get_seq_length() == length - dropped + 4


@pytest.mark.parametrize("name", LINEAR)
@torch.no_grad()
def test_dropping_in_linear_attention(models, name):
    """Qwen3.5 passes masked tokens through its recurrent state, so the reference is its forward() on the shorter prompt."""
    model, inputs = models[name], CASES[name].prompt([2, "small", 3, "tall", 4])
    with compress(model, config("cls")) as compression:
        result = answer(model, inputs, suppress_tokens=[IMAGE])
    ids, size = inputs["input_ids"], result.sequences.shape[1]
    positions = model._prepare_position_ids_for_generation(ids, dict(inputs))
    positions = torch.cat([positions, positions[..., -1:] + 1 + torch.arange(size - ids.shape[1])], dim=-1)
    features = model.get_image_features(
        inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True
    ).pooler_output
    embeds = model.get_input_embeddings()(result.sequences)
    embeds[result.sequences == IMAGE] = torch.cat(list(features))
    stays = torch.ones(size, dtype=torch.bool)
    for columns, selection in zip(
        places_of(ids[0], compression.last_selection), compression.last_selection, strict=True
    ):
        stays[columns] = False
        stays[columns[selection.indices]] = True
    logits = model(inputs_embeds=embeds[:, stays], position_ids=positions[1:, :, stays], use_cache=False).logits[0]
    assert torch.allclose(torch.cat(result.logits), logits[-6:-1], rtol=1e-4, atol=1e-4)
    assert stays.sum() == size - 4 - 15 + 2 * K


def test_deepstack_features_matter(models):
    """Without its DeepStack rows, a kept token of Qwen3-VL gives other logits: the test above would see it."""
    model, inputs = models["qwen3_vl"], CASES["qwen3_vl"].prompt([4, "large", 5])
    with compress(model, config("cls")) as compression:
        result = answer(model, inputs)
        compression.family.llm_arguments = lambda is_image, beside: {}
        assert not torch.allclose(answer(model, inputs).logits[0], result.logits[0], atol=1e-2)


# --- saliency ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def recorded():
    """(module, queries, keys, scaling) of every call of attention "recorded": [B, H, S, d], after rotation and norms."""
    calls = []

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        calls.append((module, query, key, scaling))
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    AttentionInterface.register("recorded", attend)
    AttentionMaskInterface.register("recorded", sdpa_mask)
    return calls


def tower_of(model):
    return getattr(model.model, "visual", None) or model.model.vision_tower


@pytest.mark.parametrize("name", CASES)
def test_saliency_is_the_mean_attention_that_patches_receive(models, recorded, name):
    """Read from an attention function of the last full-attention block, and compared token by token."""
    case, inputs = CASES[name], CASES[name].prompt([2, "small", 3, "tall", 4])
    model = case.model()
    tower_of(model).config._attn_implementation = "recorded"
    with compress(model, config("none")) as compression:
        answer(model, inputs, steps=1)
    block = 1 if name in ("qwen2_5_vl", "internvl", "llava_onevision") else 2
    layers = list({id(module): module for module, *_ in recorded})
    calls = [call for call in recorded if id(call[0]) == layers[block]]
    patches = 16 if name in ("internvl", "llava_onevision") else 0  # of a tile; the others take images of any size
    received = [
        (query[..., -patches:, :] @ key[..., -patches:, :].mT * scaling).softmax(-1).mean((1, 2))
        for _, query, key, scaling in calls
    ]
    if name == "llava_onevision":
        expected = [torch.cat([tile, tile.new_full((1,), float("nan"))]) for tile in received[0]]
    elif name == "internvl":
        joined = received[0].view(-1, 2, 2, 2, 2).mean((2, 4)).flatten(1)
        expected = [joined[:1].flatten(), joined[1:].flatten()]
    else:
        expected = [values[0].view(-1, 4).mean(1) for values in received]
    for selection, values in zip(compression.last_selection, expected, strict=True):
        if name == "qwen2_5_vl":  # this tower orders tokens by windows, so only their values are compared here
            values, selection.saliency = values.sort().values, selection.saliency.sort().values
        assert torch.allclose(selection.saliency, values, rtol=1e-4, atol=1e-7, equal_nan=True)
        assert values.nan_to_num(0).max() > 1.05 * values.nan_to_num(1).min()


@pytest.mark.parametrize("name", KINDS)
def test_saliency_by_distance(models, name):
    """options.saliency "distance": how far a token lies from the mean of its image; newline tokens have none."""
    model, inputs = models[name], CASES[name].prompt([4, "large", 5])
    with compress(model, config("none", saliency="distance")) as compression:
        answer(model, inputs, steps=1)
        (whole,) = compression.last_selection
    patches = whole.tile >= 0
    features = whole.features[patches]
    assert torch.allclose(whole.saliency[patches], (features - features.mean(0)).norm(dim=-1), rtol=1e-4)
    assert whole.saliency[~patches].isnan().all()
    with compress(model, config("cls", saliency="distance")) as compression:
        answer(model, inputs, steps=1)
    order = whole.saliency.nan_to_num(-1).argsort(descending=True)[:K]
    assert compression.last_selection[0].indices.tolist() == sorted(order.tolist())


# --- methods inside the LLM --------------------------------------------------------------------------------------------

# Two layers: FastV reads layer 0 and cuts behind it, PyramidDrop reads layer 1 and cuts before it.
INSIDE = {"fastv": ({"layer": 1}, 0), "pyramiddrop": ({}, 1)}


@pytest.mark.parametrize("method", INSIDE)
@pytest.mark.parametrize("name", MASKING)
def test_cuts_between_layers(recorded, name, method):
    """The tokens with most attention from the prompt's last token stay, and layer 1 answers as if the others were hidden."""
    model, inputs = CASES[name].model(), CASES[name].prompt([2, "small", 3, "tall", 4])
    options, layer = INSIDE[method]
    with compress(model, config(method, **options)) as compression:
        result = answer(model, inputs, suppress_tokens=[IMAGE])
    selections = compression.last_selection
    (kept, others) = [selection.report["survivors"][-1].tolist() for selection in selections]
    assert len(kept) == len(others) == K
    assert all(len(cuts.report["cuts"]) == 1 for cuts in selections)
    # 1. The choice, from the model's own queries and keys on the whole prompt.
    llm = model.model.language_model
    llm.config._attn_implementation = "recorded"
    with torch.no_grad():
        answer(model, inputs, steps=1)
    llm.config._attn_implementation = "sdpa"
    _, query, key, scaling = [call for call in recorded if call[0] is llm.layers[layer].self_attn][0]
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    row = (query[0, :, -1:] @ key[0].mT * scaling).softmax(-1).mean((0, 1))
    for columns, own in zip(places_of(inputs["input_ids"][0], selections), (kept, others), strict=True):
        assert own == sorted(row[columns].topk(K).indices.tolist())
    # 2. The answers.
    logits = hidden_instead(model, inputs, result.sequences, selections, kept=[kept, others], first=1)
    length = inputs["input_ids"].shape[1]
    assert torch.allclose(torch.cat(result.logits), logits[length - 1 : -1], rtol=1e-4, atol=1e-4)
    dropped = sum(selection.total for selection in selections) - 2 * K
    assert [layer.get_seq_length() for layer in result.past_key_values.layers] == [length + 4, length + 4 - dropped]
    # 3. A loss on whole prompts.
    labels = torch.where(torch.arange(length) >= length - 3, inputs["input_ids"], -100)
    with compress(model, config(method, **options)):
        output = model(**inputs, labels=labels)
    last = logits[length - 4 : length - 1]
    expected = torch.nn.functional.cross_entropy(last, inputs["input_ids"][0, -3:])
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-4)


def fitprune_scores(rows, own, question, image, text):
    most = rows.amax(0)
    return most[own].mean(0)[own] * most[question].sum(0)[own]


def sparsevlm_scores(rows, own, question, image, text):
    weight = (image @ text.T).softmax(dim=1).mean(dim=0)
    raters = question[weight > weight.mean()]
    return rows[:, raters if len(raters) else question].mean((0, 1))[own]


# One cut in or after layer 0, and a second one of FitPrune inside the last layer, which no answer sees.
SCORED = {
    "fitprune": ({}, fitprune_scores),
    "sparsevlm": ({"version": "2.0"}, sparsevlm_scores),
    "dart": ({"layer": 1}, None),
}


@pytest.mark.filterwarnings("ignore:no FitPrune table")
@pytest.mark.parametrize("method", SCORED)
@pytest.mark.parametrize("name", others_long(KINDS, "qwen3_vl"))
def test_cuts_by_the_question(recorded, name, method):
    """Scores from the rows of the text behind an image; layer 1 answers as if the dropped tokens were hidden."""
    model, inputs = CASES[name].model(), CASES[name].prompt([2, "small", 3, "tall", 4])
    options, scores = SCORED[method]
    with compress(model, config(method, **options)) as compression:
        result = answer(model, inputs, suppress_tokens=[IMAGE])
    selections = compression.last_selection
    kept = [selection.report["survivors"][0].tolist() for selection in selections]
    assert [len(selection.report["survivors"][-1]) for selection in selections] == [K, K]
    # 1. The choice, from the model's own queries and keys on the whole prompt.
    ids, llm = inputs["input_ids"][0], model.model.language_model
    llm.config._attn_implementation = "recorded"
    with torch.no_grad():
        answer(model, inputs, steps=1)
    llm.config._attn_implementation = "sdpa"
    _, query, key, scaling = [call for call in recorded if call[0] is llm.layers[0].self_attn][0]
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    future = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
    rows = (query[0] @ key[0].mT * scaling).masked_fill(future, float("-inf")).softmax(-1)
    for selection, own, left in zip(selections, places_of(ids, selections), kept, strict=True):
        behind = torch.arange(len(ids)) > own[-1]
        question = torch.nonzero(behind & ~torch.isin(ids, torch.tensor(compression.family.marks))).flatten()
        if scores is not None:
            text = model.get_input_embeddings()(ids[question])
            rated = scores(rows, own, question, selection.features, text)
            assert left == sorted(rated.topk(len(left)).indices.tolist())
    # 2. The answers.
    logits = hidden_instead(model, inputs, result.sequences, selections, kept=kept, first=1)
    assert torch.allclose(torch.cat(result.logits), logits[len(ids) - 1 : -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", INSIDE)
@pytest.mark.parametrize("name", KINDS)
def test_a_batch_inside_the_llm(models, name, method):
    """Rows of different length and number of images, left padding, beams, and nothing left behind."""
    model, prompts = models[name], prompts_of(name)
    fixed = {"cache_implementation": "static", "disable_compile": True}
    answer(model, prompts[0], **fixed)  # transformers keeps what it makes on first use
    before = state(model)
    with compress(model, config(method, **INSIDE[method][0])) as compression:
        together = answer(model, CASES[name].batch(prompts)).sequences[:, -5:]
        kept = [selection.report["survivors"][-1].tolist() for selection in compression.last_selection]
        beams = answer(model, CASES[name].batch(prompts), num_beams=2, output_logits=False).sequences[:, -5:]
        alone = torch.cat([answer(model, inputs).sequences[:, -5:] for inputs in prompts])
        narrow = torch.cat([answer(model, one, num_beams=2, output_logits=False).sequences[:, -5:] for one in prompts])
        with pytest.raises(UserError, match="a cache of fixed size"):
            answer(model, prompts[0], **fixed)
    assert torch.equal(together, alone) and torch.equal(beams, narrow) and [len(own) for own in kept] == [K] * 3
    assert state(model) == before and model.config.get_text_config()._attn_implementation == "sdpa"
    with compress(model, config(method, 100, **INSIDE[method][0])):
        whole = answer(model, CASES[name].batch(prompts))
    stock = answer(model, CASES[name].batch(prompts))
    assert torch.equal(whole.sequences, stock.sequences)


# --- adaptive caches ---------------------------------------------------------------------------------------------------

ONE_DIMENSION = ("internvl", "llava_onevision")


def prepared_row(model, inputs, setup, positions):
    """What cache_reference.replay reads of one prompt, from the family's own steps before the LLM."""
    family = compress(model, setup).family
    images = {name: inputs.get(name) for name in (*family.image_inputs, *family.optional_inputs)}
    prompts = Prompts(family, inputs["input_ids"], images, setup)
    embeds = prompts.shorten(inputs["input_ids"], None, ())
    return SimpleNamespace(
        lengths=[embeds.shape[1]],
        inputs_embeds=embeds,
        position_ids=prompts.positions(positions),
        position_offset=[0],
        image_spans=[prompts.spans[0].images],
        dropping=None,
    )


@pytest.mark.parametrize("case", others_long(["published", "core and history", "h2o", "h2o of the paper"], "published"))
@pytest.mark.parametrize("name", ONE_DIMENSION)
@torch.no_grad()
def test_adaptive_caches(models, name, case):
    """Every step gives the logits of attention over the whole prompt with what the policy evicts masked."""
    model, inputs = models[name], CASES[name].prompt([2, "small", 3, "tall", 9])
    setup = setting(case, "adav", tokens=6)
    with compress(model, setup):
        result = answer(model, inputs, steps=10)
    assert isinstance(result.past_key_values, AdaptiveCache)
    ids, new = inputs["input_ids"], result.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    prepared = prepared_row(model, inputs, setup, torch.arange(ids.shape[1])[None])
    twin = SimpleNamespace(model=model.model.language_model, lm_head=model.lm_head)
    twin.config = twin.model.config
    logits, _, counts = replay(twin, prepared, 0, new[:-1], setup)
    assert torch.allclose(torch.cat(result.logits), logits, rtol=1e-4, atol=1e-4)
    assert [len(own) for own in counts] == [10, 10] and counts[0][-1] < prepared.lengths[0] + 9, "something was evicted"


@pytest.mark.parametrize("name", others_long(ONE_DIMENSION, "internvl"))
def test_a_batch_on_adaptive_caches(models, name):
    model, prompts = models[name], prompts_of(name)
    before = state(model)
    with compress(model, setting("published", "adav", tokens=K)):
        together = answer(model, CASES[name].batch(prompts)).sequences[:, -5:]
        alone = torch.cat([answer(model, inputs).sequences[:, -5:] for inputs in prompts])
        twice = answer(model, prompts[0], do_sample=True, num_return_sequences=2, top_k=1, output_logits=False)
        for settings, message in (({"num_beams": 2}, "beam search"), ({"cache_implementation": "static"}, "static")):
            with pytest.raises(UserError, match=message):
                answer(model, prompts[0], **settings)
    assert torch.equal(together, alone) and torch.equal(twice.sequences[:, -5:], alone[:1].expand(2, -1))
    assert state(model) == before
    setup = setting("published", "pyramiddrop")
    with pytest.raises(UserError, match='with method "pyramiddrop" is "full"'), compress(model, setup):
        pass


def test_a_sliding_window_ends_cuts():
    """The loop masks no window, so a prompt that is longer than it is refused; selection before the LLM is not."""
    case = CASES["internvl"]
    model, inputs = case.model(), case.prompt([4, "large", 5])
    model.config.text_config.sliding_window = 20
    with pytest.raises(UserError, match="at most 20 are allowed"), compress(model, config("fastv", layer=1)):
        answer(model, inputs)
    with compress(model, config("adav")):
        answer(model, inputs)


# --- the order of tokens -----------------------------------------------------------------------------------------------


def test_places_of_internvl_tokens(models):
    """Tiles one after another, the thumbnail last: it is number 0."""
    model = models["internvl"]
    with compress(model, config("none")) as compression:
        answer(model, CASES["internvl"].prompt([2, "tall", 3, "small", 1]), steps=1)
    several, one = compression.last_selection
    assert several.tile.tolist() == [1] * 4 + [2] * 4 + [0] * 4 and one.tile.tolist() == [0] * 4
    assert several.row.tolist() == [0, 0, 1, 1] * 3 and several.column.tolist() == [0, 1] * 6


@torch.no_grad()
def test_pixel_shuffle_joins_the_patches_of_a_square(models):
    """Token (row, column) of a tile comes from patches 2 x 2 at twice its place."""
    inner = models["internvl"].model
    place = torch.arange(16.0).view(1, 4, 4, 1)
    shuffled = inner.pixel_shuffle(place, 0.5).view(4, 4)
    assert shuffled.sort(dim=1).values.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_places_of_onevision_tokens(models):
    """The whole image, then the joined grid with a newline token behind each row."""
    model = models["llava_onevision"]
    with compress(model, config("none")) as compression:
        answer(model, CASES["llava_onevision"].prompt([2, "tall", 3]), steps=1)
    (image,) = compression.last_selection
    newline = [False] * 16 + [False, False, True] * 8
    assert (image.tile == -1).tolist() == newline and image.saliency.isnan().tolist() == newline
    assert image.tile[:16].tolist() == [0] * 16 and set(image.tile[16:].tolist()) == {1, -1}
    assert image.row.tolist() == [i // 4 for i in range(16)] + [i // 3 for i in range(24)]
    assert image.column[16:].tolist() == [0, 1, -1] * 8
    newlines = image.features[image.tile == -1]
    assert torch.equal(newlines, model.model.image_newline.expand_as(newlines))


def test_a_large_onevision_grid_is_shrunk_with_its_saliency():
    """Above the limit, features are interpolated; so is the saliency, and the budget counts what is left."""
    case = CASES["llava_onevision"]
    model = case.model()
    model.config.vision_aspect_ratio = "anyres_max_2"
    inputs = case.prompt([4, "small", 5])
    inputs["image_sizes"] = torch.tensor([(112, 112)])
    inputs["pixel_values"] = torch.randn(1, 5, 3, 56, 56)
    tokens = 16 + 5 * 6  # 8 x 8 patches, divided by sqrt(64 / 32)
    ids = torch.tensor([[7, 8, *[IMAGE] * tokens, 9]])
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    stock = answer(model, inputs)
    with compress(model, config("none")) as compression:
        assert torch.equal(answer(model, inputs).sequences, stock.sequences)
    (image,) = compression.last_selection
    assert image.total == tokens and int((image.tile == -1).sum()) == 5
    grid = image.saliency[16:].view(5, 6)[:, :5]
    assert grid.isfinite().all() and len(grid.unique()) == 25
    with compress(model, config("adav", 7)) as compression:
        answer(model, inputs)
    assert len(compression.last_selection[0].indices) == 7 and (compression.last_selection[0].tile >= 0).all()


# --- settings of generate(), forward() and undoing ---------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_beams_and_sampling(models, name, settings):
    model, prompts = models[name], prompts_of(name)[:2]
    inputs = CASES[name].batch(prompts)

    def run(inputs):
        torch.manual_seed(0)
        return answer(model, inputs, output_logits=False, **settings).sequences

    stock = run(inputs)
    with compress(model, config("none")):
        assert torch.equal(run(inputs), stock)
    with compress(model, config()) as compression:
        together = run(inputs)
        assert together.shape == stock.shape and [len(kept.indices) for kept in compression.last_selection] == [K] * 3
        if "num_beams" in settings:
            assert torch.equal(together[:, -5:], torch.cat([run(one)[:, -5:] for one in prompts]))


@pytest.mark.parametrize("name", MASKING)
def test_forward_with_labels(models, name):
    model, inputs = models[name], CASES[name].prompt([2, "small", 3, "tall", 9])
    ids = inputs["input_ids"]
    length = ids.shape[1]
    labels = torch.where(torch.arange(length) >= length - 3, ids, -100)
    with compress(model, config("cls")) as compression:
        output = model(**inputs, labels=labels)
    stays = ids[0] != IMAGE
    for columns, selection in zip(
        places_of(ids[0], compression.last_selection), compression.last_selection, strict=True
    ):
        stays[columns[selection.indices]] = True
    whole = hidden_instead(model, inputs, ids, compression.last_selection)
    assert torch.allclose(output.logits[0], whole[stays], rtol=1e-4, atol=1e-4)
    loss = torch.nn.functional.cross_entropy(output.logits[0, -4:-1], ids[0, -3:])
    assert output.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    output.loss.backward()
    assert any(weight.grad is not None and weight.grad.any() for weight in tower_of(model).parameters())
    model.zero_grad(set_to_none=True)
    with compress(model, config("none")):
        assert torch.allclose(model(**inputs).logits, type(model).forward(model, **inputs).logits, atol=1e-4)


def state(model):
    return {
        name: (dict(vars(module)), dict(module._forward_hooks), dict(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_left_behind(models, name):
    model, inputs = models[name], CASES[name].prompt([4, "large", 5])
    stock = answer(model, inputs)
    before = state(model)
    with compress(model, config()) as compression:
        answer(model, inputs)
    assert state(model) == before and len(compression.last_selection[0].indices) == K
    broken = inputs | {"pixel_values": inputs["pixel_values"][..., :-1]}
    with pytest.raises((RuntimeError, UserError)), compress(model, config()):
        answer(model, broken)
    assert state(model) == before, "not even after an exception inside the tower"
    result = answer(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(result.logits, stock.logits, strict=True))


# --- how weights are held ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("way", ["offloaded", "LLM on disk"])
def test_weights_in_several_places(models, name, way, tmp_path):
    """accelerate's hooks bring the weights to each module as it is called: the same tokens as in memory."""
    inputs = CASES[name].batch(prompts_of(name))
    with compress(models[name], config()):
        expected = answer(models[name], inputs).sequences
    model = CASES[name].model()
    if way == "offloaded":
        cpu_offload(model, "cpu")
    else:
        parts = [part for part, _ in model.model.named_children()] + [
            part for part, _ in model.model.named_parameters(recurse=False)
        ]
        places = {f"model.{part}": "disk" if part == "language_model" else "cpu" for part in parts}
        dispatch_model(model, places | {"lm_head": "cpu"}, main_device="cpu", offload_dir=tmp_path)
        assert {weight.device.type for weight in model.parameters()} == {"cpu", "meta"}
    with compress(model, config()):
        assert torch.equal(answer(model, inputs).sequences, expected)
    with compress(model, config("fastv", layer=1)):
        cut = answer(model, inputs).sequences
    with compress(models[name], config("fastv", layer=1)):
        assert torch.equal(answer(models[name], inputs).sequences, cut)
    with pytest.raises(UserError, match="they are offloaded"), compress(model, config("pyramiddrop")):
        answer(model, inputs)


@pytest.mark.parametrize("name", KINDS)
def test_adapted_and_compiled_models(models, name):
    inputs = CASES[name].batch(prompts_of(name))
    with compress(models[name], config()):
        expected = answer(models[name], inputs).sequences
    model = CASES[name].model()
    with compress(torch.compile(model, backend="eager"), config()) as compression:
        assert torch.equal(answer(compression.model, inputs).sequences, expected)
    adapted = get_peft_model(
        model, LoraConfig(target_modules=["q_proj", "qkv"], r=2, init_lora_weights=False, task_type="CAUSAL_LM")
    )
    plain = answer(adapted, inputs).sequences
    with compress(adapted, config("none")):
        assert torch.equal(answer(adapted, inputs).sequences, plain)
    with compress(adapted, config()) as compression:
        kept = answer(adapted, inputs).sequences
    assert len(compression.last_selection) == 3 and not torch.equal(kept, plain)
    assert not torch.equal(kept[:, -5:], expected[:, -5:]), "the adapter changes the answers"


# --- what is refused ---------------------------------------------------------------------------------------------------


def test_every_family_is_tested():
    assert {"llava", "llava_next"} | set(CASES) == set(FAMILIES)


@pytest.mark.parametrize("name", CASES)
def test_refused(models, name):
    model, inputs = models[name], CASES[name].prompt([4, "large", 5])
    label = compress(model, config()).family.name
    for settings, message in (
        ({"method": "sparsevlm"}, f"(acts inside the LLM|has no position in the prompt;?).* allowed for {label}"),
        ({"vision_adaptive_attention": True, "method": "fastv"}, f'policy "avl", allowed for {label}.* is "full"'),
        ({"method": "visionzip"}, f"which {label} does not have"),
        ({"options": {"positions": "reindexed"}}, 'allowed .* "original"'),
        ({"options": {"detail_share": 0.5}}, '"options.detail_share" is 0.5, which rates the pixels'),
    ):
        with pytest.raises(UserError, match=message), compress(model, AdaVConfig(**settings)):
            pass
    longer = torch.cat([inputs["input_ids"], torch.tensor([[IMAGE]])], dim=1)
    torn = inputs["input_ids"].clone()
    torn[0, torch.nonzero(torn[0] == IMAGE)[0]] = 7
    torn[0, 0] = IMAGE
    cases = [
        ({"input_ids": longer, "attention_mask": torch.ones_like(longer)}, "placeholders"),
        ({"input_ids": torn}, "allowed is an unbroken run|allowed is a multiple of 4, the tokens of a tile"),
    ]
    for videos in compress(model, config()).family.videos:
        cases.append(({videos: inputs["pixel_values"]}, f"{videos} .* no videos"))
    for missing in compress(model, config()).family.image_inputs[1:]:
        cases.append(({missing: None}, f"without {missing}"))
    with compress(model, config()):
        for change, message in cases:
            given = {key: value for key, value in (inputs | change).items() if value is not None}
            given.pop("mm_token_type_ids", None)
            with pytest.raises(UserError, match=message) as error:
                model.generate(**given, max_new_tokens=2)
            assert "\n" not in str(error.value)
