"""compress() on transformers' LLaVA classes gives what our own model gives on the same files, and leaves nothing behind.

The prompts and pixels are those of transformers' processors on the one side, those of our own preprocessing on the other.
Two checks do not need our model: under `method: none` everything equals the transformers model itself.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field

import pytest
import tiny_checkpoints as tiny
import torch
from accelerate import dispatch_model
from cache_cases import CASES, FILTER, setting
from dropping_cases import CASES as DROPPING
from matrices import one_of_each
from tiny_checkpoints import QUESTIONS, make_image
from tiny_clip import save_clip
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    StoppingCriteria,
    TextStreamer,
)

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.integrations.transformers import FAMILIES, compress
from llava.methods.before_llm import SELECTORS
from llava.methods.inside_llm import DROPPERS
from llava.mm_utils import left_pad, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model

CLASSES = {
    "llava": (LlavaForConditionalGeneration, LlavaProcessor, CLIPImageProcessorPil),
    "llava_next": (LlavaNextForConditionalGeneration, LlavaNextProcessor, LlavaNextImageProcessorPil),
}
# name -> class, LLM, and a seed under which answers are no mere repetition.
MODELS = {"1.5": ("llava", "llama", 4), "1.6": ("llava_next", "llama", 4), "1.6 mistral": ("llava_next", "mistral", 2)}
K = 5
STEPS = 12
GREEDY = {"do_sample": False, "max_new_tokens": STEPS, "min_new_tokens": STEPS}
SIZES = [(97, 61), (171, 43), (31, 87), (55, 107), (103, 97)]
IMAGES = [make_image(*size, seed=i) for i, size in enumerate(SIZES)]


def ask(question, images=1):
    return f"A chat. USER: {'<image>' * images}\n{question} ASSISTANT:"


# (prompt, its images): one row; and a batch of different lengths, tile counts and numbers of images.
ALONE = [(ask(QUESTIONS[0]), IMAGES[:1])]
BATCH = [
    (ask(QUESTIONS[1]), IMAGES[:1]),
    ("USER: <image>\nand <image>\nWhat colour is the shape? ASSISTANT:", IMAGES[1:3]),
    ("USER: How many digits? ASSISTANT:", []),
    (ask(QUESTIONS[2], images=2), IMAGES[3:]),
]

ROWS = {"alone": ALONE, "batch": BATCH}
# Each model and each kind of rows; the caches meet BATCH on 1.5 too.
PLACES = one_of_each(MODELS, ROWS, {("1.5", "alone"), ("1.6", "batch"), ("1.6 mistral", "batch")})
FRONTS = one_of_each(
    ("1.5", "1.6"),
    ("adav", "sparsevlm", "adav and filter"),
    {("1.5", "sparsevlm"), ("1.6", "adav"), ("1.6", "adav and filter")},
)


@dataclass(eq=False)
class Pair:
    """A transformers model with its processor, and our model from the same folder."""

    stock: object
    processor: object
    fork: object
    tokenizer: object
    image_processor: object
    made: dict = field(default_factory=dict)

    def once(self, make, rows, **options):
        """What `make` gives for these rows, made when first asked for."""
        key = make.__name__, str(options), *((text, *map(id, images)) for text, images in rows)
        if key not in self.made:
            self.made[key] = make(rows, **options), rows  # rows: an id is that of an image that lives
        return self.made[key][0]

    def inputs(self, rows):
        return dict(self.once(self._inputs, rows))

    def _inputs(self, rows):
        images = [images for _, images in rows if images]
        texts = [text for text, _ in rows]
        return self.processor(images=images or None, text=texts, padding=True, return_tensors="pt")

    def ours(self, rows):
        return dict(self.once(self._ours, rows))

    def _ours(self, rows):
        ids = [tokenizer_image_token(text, self.tokenizer, return_tensors="pt") for text, _ in rows]
        input_ids, mask = left_pad(ids, self.fork.config.pad_token_id)
        images = [image for _, images in rows for image in images]
        batch = {"input_ids": input_ids, "attention_mask": mask}
        if images:
            batch["images"] = process_images(images, self.image_processor, self.fork.config)
        if self.fork.config.image_aspect_ratio == "anyres":
            batch["image_sizes"] = [image.size for image in images]
        return batch

    def plain(self, rows):
        """New tokens of the model without compress()."""
        return self.once(self.whole, rows)[:, self.inputs(rows)["input_ids"].shape[1] :].tolist()

    def whole(self, rows, setup=None, **keys):
        """Prompts and new tokens of the model, under compress() with the configuration `setup` if there is one."""
        with compress(self.stock, setup) if setup else nullcontext():
            return self.stock.generate(**self.inputs(rows), **GREEDY, **keys)

    def check(self, rows, config, processor=None, **generation):
        """New tokens [B, T] and the selections of compress(); both are those of our model."""
        generation = GREEDY | generation
        inputs = self.inputs(rows)
        torch.manual_seed(0)
        expected = self.fork.generate(**self.ours(rows), config=config, **generation)
        torch.manual_seed(0)
        with compress(self.stock, config, processor=processor) as compression:
            found = self.stock.generate(**inputs, **generation)
        prompt = inputs["input_ids"]
        assert torch.equal(found[:, : prompt.shape[1]], prompt.repeat_interleave(len(found) // len(prompt), dim=0))
        assert found[:, prompt.shape[1] :].tolist() == expected.tolist()
        for mine, theirs in zip(compression.last_selection, self.fork.last_selection, strict=True):
            assert torch.equal(mine.indices, theirs.indices)
            assert str(mine.report.get("survivors")) == str(theirs.report.get("survivors"))
        return found[:, prompt.shape[1] :], compression.last_selection


def build(folder, kind, text, seed=0):
    tiny.save_llava_hf(tiny.build_reference(kind, text, seed=seed), folder)
    model_class, processor_class, image_processor_class = CLASSES[kind]
    words = AutoTokenizer.from_pretrained(folder, padding_side="left")
    settings = {"patch_size": tiny.PATCH, "num_additional_image_tokens": 1, "image_token": "<image>"}
    processor = processor_class(
        image_processor_class.from_pretrained(folder), words, vision_feature_select_strategy="default", **settings
    )
    tokenizer, fork, image_processor, _ = load_pretrained_model(folder, device_map="cpu")
    return Pair(model_class.from_pretrained(folder).eval(), processor, fork, tokenizer, image_processor)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Name of MODELS -> Pair, built when first asked for."""
    built = {}

    def get(name):
        if name not in built:
            built[name] = build(tmp_path_factory.mktemp("pair"), *MODELS[name])
        return built[name]

    return get


@pytest.fixture(scope="module", params=["1.5", "1.6"])
def pair(request, pairs):
    return pairs(request.param)


def config(method="adav", tokens=K, options=None, **keys):
    return AdaVConfig(method=method, overall_tokens=tokens, options=options or {}, **keys)


def traces(model):
    """All that hangs on a model and its parts, by identity: attributes, hooks, parameters and where they lie."""
    attributes = {
        (name, key): id(value) if not isinstance(value, dict) else {k: id(v) for k, v in value.items()}
        for name, module in model.named_modules()
        for key, value in vars(module).items()
    }
    places = {name: (id(weight), weight.data_ptr(), weight.requires_grad) for name, weight in model.named_parameters()}
    settings = (repr(model.config), repr(model.generation_config), model.config._attn_implementation)
    return attributes, places, settings, [type(m) for m in model.modules()], [m.training for m in model.modules()]


# ------------------------------------------------------------------------------------------------- same as our model
@pytest.mark.parametrize("method", sorted(SELECTORS))
@pytest.mark.parametrize("name, kind", PLACES)
def test_every_selector(pairs, name, method, kind):
    words, rows = SELECTORS[method].words is not None, ROWS[kind]
    tokens, kept = pairs(name).check(rows, config(method), processor=pairs(name).processor if words else None)
    assert len(kept) == sum(len(images) for _, images in rows)
    if method == "downsample":
        assert all(0 < len(one.indices) <= K for one in kept)
    elif method not in ("none", "no_image"):
        assert [len(one.indices) for one in kept] == [K] * len(kept)
        assert tokens.tolist() != pairs(name).plain(rows)


@pytest.mark.parametrize("method, options", DROPPING, ids=str)
@pytest.mark.parametrize("name, kind", PLACES)
def test_every_dropper(pairs, name, method, options, kind):
    rows = ROWS[kind]
    options = {"keep": [9, 7, 6]} if isinstance(options.get("keep", [0.5])[0], int) else options
    if options.get("layer"):
        options = {"layer": 1}  # of three
    tokens, kept = pairs(name).check(rows, config(method, options=options))
    assert all(one.report["survivors"] for one in kept)
    assert tokens.tolist() != pairs(name).plain(rows)


def test_no_dropper_is_left_out():
    assert {method for method, _ in DROPPING} == set(DROPPERS)


@pytest.mark.parametrize("name, front", FRONTS)
@pytest.mark.parametrize("case", CASES)
def test_every_cache(pairs, case, name, front):
    pairs(name).check(
        BATCH, setting(case, front, tokens=6, **({"prefill_filter_layer": 1} if "filter" in front else {}))
    )


@pytest.mark.parametrize("case", ["published", "h2o"])
def test_caches_on_grouped_heads(pairs, case):
    for front in ("none", "adav, original positions", "visionzip", "fastv", "pyramiddrop", "filter", "no_image"):
        pairs("1.6 mistral").check(BATCH, setting(case, front, tokens=4))


def test_settings_of_the_path(pair):
    rows = [("USER: <image>\nYes? ASSISTANT: No </s>USER: two red circle ASSISTANT:", IMAGES[:1]), BATCH[1]]
    after, _ = pair.check(rows, config("t2i"))
    original, _ = pair.check(rows, config("t2i", options={"positions": "original"}))
    turn = config("t2i", options={"text_scope": "turn"})
    chosen = pair.check(rows, turn, processor=pair.processor)[1]
    assert (
        pair.check(rows, turn, processor=pair.processor.tokenizer)[1][0].indices.tolist() == chosen[0].indices.tolist()
    )
    assert chosen[0].indices.tolist() != pair.check(rows, config("t2i"))[1][0].indices.tolist()
    assert after.tolist() != original.tolist()
    pair.check(rows, config("adav", **FILTER))


def test_a_text_tower_beside_the_model(pair, tmp_path):
    save_clip(tmp_path)
    options = {"text_tower": str(tmp_path)}
    pair.check(BATCH, config("cdpruner", options=options), processor=pair.processor)


def test_sampling_and_several_answers(pair):
    sampling = {"do_sample": True, "temperature": 1.4, "top_p": 0.95}
    one, _ = pair.check(BATCH, config(), **sampling)
    assert one.tolist() != pair.check(BATCH, config())[0].tolist()
    four, _ = pair.check(BATCH, setting("published", "adav"), num_return_sequences=3, **sampling)
    assert four.shape == (3 * len(BATCH), STEPS)
    pair.check(BATCH, config(), num_beams=3)


@pytest.mark.parametrize("size", [1, 4, 7, 1000])
def test_prefill_in_chunks(pair, size):
    """As in transformers, chunks of any size give the same tokens; with method none those of the model itself."""
    chunks = GREEDY | {"prefill_chunk_size": size}
    for rows, keys in ((ALONE, {}), (BATCH, {}), (BATCH, {"num_beams": 2})):
        inputs = pair.inputs(rows)
        plain, whole = (pair.once(pair.whole, rows, setup=setup, **keys) for setup in (None, config()))
        with compress(pair.stock, config("none")):
            assert torch.equal(pair.stock.generate(**inputs, **chunks, **keys), plain)
        with compress(pair.stock, config()):
            assert torch.equal(pair.stock.generate(**inputs, **chunks, **keys), whole)


def test_rows_that_end_and_text_alone(pair):
    free, _ = pair.check(BATCH, config())
    stop = free[0, 3].item()
    ended, _ = pair.check(BATCH, config(), eos_token_id=stop, min_new_tokens=None)
    assert ended[0, 4:].eq(pair.stock.generation_config.pad_token_id).all() and free.tolist() != ended.tolist()
    _, kept = pair.check([(question, []) for question in QUESTIONS], config())
    assert kept == []


def test_half_precision(tmp_path):
    both = build(tmp_path, "llava_next", "mistral", seed=3)
    both.stock.to(torch.bfloat16)
    both.fork.to(torch.bfloat16)
    both.check(BATCH, setting("published", "adav"))


def test_whatever_attention_the_model_runs_on(pairs):
    pairs("1.5").stock.set_attn_implementation("eager")
    try:
        pairs("1.5").check(BATCH, setting("published", "fastv"))
        assert pairs("1.5").stock.model.language_model.config._attn_implementation == "eager"
    finally:
        pairs("1.5").stock.set_attn_implementation("sdpa")


# ------------------------------------------------------------------------------- same as transformers, under `none`
class UntilTwice(StoppingCriteria):
    """Stops a row once its last token has been there before, in the prompt or since."""

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, :-1] == input_ids[:, -1:]).any(dim=1)


GENERATION = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "the prompt counts in repetitions": {"repetition_penalty": 1.7},
    "and in stopping": {"stopping_criteria": [UntilTwice()], "min_new_tokens": None},
    "length of prompt and answer": {"max_new_tokens": None, "min_new_tokens": None, "max_length": 9, "min_length": 8},
    "default length": {"max_new_tokens": None, "min_new_tokens": None},
    "sampled": {"do_sample": True, "temperature": 1.3},
}


@pytest.mark.parametrize("how", GENERATION)
@pytest.mark.parametrize("case", ["full", "eviction of nothing"])
def test_none_is_transformers_itself(pair, how, case):
    rows, generation = BATCH, GREEDY | GENERATION[how]
    keys = {"vision_adaptive_attention": True, "vision_adaptive_attention_rate": 0.0}
    keys |= {"vision_adaptive_attention_compute_rate": 0.0, "vision_adaptive_attention_update_interval": -1}
    if case != "full" and "num_beams" in generation:
        with compress(pair.stock, config("none", **keys)), pytest.raises(UserError, match="beam search, allowed are"):
            pair.stock.generate(**pair.inputs(rows), **generation)
        return
    inputs = pair.inputs(rows)
    lengths = {name: value + inputs["input_ids"].shape[1] for name, value in generation.items() if "_length" in name}
    generation |= lengths
    torch.manual_seed(1)
    expected = pair.stock.generate(**inputs, **generation)
    torch.manual_seed(1)
    with compress(pair.stock, config("none", **({} if case == "full" else keys))):
        assert torch.equal(pair.stock.generate(**inputs, **generation), expected)


def test_outputs_as_transformers_gives_them(pair):
    inputs, options = pair.inputs(ALONE), GREEDY | {"return_dict_in_generate": True, "output_logits": True}
    streamed = []

    class Streamer(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            streamed.append(text)

    expected = pair.stock.generate(**inputs, **options)
    ids = inputs.pop("input_ids")
    with compress(pair.stock, config("none")):
        found = pair.stock.generate(ids, None, streamer=Streamer(pair.tokenizer, skip_prompt=True), **inputs, **options)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.cat(found.logits), torch.cat(expected.logits), atol=1e-4, rtol=0)
    assert "".join(streamed).split() == pair.tokenizer.decode(found.sequences[0, ids.shape[1] :]).split()


# ------------------------------------------------------------------------------------------------------- forward
def test_forward_gives_logits_and_loss_of_what_is_left(pair):
    inputs, ours = pair.inputs(BATCH), pair.ours(BATCH)
    learnt = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    learnt[:, :-4] = -100
    labels = torch.full_like(ours["input_ids"], -100)
    labels[:, -4:] = learnt[:, -4:]
    for setup in (config("adav"), config("none"), config("fastv"), config("none", **FILTER)):
        pair.fork.adav_config = setup
        with torch.no_grad():
            expected, unlabelled = pair.fork(**ours, labels=labels), pair.fork(**ours)
        with compress(pair.stock, setup), torch.no_grad():
            found = pair.stock(**inputs, labels=learnt)
            last = pair.stock(**inputs, logits_to_keep=1)
        assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
        assert torch.equal(last.logits, unlabelled.logits[:, -1:]) and found.past_key_values is None
    pair.fork.adav_config = config("none")
    with torch.no_grad():
        plain = pair.stock(**inputs, labels=learnt)
        with compress(pair.stock, method="none"):
            real = inputs["attention_mask"].bool()
            same = pair.stock(**inputs, labels=learnt)
    torch.testing.assert_close(same.logits[real], plain.logits[real], atol=1e-4, rtol=0)
    torch.testing.assert_close(same.loss, plain.loss, atol=1e-5, rtol=0)


def test_a_compiled_model(pair):
    """torch.compile(model) does not try to compile what runs in the model's place."""
    inputs, compiled = pair.inputs(ALONE), torch.compile(pair.stock, backend="eager")
    with compress(compiled, config("adav")), torch.no_grad():
        assert torch.equal(compiled(**inputs).logits, pair.stock(**inputs).logits)
        assert torch.equal(compiled.generate(**inputs, **GREEDY), pair.stock.generate(**inputs, **GREEDY))


def test_gradients_reach_the_model(pair):
    inputs = pair.inputs(ALONE)
    with compress(pair.stock, config("adav")):
        pair.stock(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert pair.stock.model.multi_modal_projector.linear_2.weight.grad.abs().sum() > 0
    pair.stock.zero_grad(set_to_none=True)


# -------------------------------------------------------------------------------------------- nothing is left behind
def test_weights_are_shared_and_nothing_is_left(pair):
    inputs = pair.inputs(BATCH)
    before, expected = traces(pair.stock), pair.stock.generate(**inputs, **GREEDY)
    with compress(pair.stock, setting("published", "adav")) as compression:
        mine = {weight.data_ptr() for weight in pair.stock.parameters()}
        assert {weight.data_ptr() for weight in compression._twin.parameters()} <= mine
        assert not any(tensor.is_meta for tensor in compression._twin.buffers())
        assert pair.stock.generate(**inputs, **GREEDY).tolist() != expected.tolist()
        assert set(vars(pair.stock)) - {"generate", "forward"} == {name for part, name in before[0] if part == ""}
    assert traces(pair.stock) == before
    assert torch.equal(pair.stock.generate(**inputs, **GREEDY), expected)
    with pytest.raises(ZeroDivisionError), compression:
        assert pair.stock.generate(**inputs, **GREEDY).tolist() != expected.tolist()
        1 / 0  # noqa: B018
    assert traces(pair.stock) == before and len(compression.last_selection) == 5


def test_two_models_are_independent_and_one_is_compressed_once(pairs):
    first, second = pairs("1.5"), pairs("1.6")
    plain = [one.stock.generate(**one.inputs(ALONE), **GREEDY).tolist() for one in (first, second)]
    with compress(first.stock, config("no_image")) as outer:
        assert second.stock.generate(**second.inputs(ALONE), **GREEDY).tolist() == plain[1]
        with compress(second.stock, config("cls")) as inner:
            ours = [one.stock.generate(**one.inputs(ALONE), **GREEDY).tolist() for one in (first, second)]
            assert ours[0] != plain[0] and ours[1] != plain[1]
            before = traces(first.stock)
            for again in (compress(first.stock, config("cls")), outer):
                with pytest.raises(UserError, match="is under compress\\(\\) already: leave that block first"), again:
                    pass
            assert traces(first.stock) == before
        assert first.stock.generate(**first.inputs(ALONE), **GREEDY).tolist() == ours[0]
        assert len(outer.last_selection[0].indices) == 0 and len(inner.last_selection[0].indices) == K
    assert [one.stock.generate(**one.inputs(ALONE), **GREEDY).tolist() for one in (first, second)] == plain


def test_a_model_that_accelerate_has_placed(tmp_path):
    """Its forward is the instance's own already; that one comes back."""
    both = build(tmp_path, "llava_next", "llama")
    both.stock = dispatch_model(both.stock, {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert "forward" in vars(both.stock)
    before = traces(both.stock)
    both.check(BATCH, setting("published", "adav"))
    assert traces(both.stock) == before


def test_adapters_of_the_model_are_part_of_it(pairs, tmp_path):
    from peft import LoraConfig, inject_adapter_in_model

    both = build(tmp_path, "llava", "llama")
    plain = both.stock.generate(**both.inputs(BATCH), **GREEDY)
    targets = r".*language_model.*(q_proj|down_proj)|.*vision_tower.*v_proj|.*linear_2"
    torch.manual_seed(0)
    adapted = inject_adapter_in_model(LoraConfig(target_modules=targets, init_lora_weights=False), both.stock)
    expected = adapted.generate(**both.inputs(BATCH), **GREEDY)
    with compress(adapted, method="none"):
        assert torch.equal(adapted.generate(**both.inputs(BATCH), **GREEDY), expected)
    assert not torch.equal(plain, expected)


# --------------------------------------------------------------------------------------------------- configurations
def test_ways_to_say_what_is_wanted(pair, tmp_path, monkeypatch):
    file = tmp_path / "settings.json"
    file.write_text('{"method": "cls", "overall_tokens": 4}')
    monkeypatch.delenv("ADAV_CONFIG", raising=False)
    assert compress(pair.stock).config == AdaVConfig.load()
    assert compress(pair.stock, file).config == config("cls", 4)
    assert compress(pair.stock, str(file), overall_tokens=9).config == config("cls", 9)
    assert compress(pair.stock, config("cls", 4), method="mix").config == config("mix", 4)
    monkeypatch.setenv("ADAV_CONFIG", str(file))
    assert compress(pair.stock, method="mix").config == config("mix", 4)
    assert {"llava", "llava_next"} <= set(FAMILIES)
    with (
        pytest.warns(UserWarning, match="options.alpha is set, but"),
        compress(pair.stock, config(options={"alpha": 2})),
    ):
        pass


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"tokens": 4}, 'unknown key "tokens"'),
        ({"method": "best"}, 'the configuration: "method" is "best"'),
        ({"options": {"positions": "original"}, "method": "visionzip"}, "makes tokens that stood nowhere"),
        ({"options": {"text_scope": "turn"}}, 'options.text_scope is "turn", which needs words: pass'),
        ({"method": "cdpruner", "options": {"text_tower": "clip"}}, 'options.text_tower is "clip", which needs words'),
        ({"method": "mmtok"}, 'method "mmtok" reads the words of a question: pass'),
        ({"method": "fastv", "options": {"layer": 3}}, "options.layer"),
    ],
)
def test_configurations_that_cannot_be(pair, keys, words):
    before = traces(pair.stock)
    with pytest.raises(UserError, match=words), compress(pair.stock, config("cls", 4), **keys):
        pass
    assert traces(pair.stock) == before


def test_patches_with_fine_detail(pair):
    """Their detail comes from the pixels of the model's own processor."""
    _, selections = pair.check(BATCH, config("cls", 6, {"detail_share": 0.5}))
    assert all(selection.report["detail"].sum() == 3 for selection in selections)


def test_the_tile_rule_of_the_processor_is_the_only_one(pairs):
    for options in ({"anyres": "fastervlm"}, {"compat": "public"}):
        with (
            pytest.raises(UserError, match="cuts images its own way"),
            compress(pairs("1.6").stock, config(options=options)),
        ):
            pass
        pairs("1.5").check(BATCH, config(options=options))


def test_models_that_cannot_be(tmp_path, pairs):
    plain = tiny.plain_llm(tiny.build_reference())
    with pytest.raises(UserError, match='a LlamaForCausalLM of model_type "llama", allowed are transformers models of'):
        compress(plain)
    with pytest.raises(UserError, match="got a Linear of model_type"):
        compress(torch.nn.Linear(2, 2))
    for one, words in (
        (pairs("1.5").stock.model, "got a LlavaModel, allowed are LlavaForConditionalGeneration and"),
        (pairs("1.5").fork, 'model_type "llava_llama"'),
        (altered(lambda model: setattr(model.config, "vision_feature_layer", [-2, -1])), "allowed is one layer"),
        (
            altered(lambda model: setattr(model.config, "vision_feature_select_strategy", "full")),
            '"cls_patch", allowed',
        ),
        (
            altered(lambda model: model.model.language_model.layers[1].to("meta")),
            "cpu and meta, allowed under compress",
        ),
    ):
        with pytest.raises(UserError, match=words), compress(one, config()):
            pass


def altered(change):
    model = tiny.build_reference()
    change(model)
    return model


# ---------------------------------------------------------------------------------------------------- requests
def requests(pair):
    """(what is asked, the sentence that refuses it)."""
    inputs, two = pair.inputs(ALONE), pair.inputs(BATCH[1:2])
    short = {name: value[:, 4:] if name in ("input_ids", "attention_mask") else value for name, value in inputs.items()}
    cut = short | {"input_ids": torch.cat([inputs["input_ids"][:, :4], inputs["input_ids"][:, 8:]], dim=1)}
    words = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    first = pair.inputs([(ask("Yes?"), IMAGES[1:2])])
    many = two | {name: first[name] for name in words}
    pixels = two | {name: two[name][:1] for name in ("pixel_values", "image_sizes") if name in two}
    return [
        (cut, "row 0: image 0 has .* tokens, but its placeholder .* is repeated"),
        (words, "0 images came with prompts that have placeholders for more, in row 0"),
        (pixels, "1 images came with prompts that have placeholders for more, in row 0"),
        (many, "2 images came with prompts that have placeholders for 1"),
        ({"attention_mask": inputs["attention_mask"]}, "inputs or input_ids, but got neither"),
        (inputs | {"inputs": inputs["input_ids"]}, "inputs or input_ids, but got both"),
        (inputs | {"input_ids": inputs["input_ids"][0]}, "allowed is \\[rows, tokens\\]"),
        (inputs | {"attention_mask": torch.ones(1, 3)}, "attention_mask has shape"),
        (inputs | {"inputs_embeds": torch.zeros(1, 3, 48)}, "inputs_embeds does not go with compress"),
        (inputs | {"vision_feature_layer": -1}, "vision_feature_layer does not go with"),
        (inputs | {"prompt_lookup_num_tokens": 3}, "assisted generation \\(prompt lookup\\) does not"),
        (inputs | {"assistant_model": pair.fork}, "assistant_model does not go with compress"),
        (inputs | {"prefill_chunk_size": 0}, "prefill_chunk_size is 0, allowed is 1 or more"),
    ]


def test_requests_that_are_refused(pair):
    with compress(pair.stock, config()):
        for asked, words in requests(pair):
            with pytest.raises(UserError, match=words):
                pair.stock.generate(**asked, max_new_tokens=3)
        # The next one is answered all the same.
        assert pair.stock.generate(**pair.inputs(ALONE), **GREEDY).shape[0] == 1


def test_a_method_inside_the_llm_needs_whole_prompts(pair):
    words = "prefill_chunk_size is 4, which does not go with a method that drops"
    with compress(pair.stock, config("fastv")), pytest.raises(UserError, match=words):
        pair.stock.generate(**pair.inputs(ALONE), **GREEDY, prefill_chunk_size=4)


def test_a_forward_pass_takes_whole_prompts(pair):
    inputs = pair.inputs(ALONE)
    with compress(pair.stock, config()):
        with pytest.raises(UserError, match="forward\\(\\) leaves no cache, but use_cache is true"):
            pair.stock(**inputs, use_cache=True)
        with pytest.raises(UserError, match="forward\\(\\) needs input_ids"):
            pair.stock(inputs_embeds=torch.zeros(1, 3, 48))
