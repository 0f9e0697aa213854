"""The generation engine: the tokens of generate() under every cache policy, sampling, stopping, streaming, no leak."""

import gc

import pytest
import torch
from matrices import one_of_each
from test_token_dropping import SHAPES as DEEP
from test_token_dropping import batch
from tiny_checkpoints import build_reference, save_llava_hf
from torch.utils._python_dispatch import TorchDispatchMode

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.model.builder import load_pretrained_model
from llava.model.decoding import prefill as prefill_module
from llava.model.decoding.decode_step import Stepper
from llava.model.decoding.engine import Engine
from llava.model.decoding.prefill import StaticPrefill, StaticPrefills
from llava.model.decoding.sampling import Chooser, Sampling
from llava.model.decoding.text_stream import TextStream
from llava.model.graphs import Store

# Half as deep as the dropping tests need: a policy is the same in every layer.
SHAPES = {name: shape | {"num_hidden_layers": 4} for name, shape in DEEP.items()}
AVL = {"vision_adaptive_attention": True, "vision_adaptive_attention_rate": 0.3}
TEXT = {"text_pruning_flag": True, "text_pruning_rate": 0.4, "text_init_cache": 6}
SETTINGS = {
    "full": {"method": "none"},
    "full behind adav": {"method": "adav"},
    "full behind fastv": {"method": "fastv"},
    "full behind pyramiddrop": {"method": "pyramiddrop"},
    "h2o of A-VL": {"method": "none", "all_use_h2o": True},
    "h2o of the paper": {"method": "none", "h2o_heavy_share": 0.2, "h2o_recent_share": 0.3},
    "avl, evict": {"method": "none", **AVL, "vision_adaptive_attention_update_interval": -1},
    "avl, core": {"method": "none", **AVL, "vision_adaptive_attention_update_interval": 3},
    "avl and text": {"method": "adav", **AVL, **TEXT, "text_rule": "history"},
    "avl, filter": {"method": "none", **AVL, **TEXT, "prefill_filter_flag": True, "prefill_filter_rate": 0.2},
    "text alone": {"method": "cls", **TEXT, "text_rule": "direct"},
}


@pytest.fixture(scope="module", params=["vicuna", "yi"])
def loaded(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    save_llava_hf(build_reference("llava_next", seed=3, **SHAPES[request.param]), folder)
    _, model, processor, _ = load_pretrained_model(folder, device_map="cpu")
    model.generation_config.eos_token_id = None
    return model, processor


def prepared_for(loaded, rows, **setting):
    model, processor = loaded
    settings = {"overall_tokens": 12} | setting
    return model.prepare(**batch(model, processor, rows), config=AdaVConfig(**settings))


def tokens_of(generated):
    return [answer.tokens for answer in generated.answers]


@pytest.mark.parametrize("new", [40, pytest.param(128, marks=pytest.mark.long)])
# The next test has all batches of all shapes.
@pytest.mark.parametrize(
    "loaded, rows", one_of_each(("vicuna", "yi"), (1, 4), {("vicuna", 1), ("yi", 4)}), indirect=["loaded"]
)
@pytest.mark.parametrize("name", SETTINGS)
def test_engine_is_generate(loaded, name, rows, new):
    model, _ = loaded
    prepared = prepared_for(loaded, range(rows), **SETTINGS[name])
    expected = model.generate(prepared=prepared, max_new_tokens=new, do_sample=False, pad_token_id=3).tolist()
    generated = Engine(model).generate(prepared, Sampling(max_new_tokens=new))
    assert tokens_of(generated) == expected
    assert all(answer.finish == "length" and len(answer.tokens) == new for answer in generated.answers)
    assert generated.seconds["prefill"] > 0 and generated.seconds["decode"] > 0


@pytest.mark.parametrize("rows", [[0], [0, 1, 2, 3]], ids=["batch 1", "batch 4"])
@pytest.mark.parametrize("name", SETTINGS)
def test_short_step_is_the_layers(loaded, name, rows):
    """The engine's arithmetic of a step gives the very numbers of transformers' layers in float32."""
    model, _ = loaded
    tokens, logits = None, []
    for step_of in (Stepper.for_model, lambda model: model.decode_step):
        prepared = prepared_for(loaded, rows, **SETTINGS[name])
        with torch.inference_mode():
            cache, step = prepared.caching.cache(20), step_of(model)
            steps = [model.prefill(prepared, cache)]
            tokens = tokens if tokens is not None else torch.randint(3, 60, (20, len(rows)))
            for fed in tokens:
                cache.begin_step(1)
                steps.append(step(fed, cache))
        logits.append(torch.stack(steps))
    assert torch.equal(*logits)


@pytest.mark.parametrize("change", ["a hook", "a layer within", "an instance's forward", "another class"])
def test_changed_layers_are_called_as_they_are(tmp_path, change):
    save_llava_hf(build_reference("llava_next", seed=3, **SHAPES["vicuna"]), tmp_path)
    _, model, _, _ = load_pretrained_model(tmp_path, device_map="cpu")
    assert Stepper.for_model(model) is not None
    attention, calls = model.model.layers[1].self_attn, []
    if change == "a hook":
        attention.register_forward_hook(lambda *_: calls.append(1))
    elif change == "a layer within":
        attention.q_proj = torch.nn.Sequential(attention.q_proj, torch.nn.LayerNorm(attention.q_proj.out_features))
    elif change == "an instance's forward":
        attention.forward = attention.forward
    else:
        attention.q_proj.__class__ = type("Quantised", (torch.nn.Linear,), {})
    assert Stepper.for_model(model) is None
    if change == "a hook":
        prepared = model.prepare(torch.tensor([[1, 5, 6]]))
        Engine(model).generate(prepared, Sampling(max_new_tokens=4))
        assert len(calls) == 4


@pytest.mark.parametrize("rows", [[0], [0, 1, 2, 3]], ids=["batch 1", "batch 4"])
def test_prefill_in_buffers_that_stay(loaded, rows):
    """Padded to one of few lengths, in the buffers of an earlier request: the same logits, the same cache."""
    model, _ = loaded
    store = Store(limit=1 << 40)
    prefills = StaticPrefills(model, store, captures=False)
    for name in [*SETTINGS, *SETTINGS]:
        prepared = prepared_for(loaded, rows, **SETTINGS[name])
        whole, padded = (prepared.caching.cache(3) for _ in range(2))
        found = prefills(prepared, padded)
        if prepared.dropping is not None:
            assert found is None
            continue
        assert torch.allclose(found, model.prefill(prepared, whole), atol=1e-5)
        for mine, theirs in zip(padded.layers, whole.layers, strict=True):
            assert mine.tensors().keys() == theirs.tensors().keys()
            for key, tensor in stored(mine).items():
                assert torch.allclose(tensor.float(), stored(theirs)[key].float(), atol=1e-5), key
    shapes = [static.shape for static in store.all()]
    assert 1 <= len(shapes) <= 2 and all(length % prefill_module.GRAPH_LENGTH_MULTIPLE == 0 for _, length in shapes)


def stored(layer):
    """All that a prefilled layer holds, without what lies in slots that no list names: those are never read."""
    found = dict(layer.tensors())
    live = torch.zeros(found["keys"].shape[:3], dtype=torch.bool)
    for row in range(len(live)):
        live[row, :, : layer.front_len[row] + layer.image_len[row]] = True
        for head in range(live.shape[1]):
            live[row, head, layer.text[row, head, : layer.text_len[row, head]].long()] = True
    for name in ("keys", "values"):
        found[name] = found[name].masked_fill(~live[..., None], 0)
    if "scores" in found:
        place = torch.arange(found["scores"].shape[-1])
        found["scores"] = found["scores"].masked_fill(place >= layer.text_len[..., None], 0)
    return found


def test_captured_prefill_asks_nothing_of_the_host(loaded):
    """What a CUDA graph could not hold: a value that is read on the host."""

    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
            return func(*args, **(kwargs or {}))

    model, _ = loaded
    static = StaticPrefill(model, 2, 64, captures=False)
    with torch.inference_mode(), Refuse():
        static._run()
    assert static._logits.shape == (2, model.config.vocab_size)


def test_what_is_not_prefilled_in_buffers(loaded, monkeypatch):
    """Too many tokens to gain by it; shapes that came last stay within the bound of bytes."""
    model, _ = loaded
    store = Store(limit=0)
    prefills = StaticPrefills(model, store, captures=False)
    prepared = prepared_for(loaded, [0], method="none")
    monkeypatch.setattr(prefill_module, "MAX_CAPTURED_TOKENS", max(prepared.lengths) - 1)
    assert prefills(prepared, prepared.caching.cache(1)) is None
    monkeypatch.undo()
    monkeypatch.setattr(prefill_module, "GRAPH_LENGTH_MULTIPLE", 1)
    for words in range(2, 9):
        prepared = model.prepare(torch.arange(3, 3 + words)[None])
        prefills(prepared, prepared.caching.cache(1))
    assert [static.shape for static in store.all()] == [(1, words) for words in range(2, 9)]
    store.limit = sum(static.nbytes for static in store.all()[-4:])
    store.evict()
    assert [static.shape for static in store.all()] == [(1, words) for words in range(5, 9)]
    store.limit = 0
    store.evict(spare=("prefill", 1, 6))
    assert [static.shape for static in store.all()] == [(1, 6)]


def test_rows_end_by_themselves(loaded):
    """An end token or the row's own limit; what the others go on to generate is what they would without it."""
    model, _ = loaded
    prepared = prepared_for(loaded, [0, 1, 2, 3], **SETTINGS["avl and text"])
    engine = Engine(model)
    whole = tokens_of(engine.generate(prepared, Sampling(max_new_tokens=40)))
    end = whole[1][4]
    first = [row.index(end) if end in row else None for row in whole]
    engine.ends = {end}
    limits = [40, 40, 3, 40]
    answers = engine.generate(prepared, [Sampling(max_new_tokens=limit) for limit in limits]).answers
    for row, answer, at, limit in zip(whole, answers, first, limits, strict=True):
        stops = at is not None and at < limit
        assert answer.tokens == row[: at + 1 if stops else limit]
        assert answer.finish == ("stop" if stops else "length")
    assert answers[1].finish == "stop" and answers[2].finish == "length"


def test_steps_come_one_by_one(loaded):
    model, _ = loaded
    prepared = prepared_for(loaded, [0, 2], **SETTINGS["avl, core"])
    engine = Engine(model)
    whole = tokens_of(engine.generate(prepared, Sampling(max_new_tokens=9)))
    stream = engine.stream(prepared, [Sampling(max_new_tokens=9), Sampling(max_new_tokens=4)])
    steps = list(stream)
    assert [step[0].token for step in steps] == whole[0] and [step[0].finish for step in steps[:-1]] == [None] * 8
    assert [step[1].token for step in steps[:4]] == whole[1][:4] and steps[3][1].finish == "length"
    assert steps[4:] and all(step[1] is None for step in steps[4:])
    assert tokens_of(stream.result()) == [whole[0], whole[1][:4]]


def test_one_token_needs_no_step(loaded):
    prepared = prepared_for(loaded, [0, 1], method="none")
    generated = Engine(loaded[0]).generate(prepared, Sampling(max_new_tokens=1))
    assert all(len(answer.tokens) == 1 for answer in generated.answers) and generated.cache.steps == 0


def test_nothing_is_left_over(loaded):
    """After four requests of each setting as many tensors live, and as many bytes, as after one of each."""
    engine = Engine(loaded[0])

    def live():
        gc.collect()
        tensors = [value for value in gc.get_objects() if isinstance(value, torch.Tensor)]
        return len(tensors), sum(tensor.nbytes for tensor in tensors)

    counts = []
    for row in range(4):
        for setting in SETTINGS.values():
            prepared = prepared_for(loaded, [row], **setting)
            engine.generate(prepared, Sampling(max_new_tokens=3))
            del prepared
        counts.append(live())
    assert counts[0] == counts[-1]


def test_draws_do_not_depend_on_the_batch(loaded):
    model, _ = loaded
    engine, rows = Engine(model), [0, 1, 2, 3]
    samplings = [Sampling(20, temperature=1.5, top_p=0.9, seed=row) for row in rows]
    samplings[2] = Sampling(20)
    together = tokens_of(engine.generate(prepared_for(loaded, rows, method="adav"), samplings))
    for row in rows:
        alone = engine.generate(prepared_for(loaded, [row], method="adav"), samplings[row])
        assert tokens_of(alone) == [together[row]]
    other = engine.generate(prepared_for(loaded, [0], method="adav"), Sampling(20, temperature=1.5, seed=77))
    assert tokens_of(other) != [together[0]]


def test_top_p_by_hand():
    # Probabilities 0.5, 0.3, 0.15, 0.05: at 0.8 the first two are drawn from, at 0.81 the first three.
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log().expand(2000, -1)
    for top_p, drawn in ((0.5, {1}), (0.8, {1, 3}), (0.81, {0, 1, 3}), (1.0, {0, 1, 2, 3})):
        rows = [Sampling(temperature=1.0, top_p=top_p, seed=seed) for seed in range(2000)]
        tokens = Chooser(rows, torch.device("cpu"))(logits)
        assert set(tokens.tolist()) == drawn
    # All four, and the share of the most probable is its probability: 0.5, here within five standard deviations.
    assert abs(float((tokens == 1).float().mean()) - 0.5) < 5 * (0.25 / 2000) ** 0.5
    # However small temperature or top_p is: the most probable token.
    for sampling in (Sampling(temperature=5e-324), Sampling(temperature=1.0, top_p=5e-324)):
        assert Chooser([sampling], torch.device("cpu"))(logits[:1]).tolist() == [1]
    # Temperature 0.5 squares the ratios: 25, 9, 2.25, 0.25 of 36.5.
    tokens = Chooser([Sampling(temperature=0.5, seed=seed) for seed in range(2000)], torch.device("cpu"))(logits)
    assert abs(float((tokens == 1).float().mean()) - 25 / 36.5) < 5 * (0.25 / 2000) ** 0.5


@pytest.mark.parametrize(
    "options, words",
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0, allowed is a whole number of at least 1"),
        ({"temperature": float("nan")}, "temperature is nan, allowed is a number of at least 0"),
        ({"top_p": 0}, "top_p is 0, allowed is a number above 0, at most 1"),
        ({"seed": -1}, "seed is -1"),
        ({"stop": ("",)}, "stop is \\('',\\), allowed is strings that are not empty"),
    ],
)
def test_bad_sampling_is_a_sentence(options, words):
    with pytest.raises(UserError, match=words):
        Sampling(**options)


def test_bad_requests_are_sentences(loaded):
    model, _ = loaded
    prepared = prepared_for(loaded, [0, 1], method="none")
    with pytest.raises(UserError, match="3 samplings came with 2 prompts"):
        Engine(model).generate(prepared, [Sampling()] * 3)
    with pytest.raises(UserError, match="stop strings need a tokenizer"):
        Engine(model).generate(prepared, Sampling(stop="x"))
    with pytest.raises(UserError, match="one CUDA device"):
        Engine(model, graphs=True)


# --- text, on the demo checkpoint's tokenizer ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo():
    return load_pretrained_model("playground/llava-shapes-v1.5", device_map="cpu")


def test_streamed_text_is_the_whole_text(demo):
    tokenizer = demo[0]
    ids = tokenizer("What colour is the large circle? red blue 7", add_special_tokens=False).input_ids
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    stream = TextStream(tokenizer)
    assert "".join([*map(stream.add, ids), stream.end()]) == stream.text == whole
    words = whole.split()
    stop = whole[whole.index(words[3]) : whole.index(words[5]) - 1]
    stream = TextStream(tokenizer, ["never there", stop])
    pieces = [stream.add(token) for token in ids]
    assert stream.stopped and "".join(pieces) == stream.text == whole[: whole.index(stop)]
    assert stream.add(ids[0]) == stream.end() == ""


def test_what_may_become_a_stop_string_is_held_back(demo):
    tokenizer = demo[0]
    ids = tokenizer("red red blue", add_special_tokens=False).input_ids
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    stream = TextStream(tokenizer, [whole + " never"])
    assert "".join(map(stream.add, ids)) == "" and stream.end() == whole
