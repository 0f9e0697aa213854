"""Every method inside the LLM on ragged batches and all layer shapes, against a plain recomputation and recorded logits.

A new method gets the whole matrix by adding its rows to CASES (dropping_cases.py).
"""

import copy
import functools
import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from dropping_cases import BY_BUDGET, CASES, GREEDY, IDS, IMAGE, LAYERS, OTHER_COUNTS, K, config, greedy
from dropping_reference import recompute
from eval_data import make_vqav2
from tiny_checkpoints import build_reference, make_image, save_llava_hf

from llava.common.errors import UserError
from llava.common.find_checkpoint import find_checkpoint
from llava.config import AdaVConfig
from llava.constants import IGNORE_INDEX
from llava.eval.benchmarks import BENCHMARKS
from llava.eval.runs.answer_shard import ShardAnswerer
from llava.eval.runs.run import Run
from llava.eval.runs.run_summary import summarise
from llava.eval.runs.work_order import Generation
from llava.methods.index import method_names
from llava.methods.inside_llm import DROPPERS, dropper_names, make_dropper
from llava.methods.inside_llm.fitprune_tables import Table, write_table
from llava.methods.inside_llm.plan import layer_mean
from llava.mm_utils import left_pad, process_images
from llava.model.builder import load_pretrained_model
from llava.model.decoding.layer_loop import ATTENTION

pytestmark = pytest.mark.filterwarnings("ignore:no FitPrune table was fitted")

# LLM shapes: Vicuna's, Yi's (a KV head for several heads), Mistral's (that, and a window).
SHAPES = {
    "vicuna": {"num_hidden_layers": LAYERS},
    "yi": {"num_hidden_layers": LAYERS, "num_key_value_heads": 1, "head_dim": 20},
    "mistral": {"text": "mistral", "num_hidden_layers": LAYERS, "sliding_window": 4096},
}
# Four rows: a long text, two images, text alone, and an image with nothing behind it.
PROMPTS = [
    [1, 9, 8, IMAGE, 10, 11, 12, 14, 15, 16],
    [1, IMAGE, 13, 7, IMAGE, 20, 21],
    [1, 9, 11, 8, 7],
    [1, 7, 9, 8, 7, 30, IMAGE],
]
SIZES = [(97, 61), (40, 30), (31, 90), (57, 57)]
IMAGES_OF_ROW = [slice(0, 1), slice(1, 3), slice(3, 3), slice(3, 4)]


@pytest.fixture(scope="module", params=SHAPES)
def loaded(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    save_llava_hf(build_reference("llava_next", seed=3, **SHAPES[request.param]), folder)
    _, model, processor, _ = load_pretrained_model(folder, device_map="cpu")
    return model, processor


@pytest.fixture(scope="module")
def vicuna(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vicuna")
    save_llava_hf(build_reference("llava_next", seed=3, **SHAPES["vicuna"]), folder)
    _, model, processor, _ = load_pretrained_model(folder, device_map="cpu")
    return model, processor


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


def prefill(model, prepared):
    with torch.no_grad():
        return model(
            inputs_embeds=prepared.inputs_embeds,
            attention_mask=prepared.attention_mask,
            position_ids=prepared.position_ids,
            dropping=prepared.dropping,
            use_cache=True,
        )


@functools.cache
def generated(model, processor, rows, case):
    """Greedy decoding of some of the four rows (a tuple) under a case by its id: what was prepared, tokens and logits."""
    name, options = CASES[IDS.index(case)]
    prepared = model.prepare(**batch(model, processor, rows), config=config(name, **options))
    return prepared, *greedy(model, prepared)[:2]


@functools.cache
def plain(model, processor, rows):
    """Greedy tokens and logits of some of the four rows (a tuple) without a method, and the tokens of the largest image."""
    prepared = model.prepare(**batch(model, processor, rows), config=config("none"))
    tokens, logits, _ = greedy(model, prepared)
    return tokens, logits, max(selection.total for row in prepared.selections for selection in row)


# --- the matrix ------------------------------------------------------------------------------------------------------


def test_every_method_has_its_rows():
    assert {name for name, _ in CASES} == set(DROPPERS) == set(dropper_names())
    assert set(dropper_names()) < set(method_names())


@pytest.mark.parametrize("name, options", BY_BUDGET, ids=str)
@pytest.mark.parametrize("rows", [(0,), (0, 1, 2, 3)], ids=["batch 1", "batch 4"])
def test_keep_all_is_the_plain_model(loaded, name, options, rows):
    model, processor = loaded
    inputs = batch(model, processor, rows)
    want, logits, largest = plain(model, processor, rows)
    for tokens in (largest, largest + 5):
        prepared = model.prepare(**inputs, config=config(name, tokens, **options))
        got, ours, _ = greedy(model, prepared)
        assert prepared.dropping is not None and torch.equal(got, want)
        torch.testing.assert_close(ours, logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", IDS)
def test_cached_decoding_equals_recomputation(loaded, case):
    """Batch of 1 and batch of 4: tokens, logits, and what lies in every layer's cache after prefill."""
    model, processor = loaded
    for rows in ((0,), (1,), (0, 1, 2, 3)):
        prepared, tokens, logits = generated(model, processor, rows, case)
        cache = prefill(model, prepared).past_key_values  # the same prompt again: nothing of the first run is left
        for b, length in enumerate(prepared.lengths):
            prompt = prepared.inputs_embeds[b, -length:]
            want, keys = recompute(model, prompt, prepared.dropping, b, tokens[b].tolist())
            torch.testing.assert_close(logits[b], want[:-1], atol=1e-4, rtol=0)
            assert want[:-1].argmax(dim=-1).tolist() == tokens[b].tolist()
            assert [key.shape[1] for key in keys] == prepared.dropping.cached(b)
            for layer, key in zip(cache.layers, keys, strict=True):
                torch.testing.assert_close(layer.keys[b, :, -key.shape[1] :], key, atol=1e-4, rtol=0)
        longest = [max(column) for column in zip(*(prepared.dropping.cached(b) for b in range(len(rows))), strict=True)]
        assert [layer.get_seq_length() for layer in cache.layers] == longest, "no layer holds more than its longest row"


@pytest.mark.parametrize("case", IDS)
def test_batch_of_four_is_four_batches_of_one(loaded, case):
    model, processor = loaded
    together, tokens, logits = generated(model, processor, (0, 1, 2, 3), case)
    for row in range(4):
        alone, own, own_logits = generated(model, processor, (row,), case)
        assert torch.equal(own[0], tokens[row])
        torch.testing.assert_close(own_logits[0], logits[row], atol=1e-4, rtol=0)
        assert len(alone.dropping.records[0]) == len(together.dropping.records[row]) == len(alone.selections[0])
        for image in range(len(alone.selections[0])):
            pairs = (alone.dropping.survivors(0, image), together.dropping.survivors(row, image))
            assert all(torch.equal(one, other) for one, other in zip(*pairs, strict=True))


@pytest.mark.parametrize("name, options", CASES, ids=IDS)
def test_what_is_kept_is_what_the_schedule_says(vicuna, name, options):
    model, processor = vicuna
    prepared = model.prepare(**batch(model, processor), config=config(name, **options))
    prefill(model, prepared)
    dropping, dropper = prepared.dropping, make_dropper(name, **options)
    for row, selections in enumerate(prepared.selections):
        for image, selection in enumerate(selections):
            schedule = dropper.schedule(selection.total, K, LAYERS)
            assert schedule == dropping.schedule(row, image) and schedule[0].attention == selection.total
            after = dropping.survivors(row, image)
            cuts = dropper.cuts(selection.total, K, LAYERS)
            assert [len(now) for now in after] == [cut.keep + cut.made for cut in cuts]
            assert any(cut.made for cut in cuts) or all((now >= 0).all() for now in after)
            real = after[-1][after[-1] >= 0]
            assert (real[1:] > real[:-1]).all(), "in order and distinct"
            assert len(after[-1]) == dropping.left(row, image) <= schedule[-1].attention
            if not OTHER_COUNTS & set(options):
                assert len(after[-1]) == K, "requested is kept"
            ends = row == 3
            assert not ends or after[-1][-1] == selection.total - 1, "the slot that the answer is read from stays"


@pytest.mark.parametrize("name, options", CASES, ids=IDS)
def test_every_logit_is_a_number_in_half_precision_too(vicuna, name, options):
    model, processor = vicuna
    for dtype in (torch.float32, torch.bfloat16):
        model = copy.deepcopy(model).to(dtype)  # rounding weights and buffers is for this test alone
        prepared = model.prepare(**batch(model, processor), config=config(name, **options))
        out = prefill(model, prepared)
        assert out.logits.isfinite().all(), "padding included"
        assert all(layer.keys.isfinite().all() for layer in out.past_key_values.layers)


@pytest.mark.parametrize("name, options", CASES, ids=IDS)
def test_a_plain_forward_drops_as_well(vicuna, name, options):
    model, processor = vicuna
    inputs = batch(model, processor, [0])
    labels = torch.where(inputs["input_ids"] == IMAGE, IGNORE_INDEX, inputs["input_ids"])
    # What is to be learnt is no question: methods that read the question see as little of it here as there.
    prepared = model.prepare(**inputs, labels=labels, config=config(name, **options))
    want = prefill(model, prepared).logits
    model.adav_config = config(name, **options)
    try:
        with torch.no_grad():
            out = model(**inputs, labels=labels)
    finally:
        model.adav_config = AdaVConfig(method="none")
    assert torch.equal(out.logits, want) and want.shape[1] == len(prepared.dropping.left_of_prompt(0))
    # The loss is that of the text that follows the image, and of that before it: no text is ever dropped.
    text = [token for token in PROMPTS[0] if token != IMAGE]
    before, after = text[:3], text[3:]
    picked = [*range(len(before) - 1), *range(want.shape[1] - len(after) - 1, want.shape[1] - 1)]
    loss = torch.nn.functional.cross_entropy(want[0, picked], torch.tensor([*before[1:], *after]))
    torch.testing.assert_close(out.loss, loss)


@pytest.mark.parametrize("name, options", CASES, ids=IDS)
def test_beam_search_repeats_rows(vicuna, name, options):
    """Two beams of which transformers reorders the caches: each row's survivors are its own under all its beams."""
    model, processor = vicuna
    beams = GREEDY | {"num_beams": 2}
    together = model.generate(**batch(model, processor), config=config(name, **options), **beams)
    chosen = model.last_selection
    for row in range(4):
        alone = model.generate(**batch(model, processor, [row]), config=config(name, **options), **beams)
        assert torch.equal(alone[0], together[row])
        for own, theirs in zip(model.last_selection, chosen[IMAGES_OF_ROW[row]], strict=True):
            pairs = zip(own.report["survivors"], theirs.report["survivors"], strict=True)
            assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("name, options", CASES, ids=IDS)
def test_steps_by_hand(vicuna, name, options):
    """Cached steps without generate, of one token and of three at once: positions come from the request's state."""
    model, processor = vicuna
    prepared = model.prepare(**batch(model, processor), config=config(name, **options))
    cache = prefill(model, prepared).past_key_values
    steps = [torch.tensor([[5], [6], [7], [8]]), torch.tensor([[9, 10, 11]] * 4)]
    logits = []
    with torch.no_grad():
        for step in steps:
            logits.append(model(input_ids=step, past_key_values=cache, dropping=prepared.dropping).logits)
    for b, length in enumerate(prepared.lengths):
        tokens = [5 + b, 9, 10, 11]
        want, _ = recompute(model, prepared.inputs_embeds[b, -length:], prepared.dropping, b, tokens)
        torch.testing.assert_close(torch.cat(logits, dim=1)[b], want[1:], atol=1e-4, rtol=0)


def naive_dart(norms, states, start, count, text, keep, last_stays):
    """DART with plain loops: the slots [keep] of an image that stay."""
    image, words = list(range(start, start + count - last_stays)), list(text)
    own = sorted(image, key=lambda slot: -norms[slot])[: min(4, keep - last_stays)]
    pivots = own + sorted(words, key=lambda slot: -norms[slot])[:4]
    kept, rest = [*own, *([start + count - 1] if last_stays else [])], keep - last_stays - len(own)
    for nth, pivot in enumerate(pivots):
        share = rest // len(pivots) + (nth < rest % len(pivots))
        left = [slot for slot in image if slot not in kept]
        cosine = {slot: torch.cosine_similarity(states[pivot], states[slot], dim=0) for slot in left}
        kept += sorted(left, key=lambda slot: float(cosine[slot]))[:share]
    return sorted(slot - start for slot in kept)


def output_of(model, layer, embeds):
    """Hidden states [1, S, D] after a layer, in transformers' own loop."""
    found = []
    hook = model.model.layers[layer].register_forward_hook(lambda *args: found.append(args[2]))
    model.model(inputs_embeds=embeds, use_cache=False)
    hook.remove()
    return found[0]


@pytest.mark.parametrize("layer", [2, 5])
def test_dart_reads_the_keys_and_normed_states_of_its_layer(loaded, layer):
    """Its choice in the batch, against keys and states that transformers' own loop gives for each row alone."""
    model, processor = loaded
    prepared = model.prepare(**batch(model, processor), config=config("dart", 13, layer=layer))
    prefill(model, prepared)
    for row, length in enumerate(prepared.lengths):
        with torch.no_grad():
            out = model.model(
                inputs_embeds=prepared.inputs_embeds[row : row + 1, -length:], use_cache=True
            ).past_key_values
            normed = model.model.norm(output_of(model, layer - 1, prepared.inputs_embeds[row : row + 1, -length:]))[0]
        heads = model.config.num_attention_heads
        keys = out.layers[layer - 1].keys[0]
        norms = keys.repeat_interleave(heads // len(keys), dim=0).abs().sum(dim=(0, 2)).tolist()
        prompt = prepared.dropping.prompts[row]
        for image, (start, count) in enumerate(prompt.images):
            ends = start + count == length
            want = naive_dart(norms, normed, start, count, prompt.text[image].tolist(), 13, ends)
            assert prepared.dropping.records[row][image][0].kept.tolist() == want


# --- recorded logits -------------------------------------------------------------------------------------------------
REFERENCE = Path(__file__).parents[1] / "data" / "drop_public"
RECORDED = {
    "none": ("none", {}, 1),
    **{f"fitprune_{ratio}": ("fitprune", {"ratio": ratio}, 1) for ratio in (50, 60, 80, 90)},
    "sparsevlm_192": ("sparsevlm", {"keep": [300, 200, 110]}, 1),
    "sparsevlm_128": ("sparsevlm", {"keep": [303, 110, 36]}, 1),
    "sparsevlm_64": ("sparsevlm", {"keep": [66, 30, 17]}, 1),
    "fastv_2_144": ("fastv", {"layer": 2}, 144),
    "fastv_2_58": ("fastv", {}, 58),
    "fastv_3_29": ("fastv", {"layer": 3}, 29),
    "pyramiddrop": ("pyramiddrop", {}, 72),
    # The same settings by other names.
    "sparsevlm_192 by budget": ("sparsevlm", {}, 113),
    "sparsevlm_64 by budget": ("sparsevlm", {}, 18),
    "fitprune_80 by budget": ("fitprune", {}, 576 - 514),
    "pyramiddrop by shares": ("pyramiddrop", {"keep": [0.5, 0.25, 0.125]}, 1),
}


@pytest.fixture(scope="module")
def recorded():
    cases = np.load(REFERENCE / "cases.npz")
    _, model, _, _ = load_pretrained_model(REFERENCE, device_map="cpu")
    ids = torch.from_numpy(cases["input_ids"])
    return model, ids.masked_fill(ids == 4, IMAGE), torch.from_numpy(cases["pixel_values"]), cases


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_logits_of_public_code(recorded, name):
    """Prefill logits, cache lengths, first survivors and raters.

    At its second cut sparsevlm_64 has two clusters; there, states that are each other's nearest are exactly as dense,
    and a random jitter of the public code decides which counts as denser. Our fixed order is the one it drew.
    """
    model, ids, pixels, cases = recorded
    method, options, tokens = RECORDED[name]
    prepared = model.prepare(ids, pixels, config=config(method, tokens, **options))
    out = prefill(model, prepared)
    name = name.partition(" ")[0]
    logits = torch.from_numpy(cases[f"{name}_logits"])
    torch.testing.assert_close(out.logits[0, -1], logits, atol=1e-3, rtol=0)
    lengths = [layer.get_seq_length() for layer in out.past_key_values.layers]
    if f"{name}_cache" in cases:
        assert lengths == cases[f"{name}_cache"].tolist()
    if prepared.dropping:
        assert lengths == prepared.dropping.cached(0)
    for key in (f"{name}_kept", f"{name}_first_kept"):
        if key in cases:
            assert prepared.dropping.records[0][0][0].kept.tolist() == cases[key].tolist()
    if f"{name}_raters" in cases:
        prompt = prepared.dropping.prompts[0]
        start, count = prompt.images[0]
        row = prepared.inputs_embeds[0]
        raters = prepared.dropping.dropper.queries(row[start : start + count], row[prompt.text[0]])
        assert prompt.text[0].tolist() == list(range(start + count, prompt.length))
        assert raters.tolist() == cases[f"{name}_raters"].tolist()


# --- requests and their limits ---------------------------------------------------------------------------------------


def test_raters_and_text_queries_follow_text_scope(vicuna):
    """Which slots are read for each image: its text, other images left out; the prompt's last slot where it has none."""
    model, processor = vicuna
    prepared = model.prepare(**batch(model, processor), config=config("fitprune"))
    prompts = prepared.dropping.prompts
    first, second = (selection.total for selection in prepared.selections[1])
    assert prompts[1].images == [(1, first), (3 + first, second)]
    assert prompts[1].text[0].tolist() == [1 + first, 2 + first, 3 + first + second, 4 + first + second]
    assert prompts[1].text[1].tolist() == [3 + first + second, 4 + first + second]
    assert prompts[2].images == [] and prompts[3].text[0].tolist() == []
    model.turn_markers = ((20,),)
    try:
        prepared = model.prepare(**batch(model, processor), config=config("fitprune", text_scope="turn"))
    finally:
        model.turn_markers = ()
    # Row 1 without what follows token 20; what stands before an image cannot attend to it.
    assert [text.tolist() for text in prepared.dropping.prompts[1].text] == [[1 + first, 2 + first], []]


def test_options_are_checked_before_weights_are_loaded(tmp_path):
    folder = tmp_path / "checkpoint"
    save_llava_hf(build_reference("llava"), folder)
    (folder / "model.safetensors").write_bytes(b"no weights")
    for name, options, words in (
        ("fastv", {"layer": 3}, "options.layer is 3, but the LLM has 3 layers, so at most 2 is allowed"),
        ("fitprune", {"ratio": 65}, "options.ratio is 65"),
    ):
        with pytest.raises(UserError, match=words):
            load_pretrained_model(folder, config=config(name, **options), device_map="cpu")


def test_warnings_of_what_changes_nothing(tmp_path):
    save_llava_hf(build_reference("llava"), tmp_path)
    for name, options, words in (
        ("fastv", {"version": "2.0"}, 'options.version is set, but method "fastv"'),
        ("fastv", {"positions": "original"}, 'options.positions is set, but method "fastv"'),
        ("fitprune", {}, "no FitPrune table was fitted on an LLM of 3 layers of 48 and 80"),
    ):
        with pytest.warns(UserWarning, match=words):
            load_pretrained_model(tmp_path, config=config(name, **options), device_map="cpu")


def test_requests_that_the_loop_does_not_serve(vicuna):
    model, processor = vicuna
    inputs = batch(model, processor, [0])
    for more, words in (
        ({"cache_implementation": "static"}, "a cache of fixed size"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
    ):
        with pytest.raises(UserError, match=words):
            model.generate(**inputs, config=config("fastv"), **GREEDY, **more)
    prepared = model.prepare(**inputs, config=config("fastv"))
    with pytest.raises(UserError, match="got a batch of 1 x 1 tokens.*prefilled in one piece, with a cache"):
        model(input_ids=torch.tensor([[5]]), dropping=prepared.dropping)
    cache = prefill(model, prepared).past_key_values
    unused = model.prepare(**inputs, config=config("fastv")).dropping
    with pytest.raises(UserError, match="has not been prefilled"):
        model(input_ids=torch.tensor([[5]]), past_key_values=cache, dropping=unused)
    model.config._attn_implementation = "eager"
    try:
        with pytest.raises(UserError, match='was set to "eager"'):
            model.generate(prepared=prepared, **GREEDY)
    finally:
        model.config._attn_implementation = ATTENTION


def test_a_window_is_a_limit(tmp_path):
    save_llava_hf(build_reference("llava", text="mistral", sliding_window=24, num_hidden_layers=LAYERS), tmp_path)
    _, model, processor, _ = load_pretrained_model(tmp_path, device_map="cpu")
    pixels = process_images([make_image(40, 30)], processor, model.config)
    ids = torch.tensor([[1, IMAGE, 9, 10]])  # 3 + 16 tokens: five more fit into 24
    prepared = model.prepare(ids, pixels, config=config("fastv"))
    tokens, logits, _ = greedy(model, prepared, max_new_tokens=6)
    want, _ = recompute(model, prepared.inputs_embeds[0], prepared.dropping, 0, tokens[0].tolist())
    torch.testing.assert_close(logits[0], want[:-1], atol=1e-4, rtol=0)
    with pytest.raises(UserError, match="has reached 25 tokens.*at most 24 are allowed"):
        model.generate(prepared=prepared, **GREEDY | {"max_new_tokens": 7})


@pytest.mark.parametrize("name", DROPPERS)
def test_offloaded_layers(tmp_path, name):
    """Weights that lie elsewhere while their layer does not run: layers called whole do not mind, parts are refused."""
    from accelerate import cpu_offload

    save_llava_hf(build_reference("llava", num_hidden_layers=LAYERS), tmp_path)
    _, model, processor, _ = load_pretrained_model(tmp_path, device_map="cpu")
    pixels = process_images([make_image(40, 30)], processor, model.config)
    prepared = model.prepare(torch.tensor([[1, IMAGE, 9, 10]]), pixels, config=config(name))
    want, _, _ = greedy(model, prepared)
    for layer in model.model.layers:
        cpu_offload(layer, execution_device="cpu")
    if name in ("fastv", "sparsevlm", "dart"):
        assert torch.equal(greedy(model, prepared)[0], want)
    else:
        with pytest.raises(UserError, match="need its weights in memory"):
            greedy(model, prepared)


# --- through the evaluation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, options", CASES, ids=IDS)
def test_a_shard_measures_what_lies_in_the_cache(tmp_path, name, options):
    folder = save_llava_hf(build_reference("llava_next", num_hidden_layers=LAYERS), tmp_path / "checkpoint")
    data, checkpoint = make_vqav2(tmp_path / "data", 5, images=2), find_checkpoint(str(folder))
    setting = config(name, 9, **options)
    run = Run(BENCHMARKS["vqav2"](data, checkpoint), setting, checkpoint, Generation(5), tmp_path / "runs")
    assert run.folder.name.startswith(f"{name}-9-")
    run.shards.mkdir(parents=True)
    rows = {}
    for size in (1, 5):
        spec = replace(run.order(0, run.samples, size), answers=tmp_path / f"{size}.jsonl")
        shard = ShardAnswerer(spec)
        shard.run(spec, threading.Event())
        rows[size] = [json.loads(line) for line in spec.answers.read_text().splitlines()]
    for alone, together in zip(rows[1], rows[5], strict=True):
        for key in ("answer", "kept", "total", "layer_mean", "kv_bytes_live", "kv_bytes_predicted"):
            assert alone[key] == together[key]
        unused = (5 - alone["new_tokens"]) * LAYERS * shard.shape.kv_entry(4)  # room for what five new tokens feed back
        assert alone["kv_bytes_live"] == alone["kv_bytes_predicted"] == alone["kv_bytes_allocated"] - unused
    assert rows[1][-1]["kept"] == rows[1][-1]["layer_mean"] == [], "the last question has no image"
    dropper, report = make_dropper(name, **options), summarise(rows[5])
    schedules = [dropper.schedule(row["total"][0], 9, LAYERS) for row in rows[5][:-1]]
    tokens = report["vision_tokens_per_image"]
    assert tokens["layer_mean"] == pytest.approx(sum(map(layer_mean, schedules)) / 4, abs=1e-3)
    assert (
        tokens["after"]
        == sum(schedule[-1].mlp if dropper.place == "inside" else schedule[-1].attention for schedule in schedules) / 4
    )
    assert tokens["after"] < tokens["layer_mean"] < tokens["before"]


def test_the_table_is_part_of_what_a_run_is(tmp_path):
    folder = save_llava_hf(build_reference("llava"), tmp_path / "checkpoint")
    benchmark = BENCHMARKS["vqav2"](make_vqav2(tmp_path / "data", 3), find_checkpoint(str(folder)))
    path, names = tmp_path / "table.json", set()
    for drops in ((4, 3, 1), (3, 4, 1)):
        path.unlink(missing_ok=True)
        write_table(path, Table("tiny", 50.0, 16, (3, 48, 80), drops), "here")
        setting = config("fitprune", table=str(path))
        names.add(Run(benchmark, setting, benchmark.checkpoint, Generation(5), tmp_path).folder.name)
    assert len(names) == 2
