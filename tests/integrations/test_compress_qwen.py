"""compress() on a tiny random Qwen2.5-VL: saliency, positions, batches and undoing, against naive recomputation.

Nothing here says how well tokens are chosen: weights are random.
"""

import re
from dataclasses import dataclass

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DynamicCache, PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.integrations.transformers import compress, received_attention
from llava.integrations.transformers.prompts import Prompts
from llava.integrations.transformers.received_attention import QwenSaliency, mean_received
from llava.methods.before_llm import SELECTORS, Selector
from llava.methods.before_llm.base import take

IMAGE, VIDEO, START, END, PAD = 90, 91, 92, 93, 0
PATCH = 3 * 2 * 14 * 14
METHODS = (
    "adav",
    "t2i",
    "cls",
    "mix",
    "fastervlm",
    "divprune",
    "cdpruner",
    "holov",
    "adav_cover",
    "random",
    "no_image",
)
LARGE, TALL, SMALL = (1, 6, 10), (1, 10, 6), (1, 4, 4)  # patches; merged: 3 x 5, 5 x 3, 2 x 2, and windows are 2 x 2


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 100,
            "initializer_range": 0.3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]},
            "bos_token_id": 1,
            "eos_token_id": 99,
            "pad_token_id": PAD,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_heads": 2,
            "out_hidden_size": 48,
            "window_size": 56,
            "fullatt_block_indexes": [0, 2],
            "initializer_range": 0.3,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None  # answers of one length, whatever they are
    model.generation_config.pad_token_id = PAD
    return model


@pytest.fixture
def seen(monkeypatch):
    """What the method "spy" was asked: (image, text) each time. It keeps the first tokens."""
    asked = []

    @dataclass
    class Spy(Selector):
        def keep(self, image, text, budget):
            asked.append((image, text))
            return take(image, image.patches[:budget])

    monkeypatch.setitem(SELECTORS, "spy", Spy)
    return asked


def prompt(pieces, seed=0):
    """What the processor gives for one prompt. pieces: numbers of text tokens, and (1, h, w) for an image."""
    generator = torch.Generator().manual_seed(seed)
    ids, pixels, grid = [], [], []
    for piece in pieces:
        if isinstance(piece, int):
            ids += torch.randint(5, 80, (piece,), generator=generator).tolist()
        else:
            patches = piece[1] * piece[2]
            ids += [START, *[IMAGE] * (patches // 4), END]
            grid.append(piece)
            pixels.append(torch.randn(patches, PATCH, generator=generator))
    ids = torch.tensor([ids])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == IMAGE).int()}
    if grid:
        inputs |= {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.tensor(grid)}
    return inputs


def batch(prompts):
    """Prompts as one batch, padded left."""
    length = max(one["input_ids"].shape[1] for one in prompts)

    def padded(name):
        return torch.cat([torch.nn.functional.pad(one[name], (length - one[name].shape[1], 0)) for one in prompts])

    joined = {name: padded(name) for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    for name in ("pixel_values", "image_grid_thw"):
        joined[name] = torch.cat([one[name] for one in prompts if name in one])
    return joined


def answer(model, inputs, steps=6, **settings):
    """A whole result of generate(): sequences, logits of every step, cache."""
    settings = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True} | settings
    return model.generate(**inputs, max_new_tokens=steps, **settings)


PROMPTS = {
    "several images": [2, LARGE, 3, SMALL, 1, TALL, 4],
    "one image": [4, LARGE, 5],
    "image first": [LARGE, 3],
    "image last": [4, LARGE],
}


# --- saliency ---------------------------------------------------------------------------------------------------------


def naive_tower(tower, pixels, grid, block):
    """(features [N, D], column means [N] of `block`) of one image, patch by patch in the order of the pixels: windows are
    masks, and all weights are computed."""
    _, height, width = grid
    h, w = height // 2, width // 2
    place = [(2 * i + a, 2 * j + b) for i in range(h) for j in range(w) for a in range(2) for b in range(2)]
    row, column = (torch.tensor(side) for side in zip(*place, strict=True))
    same_window = (row // 4 == row[:, None] // 4) & (column // 4 == column[:, None] // 4)
    head = tower.blocks[0].attn.head_dim
    frequency = 1.0 / 10000 ** (torch.arange(0, head // 2, 2).float() / (head // 2))
    angle = torch.cat([row[:, None] * frequency, column[:, None] * frequency], dim=-1).repeat(1, 2)
    hidden, means = tower.patch_embed(pixels), None
    for number, layer in enumerate(tower.blocks):
        qkv = layer.attn.qkv(layer.norm1(hidden)).view(len(hidden), 3, -1, head)
        query, key, value = (qkv[:, i].transpose(0, 1) for i in range(3))
        query, key = (
            x * angle.cos() + torch.cat([-x[..., head // 2 :], x[..., : head // 2]], -1) * angle.sin()
            for x in (query, key)
        )
        scores = query @ key.mT / head**0.5
        if number not in tower.fullatt_block_indexes:
            scores = scores.masked_fill(~same_window, float("-inf"))
        weights = scores.softmax(dim=-1)
        if number == block:
            means = weights.mean(dim=(0, 1)).view(-1, 4).mean(dim=1)
        hidden = hidden + layer.attn.proj((weights @ value).transpose(0, 1).flatten(1))
        hidden = hidden + layer.mlp(layer.norm2(hidden))
    return tower.merger(hidden), means


@torch.no_grad()
def test_saliency_is_the_mean_attention_that_patches_receive(model):
    grids = [LARGE, SMALL, TALL, (1, 8, 8)]
    pixels = [torch.randn(h * w, PATCH) for _, h, w in grids]
    tower, grid = model.model.visual, torch.tensor(grids)
    with QwenSaliency(tower) as saliency:
        features = model.get_image_features(torch.cat(pixels), grid).pooler_output
    read = saliency.of(grid)
    for i in range(len(grids)):
        naive, means = naive_tower(tower, pixels[i], grids[i], block=2)
        assert torch.allclose(naive, features[i], atol=1e-4), "the naive tower is the tower"
        assert torch.allclose(means, read[i], rtol=1e-4, atol=0)
        assert read[i].sum().item() == pytest.approx(0.25), "a mean over four patches of a distribution over patches"
        assert read[i].max() > 1.1 * read[i].min()
        assert not torch.allclose(naive_tower(tower, pixels[i], grids[i], block=0)[1], read[i], rtol=1e-2)
    assert not tower.blocks[2].attn._forward_pre_hooks


def test_saliency_in_pieces(monkeypatch):
    query, key = torch.randn(37, 3, 8), torch.randn(37, 3, 8)
    whole = (torch.einsum("qhd,khd->hqk", query, key) * 0.5).softmax(-1).mean((0, 1))
    for entries in (1, 250, 1 << 20):
        monkeypatch.setattr(received_attention, "ENTRIES", entries)
        assert torch.allclose(mean_received(query, key, 0.5), whole, atol=1e-6)
    assert mean_received(query.bfloat16(), key.bfloat16(), 0.5).dtype == torch.float32


def test_selector_sees_the_image_as_it_lies(model, seen):
    """Rows, columns, features and saliency of each of several images, and the words asked about it."""
    inputs = prompt(PROMPTS["several images"])
    with compress(model, AdaVConfig(method="spy", overall_tokens=2)):
        answer(model, inputs)
    ids, words = inputs["input_ids"][0], model.get_input_embeddings().weight
    pixels = inputs["pixel_values"].split([60, 16, 60])
    texts = [ids[[*range(19, 22), 28, *range(46, 50)]], ids[[28, *range(46, 50)]], ids[46:50]]
    for (image, text), grid, patches, asked in zip(seen, (LARGE, SMALL, TALL), pixels, texts, strict=True):
        naive, means = naive_tower(model.model.visual, patches, grid, block=2)
        assert torch.allclose(image.features, naive, atol=1e-4)
        assert torch.allclose(image.saliency, means, rtol=1e-4)
        assert image.row.tolist() == [i for i in range(grid[1] // 2) for _ in range(grid[2] // 2)]
        assert image.column.tolist() == list(range(grid[2] // 2)) * (grid[1] // 2)
        assert torch.equal(text, words[asked]), "the text behind the image, without other images and their markers"
    assert len({image.key for image, _ in seen}) == 3


# --- positions --------------------------------------------------------------------------------------------------------


def columns_of(ids):
    """Per image of a prompt [S]: where its placeholders are."""
    starts = torch.nonzero(ids == START).flatten().tolist()
    ends = torch.nonzero(ids == END).flatten().tolist()
    return [torch.arange(start + 1, end) for start, end in zip(starts, ends, strict=True)]


@torch.no_grad()
def hidden_instead(model, inputs, sequence, selections):
    """[S + n, V] logits of the whole prompt and what came after it, tokens that were not kept hidden from all by a mask."""
    ids, size = inputs["input_ids"], sequence.shape[1]
    positions, _ = model.model.get_rope_index(ids, inputs["mm_token_type_ids"], inputs["image_grid_thw"])
    new = positions[:, :, -1:] + 1 + torch.arange(size - ids.shape[1])
    allowed = torch.ones(size, size, dtype=torch.bool).tril()
    for columns, selection in zip(columns_of(ids[0]), selections, strict=True):
        gone = set(range(len(columns))) - set(selection.indices.tolist())
        allowed[:, columns[sorted(gone)]] = False
    allowed.fill_diagonal_(True)  # what is hidden still sees itself: a row of -inf would be NaN
    mask = torch.zeros(size, size).masked_fill(~allowed, float("-inf"))[None, None]
    features = torch.cat(model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output)
    embeds = model.get_input_embeddings()(sequence)
    embeds[sequence == IMAGE] = features
    return model(
        inputs_embeds=embeds, position_ids=torch.cat([positions, new], -1), attention_mask={"full_attention": mask}
    ).logits[0]


@pytest.mark.parametrize(
    "method, shape",
    [(method, "several images") for method in METHODS] + [("adav", shape) for shape in list(PROMPTS)[1:]],
)
def test_dropping_is_hiding(model, method, shape):
    """Prefill and every decoding step give the logits of the whole sequence with the dropped tokens masked out."""
    inputs = prompt(PROMPTS[shape])
    with compress(model, AdaVConfig(method=method, overall_tokens=3)) as compression:
        result = answer(model, inputs)
    kept = [len(selection.indices) for selection in compression.last_selection]
    assert kept == [0 if method == "no_image" else 3] * len(inputs["image_grid_thw"])
    length = inputs["input_ids"].shape[1]
    assert torch.equal(result.sequences[:, :length], inputs["input_ids"])
    logits = hidden_instead(model, inputs, result.sequences, compression.last_selection)
    assert torch.allclose(torch.cat(result.logits), logits[length - 1 : -1], rtol=1e-4, atol=1e-4)
    dropped = int((inputs["input_ids"] == IMAGE).sum()) - sum(kept)
    assert result.past_key_values.get_seq_length() == length - dropped + 5
    assert all(len(layer.keys[0, 0]) == length - dropped + 5 for layer in result.past_key_values.layers)


def test_positions_matter_to_the_test_above(model, monkeypatch):
    inputs = prompt(PROMPTS["several images"])
    with compress(model, AdaVConfig(method="cls", overall_tokens=3)):
        result = answer(model, inputs)
        monkeypatch.setattr(Prompts, "positions", lambda self, whole: self.mask.cumsum(1).expand(4, -1, -1) - 1)
        reindexed = answer(model, inputs)
    assert not torch.allclose(reindexed.logits[0], result.logits[0], atol=1e-2)


def test_order_in_the_text_has_no_gaps(model):
    """Beside time, height and width goes a token's number; flash attention takes a gap there for the start of another text."""
    orders = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, _, named: orders.append(named["position_ids"][0]), with_kwargs=True
    )
    prompts = [prompt(PROMPTS["several images"]), prompt([3, LARGE, 2], seed=1)]
    with handle, compress(model, AdaVConfig(method="cls", overall_tokens=2)):
        answer(model, batch(prompts), steps=1)
    assert orders[0].tolist() == [list(range(22)), [0] * 13 + list(range(9))]


@torch.no_grad()
def test_going_on_by_hand_from_the_cache(model):
    """rope_deltas: forward() on the shortened cache counts positions on from the whole prompt."""
    inputs = prompt(PROMPTS["several images"])
    with compress(model, AdaVConfig(method="cls", overall_tokens=2)) as compression:
        result = answer(model, inputs)
        # Without a mask, as transformers' forward() wants it: it takes positions from the length of the cache.
        step = model(input_ids=result.sequences[:, -1:], past_key_values=result.past_key_values).logits[0, -1]
    longer = hidden_instead(model, inputs, result.sequences, compression.last_selection)
    assert torch.allclose(step, longer[-1], rtol=1e-4, atol=1e-4)


# --- batches and settings of generate ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ("adav", "divprune", "cdpruner", "random"))
def test_a_batch_gives_what_its_prompts_give(model, method):
    shapes = [[4, LARGE, 5], [2, SMALL, 3, TALL, 9], [7], [SMALL, 3], [3, LARGE]]
    prompts = [prompt(shape, seed) for seed, shape in enumerate(shapes)]
    with compress(model, AdaVConfig(method=method, overall_tokens=5)) as compression:
        together = answer(model, batch(prompts))
        selections = compression.last_selection
        alone = [(answer(model, one), compression.last_selection) for one in prompts]
    assert [s.indices.tolist() for s in selections] == [s.indices.tolist() for _, own in alone for s in own]
    for row, (result, _) in enumerate(alone):
        assert torch.equal(together.sequences[row, -6:], result.sequences[0, -6:])


def test_keeping_everything_is_the_stock_model(model):
    inputs = batch([prompt([4, LARGE, 5]), prompt([2, SMALL, 3, TALL, 9], 1), prompt([7], 2)])
    stock = answer(model, inputs)
    for config in (AdaVConfig(method="none"), AdaVConfig(method="adav", overall_tokens=15)):
        with compress(model, config) as compression:
            result = answer(model, inputs)
        assert torch.equal(result.sequences, stock.sequences)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(result.logits, stock.logits, strict=True))
        assert [len(s.indices) for s in compression.last_selection] == [s.total for s in compression.last_selection]
    with compress(model, AdaVConfig(method="adav", overall_tokens=4)):
        assert not torch.equal(answer(model, inputs).sequences, stock.sequences)
        text = {name: value for name, value in prompt([7], 2).items()}
        assert torch.equal(answer(model, text).sequences[0], stock.sequences[2, -13:]), "a prompt without images"


@pytest.mark.parametrize(
    "settings", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {"repetition_penalty": 1.5}]
)
def test_ways_to_generate(model, settings):
    prompts = [prompt([4, LARGE, 5]), prompt([2, SMALL, 3, TALL, 9], 1)]
    sampled = settings.get("do_sample")

    def run(inputs):
        torch.manual_seed(0)
        return answer(model, inputs, output_logits=False, **settings).sequences

    stock = run(batch(prompts))
    with compress(model, AdaVConfig(method="none")):
        assert torch.equal(run(batch(prompts)), stock)
    with compress(model, AdaVConfig(method="adav", overall_tokens=4)):
        together = run(batch(prompts))
        assert together.shape == stock.shape and not torch.equal(together, stock)
        if not sampled:
            alone = torch.cat([run(one)[:, -6:] for one in prompts])
            assert torch.equal(together[:, -6:], alone)


def test_lengths_and_caches_are_counted_as_without(model):
    inputs = prompt([4, LARGE, 5])
    length = inputs["input_ids"].shape[1]
    with compress(model, AdaVConfig(method="adav", overall_tokens=4)):
        expected = model.generate(**inputs, do_sample=False, max_new_tokens=7)
        assert torch.equal(model.generate(**inputs, do_sample=False, max_length=length + 7), expected)
        assert torch.equal(
            model.generate(inputs.pop("input_ids"), **inputs, do_sample=False, max_new_tokens=7), expected
        )
        inputs["input_ids"] = expected[:, :length]
        without = {name: value for name, value in inputs.items() if name != "attention_mask"}
        assert torch.equal(model.generate(**without, do_sample=False, max_new_tokens=7), expected)
        cache = DynamicCache()
        assert torch.equal(model.generate(**inputs, do_sample=False, max_new_tokens=7, past_key_values=cache), expected)
        assert cache.get_seq_length() == length - 15 + 4 + 6
        static = model.generate(
            **inputs, do_sample=False, max_new_tokens=7, cache_implementation="static", disable_compile=True
        )
        assert torch.equal(static, expected)


def test_half_precision(model):
    inputs = batch([prompt([4, LARGE, 5]), prompt([2, SMALL, 3, TALL, 9], 1)])
    half = Qwen2_5_VLForConditionalGeneration(model.config).bfloat16().eval()
    half.load_state_dict(model.state_dict())
    half.generation_config = model.generation_config
    with compress(half, AdaVConfig(method="adav", overall_tokens=4)) as compression:
        answer(half, inputs)
    assert [len(selection.indices) for selection in compression.last_selection] == [4, 4, 4]
    assert compression.last_selection[0].features.dtype == torch.bfloat16
    assert compression.last_selection[0].saliency.dtype == torch.float32


def test_forward_on_whole_prompts(model, seen):
    """Logits and loss of what is left; what is to be learnt is not shown to the selector; gradients pass."""
    prompts = [prompt(PROMPTS["several images"]), prompt([3, LARGE, 6], seed=1)]
    inputs = batch(prompts)
    labels = torch.where(torch.arange(50) >= 47, inputs["input_ids"], -100)
    with compress(model, AdaVConfig(method="spy", overall_tokens=2)) as compression:
        output = model(**inputs, labels=labels)
    left = [50 - 34 + 6, 26 - 15 + 2]
    assert output.logits.shape[:2] == (2, left[0]) and output.past_key_values is None
    kept = torch.ones(50, dtype=torch.bool)
    for columns in columns_of(prompts[0]["input_ids"][0]):
        kept[columns[2:]] = False
    whole = hidden_instead(model, prompts[0], prompts[0]["input_ids"], compression.last_selection[:3])
    assert torch.allclose(output.logits[0], whole[kept], rtol=1e-4, atol=1e-4)
    losses = torch.nn.functional.cross_entropy(output.logits[:, -4:-1].flatten(0, 1), labels[:, -3:].flatten())
    assert output.loss.item() == pytest.approx(losses.item(), rel=1e-5)
    words = model.get_input_embeddings().weight
    assert torch.equal(seen[-1][1], words[prompts[1]["input_ids"][0, -6:-3]]), "the question, without its answer"
    output.loss.backward()
    assert model.model.visual.merger.mlp[0].weight.grad.abs().sum() > 0
    model.zero_grad()
    with compress(model, AdaVConfig(method="none")):
        stock = type(model).forward(model, **inputs).logits
        assert torch.allclose(model(**inputs).logits, stock, atol=1e-5)
        with pytest.raises(UserError, match="use_cache"):
            model(**inputs, use_cache=True)
        text = inputs["input_ids"][:, -3:]
        assert torch.equal(model(input_ids=text).logits, type(model).forward(model, input_ids=text).logits)


# --- the words of a question ------------------------------------------------------------------------------------------


def chatml():
    words = ["<|im_start|>", "<|im_end|>", "user", "assistant", "\n"]
    vocabulary = {word: 80 + number for number, word in enumerate(words)} | {f"w{n}": n for n in range(80)} | {"?": 85}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    tokenizer.add_special_tokens(words[:2])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_text_of_the_turn(model, seen):
    im_start, im_end, user, assistant = range(80, 84)
    inputs = prompt([SMALL])
    image = inputs["input_ids"][0].tolist()
    ids = [
        im_start,
        user,
        *image,
        7,
        8,
        im_end,
        im_start,
        assistant,
        9,
        im_end,
        im_start,
        user,
        11,
        im_end,
        im_start,
        assistant,
    ]
    inputs["input_ids"] = torch.tensor([ids])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    config = AdaVConfig(method="spy", overall_tokens=2, options={"text_scope": "turn"})
    with compress(model, config, processor=chatml()):
        answer(model, inputs)
    words = model.get_input_embeddings().weight
    assert torch.equal(seen[0][1], words[[7, 8]])
    with pytest.raises(UserError, match="text_scope.*processor"), compress(model, config):
        pass


def test_the_question_steers_the_choice(model):
    one, other = prompt([4, LARGE, 5], seed=0), prompt([4, LARGE, 5], seed=0)
    other["input_ids"][0, -5:] = torch.tensor([70, 61, 52, 43, 34])
    with compress(model, AdaVConfig(method="t2i", overall_tokens=4)) as compression:
        chosen = []
        for inputs in (one, other):
            answer(model, inputs)
            chosen.append(compression.last_selection[0].indices.tolist())
    assert chosen[0] != chosen[1]


# --- undoing and refusing ---------------------------------------------------------------------------------------------


def state(model):
    return {
        name: (dict(vars(module)), dict(module._forward_hooks), dict(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }


def test_nothing_is_left_behind(model):
    inputs = prompt([4, LARGE, 5])
    stock = answer(model, inputs)
    before = state(model)
    compression = compress(model, AdaVConfig(method="adav", overall_tokens=4))
    assert state(model) == before, "nothing happens before the block"
    with compression:
        answer(model, inputs)
    assert state(model) == before
    assert len(compression.last_selection[0].indices) == 4, "the selection outlives the block"
    with pytest.raises(RuntimeError), compression:  # entered again
        answer(model, inputs | {"pixel_values": inputs["pixel_values"][:, :-1]})
    assert state(model) == before, "not even after an exception inside the tower"
    result = answer(model, inputs)
    assert torch.equal(result.sequences, stock.sequences)
    assert all(torch.equal(a, b) for a, b in zip(result.logits, stock.logits, strict=True))


def test_only_this_model(model):
    torch.manual_seed(3)
    other = Qwen2_5_VLForConditionalGeneration(model.config).eval()
    other.load_state_dict(model.state_dict())
    other.generation_config = model.generation_config
    inputs = prompt([4, LARGE, 5])
    expected = answer(other, inputs).sequences
    with compress(model, AdaVConfig(method="no_image")):
        assert torch.equal(answer(other, inputs).sequences, expected)
        assert not torch.equal(answer(model, inputs).sequences, expected)


REFUSED = {
    "sparsevlm": (dict(method="sparsevlm"), "merges dropped tokens"),
    "filter": (dict(prefill_filter_flag=True), "prefill_filter_flag"),
    "second stage": (dict(method="apet", options={"second_stage": True}), "options.second_stage"),
    "avl": (dict(vision_adaptive_attention=True), 'policy "avl"'),
    "h2o": (dict(all_use_h2o=True), 'policy "h2o"'),
    "visionzip": (dict(method="visionzip"), r"hidden and keys .*\[CLS\]"),
    "scope": (dict(method="scope"), r"hidden .*\[CLS\]"),
    "hiprune": (dict(method="hiprune"), r"received .*\[CLS\]"),
    "downsample": (dict(method="downsample"), "max_pixels"),
    "adav_zoom": (dict(method="adav_zoom"), "encodes only some crops"),
    "mmtok": (dict(method="mmtok"), r"hidden .*\[CLS\]"),
    "text tower": (dict(method="cdpruner", options={"text_tower": "x"}), "text_cosine"),
    "compat": (dict(options={"compat": "public"}), "options.compat"),
    "anyres": (dict(options={"anyres": "fastervlm"}), "options.anyres"),
    "positions": (dict(options={"positions": "reindexed"}), 'options.positions" is "reindexed".*"original"'),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_configurations(model, case):
    settings, message = REFUSED[case]
    before = state(model)
    with pytest.raises(UserError, match=message) as error, compress(model, AdaVConfig(**settings)):
        pass
    assert "\n" not in str(error.value) and re.search("allowed|does not have", str(error.value))
    assert state(model) == before


def test_original_positions_may_be_said_and_odd_options_are_named(model):
    inputs = prompt([4, LARGE, 5])
    config = AdaVConfig(method="cls", overall_tokens=4, options={"positions": "original"})
    with compress(model, config):
        said = answer(model, inputs)
    with compress(model, AdaVConfig(method="cls", overall_tokens=4)):
        assert torch.equal(answer(model, inputs).logits[0], said.logits[0])
    odd = AdaVConfig(method="cls", options={"min_share": 0.1})
    with pytest.warns(UserWarning, match="min_share"), compress(model, odd):
        pass


def test_refused_requests(model):
    inputs = prompt([4, LARGE, 5])
    cache = DynamicCache(config=model.config.text_config)
    cache.update(torch.zeros(1, 2, 3, 12), torch.zeros(1, 2, 3, 12), 0)
    fewer = inputs | {"image_grid_thw": torch.tensor([SMALL]), "pixel_values": inputs["pixel_values"][:16]}
    torn = batch([prompt([4, LARGE, 2]), prompt([4, LARGE, 2])])
    torn["image_grid_thw"] = torch.tensor([(1, 4, 10), (1, 8, 10)])
    cases = [
        (inputs | {"pixel_values_videos": inputs["pixel_values"]}, "pixel_values_videos .* no videos"),
        (
            inputs
            | {"image_grid_thw": torch.tensor([(2, 6, 10)]), "pixel_values": inputs["pixel_values"].repeat(2, 1)},
            "frames",
        ),
        (inputs | {"past_key_values": cache}, "past_key_values"),
        (inputs | {"use_cache": False}, "no KV cache"),
        (inputs | {"prefill_chunk_size": 8}, "chunks"),
        (inputs | {"prompt_lookup_num_tokens": 3}, "assisted"),
        (inputs | {"position_ids": torch.zeros(1, 26)}, "position_ids"),
        (fewer, "15 image placeholders.* 4 tokens"),
        (torn, "two prompts"),
        ({name: value for name, value in inputs.items() if name != "image_grid_thw"}, "image_grid_thw"),
    ]
    with compress(model, AdaVConfig(method="adav", overall_tokens=4)):
        before = state(model)
        for case, message in cases:
            with pytest.raises(UserError, match=message) as error:
                model.generate(**case, max_new_tokens=2)
            assert "\n" not in str(error.value)
        with pytest.raises(UserError, match="already"), compress(model, AdaVConfig()):
            pass
        assert state(model) == before
    with pytest.raises(UserError, match="Qwen2_5_VLModel"), compress(model.model, AdaVConfig()):
        pass
