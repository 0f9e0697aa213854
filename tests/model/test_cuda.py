"""The engine where it captures CUDA graphs: what is replayed gives what plain steps give, whatever came before it.

On a GPU where there is one; elsewhere, or with ADAV_EMULATE=1, on the CPU over an emulation of CUDA graphs, which refuses
what a GPU refuses (support/graph_emulator.py).
"""

import gc
import os
import weakref
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from matrices import one_of_each
from shapes import Preset, Prompts, random_model
from support.graph_emulator import install

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.model.decoding import decode_step as decode_step_module
from llava.model.decoding import prefill as prefill_module
from llava.model.decoding.cache_tensors import CacheTensors
from llava.model.decoding.decode_step import Stepper, merge_projections
from llava.model.decoding.engine import MIN_STEPS_TO_CAPTURE, Engine, PlainSteps
from llava.model.decoding.sampling import Chooser, Sampling
from llava.model.graphs import capture

EMULATE = os.environ.get("ADAV_EMULATE") == "1" or not torch.cuda.is_available()
DEVICE = "cpu" if EMULATE else "cuda"

AVL = {"vision_adaptive_attention": True, "vision_adaptive_attention_rate": 0.3}
TEXT = {"text_pruning_flag": True, "text_pruning_rate": 0.4, "text_init_cache": 6}
SETTINGS = {
    "full": {"method": "none"},
    "adav": {"method": "adav"},
    "fastv": {"method": "fastv"},
    "pyramiddrop": {"method": "pyramiddrop"},
    "h2o": {"method": "none", "all_use_h2o": True},
    "avl, evict": {"method": "none", **AVL, "vision_adaptive_attention_update_interval": -1},
    "avl, core": {"method": "none", **AVL, "vision_adaptive_attention_update_interval": 3},
    "avl and text": {
        **{"method": "adav", **AVL, **TEXT, "text_rule": "history"},
        "vision_adaptive_attention_update_interval": 2,
    },
    "text alone": {"method": "cls", **TEXT, "text_rule": "direct"},
}
# Settings whose vision tokens go between layers, which the engine leaves to transformers' layers.
DROPPING = {"fastv", "pyramiddrop"}
# Settings some of whose steps re-rank the core.
RANKED = {"avl, core", "avl and text"}
STEPS, NEW, PLENTY = 7, 24, 1 << 30


@pytest.fixture(scope="module", autouse=True)
def graphs():
    """CUDA graphs, emulated where there are none."""
    with pytest.MonkeyPatch.context() as patch:
        if EMULATE:
            install(patch)
        yield


@dataclass
class Loaded:
    """A model with random weights, and prompts for it."""

    preset: Preset
    model: torch.nn.Module

    @classmethod
    def random(
        cls,
        kv_heads: int,
        dtype: torch.dtype = torch.float32,
        layers: int = 3,
        device: str = DEVICE,
        merged: bool = True,
    ):
        # Head size 64, as the kernels' cases have it; 5 tiles of 16 patches and 8 newline tokens.
        preset = Preset(56, (64, 3, 4, 128), (256, layers, 4, 320), 200, (9, 7), kv_heads=kv_heads)
        # On a GPU, random_model merges projections. A model without them is made on the CPU and moved.
        model = random_model(preset.model_config(newline=True), device if merged else "cpu", dtype, seed=0).to(device)
        if merged:
            merge_projections(model)
        return cls(preset, model)

    @torch.inference_mode()
    def request(self, name: str, rows: int, seed: int = 0):
        """A prepared prompt: rows of one to nine words before their image, and others after it."""
        prompts = Prompts.random(self.preset, self.model.config, self.model.lm_head.weight, rows, seed)
        dropped = torch.randint(0, 9, (rows, 1), generator=torch.Generator().manual_seed(seed))
        mask = torch.arange(prompts.ids.shape[1]) >= dropped
        config = AdaVConfig(**({"overall_tokens": 12} | SETTINGS[name]))
        return self.model.prepare(prompts.ids, prompts.pixels, prompts.sizes, mask, config=config)

    def engine(self, **options) -> Engine:
        engine = Engine(self.model, **({"graph_bytes": PLENTY} | options))
        assert engine.graphs
        return engine

    def plain(self, prepared, new: int = NEW, **options) -> list[list[int]]:
        """The tokens without graphs."""
        return tokens(Engine(self.model, graphs=False), prepared, new, **options)


@pytest.fixture(scope="module", params=[4, 2], ids=["heads alike", "grouped"])
def loaded(request):
    return Loaded.random(request.param)


@pytest.fixture(scope="module")
def grouped():
    return Loaded.random(kv_heads=2, layers=2)


@pytest.fixture
def emulated():
    """The emulation, on a machine with a GPU as well: for what is compared more closely than other kernels round."""
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        yield


class Captures:
    """Captures that are tried: `graphs` are weak references to theirs. The first `failing` of them run out of memory."""

    def __init__(self):
        self.graphs, self.failing = [], 0

    @contextmanager
    def graph(self, cuda_graph, real=torch.cuda.graph, **options):
        self.graphs.append(weakref.ref(cuda_graph))
        with real(cuda_graph, **options):
            yield
            if len(self.graphs) <= self.failing:
                raise torch.OutOfMemoryError("no memory for a capture")


@pytest.fixture
def captures(monkeypatch):
    found, real = Captures(), torch.cuda.graph
    monkeypatch.setattr(torch.cuda, "graph", lambda *args, **options: found.graph(*args, real=real, **options))
    return found


def tokens(engine: Engine, prepared, new: int = NEW, **options) -> list[list[int]]:
    return [answer.tokens for answer in engine.generate(prepared, Sampling(new, **options)).answers]


@torch.inference_mode()
def forced(model, prepared, fed, engine=None):
    """Logits [1 + T, B, V] of prefill and of steps that are fed `fed` [T, B]."""
    if engine is None:
        cache = prepared.caching.cache(len(fed))
        logits, steps = model.prefill(prepared, cache), PlainSteps(model.decode_step, cache)
    else:
        cache = engine.cache_for(prepared, len(fed))
        logits = engine.prefill(prepared, cache).clone()
        steps = engine.steps_for(cache)
    return torch.stack([logits] + [steps(token).clone() for token in fed])


def random_tokens(rows, seed):
    return torch.randint(3, 200, (STEPS, rows), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def kinds(engine):
    """Of each captured set, which steps it has graphs of: those that re-rank (True) and those that do not."""
    return [set(kept.graphs) for kept in engine.captured_sets()]


def kinds_of(name):
    return {False, True} if name in RANKED else {False}


# --- the same numbers and tokens ---------------------------------------------------------------------------------


# Emulated, each kind of heads and each batch once; the long tests and a GPU have the other two.
@pytest.mark.parametrize(
    "loaded, rows",
    one_of_each((4, 2), (1, 3), {(4, 1), (2, 3)}, others=pytest.mark.long if EMULATE else ()),
    indirect=["loaded"],
)
@pytest.mark.parametrize("name", SETTINGS)
def test_captured_is_plain(loaded, name, rows):
    """transformers' layers one by one, against the engine: plain, captured, and replayed twice over the same buffers."""
    engine = loaded.engine()
    for seed in range(4):
        prepared, fed = loaded.request(name, rows, seed), random_tokens(rows, seed)
        expected, found = forced(loaded.model, prepared, fed), forced(loaded.model, prepared, fed, engine)
        assert torch.isfinite(found).all()
        assert float((found - expected).abs().max()) < 2e-4, seed
    assert kinds(engine) == [kinds_of(name)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2], ids=["heads alike", "grouped"])
@pytest.mark.parametrize("name", ["full", "avl and text"])
def test_half_precision(name, kv_heads, dtype):
    loaded = Loaded.random(kv_heads, dtype, layers=2)
    engine = loaded.engine()
    for seed in range(3):
        prepared, fed = loaded.request(name, 2, seed), random_tokens(2, seed)
        expected, found = forced(loaded.model, prepared, fed), forced(loaded.model, prepared, fed, engine)
        spread = (expected - expected.mean(-1, keepdim=True)).square().mean().sqrt()
        apart = (found - expected).square().mean(-1).sqrt() / spread  # [1 + STEPS, rows]
        # A policy that ranks entries may choose another one of two that are equal up to rounding. The row differs from there
        # on, so only the median of all steps and rows shows a wrong step.
        assert float(apart.max() if name == "full" else apart.median()) < 0.05
    assert kinds(engine) == [kinds_of(name)]


@pytest.mark.parametrize("name", ["full", "adav", "avl, core"])
def test_engine_is_transformers_generate(loaded, name):
    """Greedy tokens in float32. On a GPU other kernels round otherwise and a near tie may differ, so a prefix is enough."""
    prepared, engine = loaded.request(name, 2), loaded.engine()
    expected = loaded.model.generate(prepared=prepared, max_new_tokens=NEW, do_sample=False, pad_token_id=0).tolist()
    compared = NEW if EMULATE else 8
    for _ in range(3):
        assert [row[:compared] for row in tokens(engine, prepared)] == [row[:compared] for row in expected]
    assert len(kinds(engine)) == 1


def test_captured_tower_is_plain(captures):
    """Captured when a number of tiles comes again; every image still has its own features."""
    loaded = Loaded.random(kv_heads=4, layers=1)
    expected = [loaded.request("adav", 2, seed).inputs_embeds for seed in range(4)]
    engine = loaded.engine()
    found = [loaded.request("adav", 2, seed).inputs_embeds for seed in range(4)]
    assert len(captures.graphs) == 1 and engine.captured_bytes() > 0
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", sorted(SETTINGS.keys() - DROPPING))
def test_fused_prefill_is_the_layers(emulated, name):
    """What the fused layers leave in the cache is what transformers' layers leave, for rows of different lengths."""
    loaded = Loaded.random(kv_heads=2, device="cpu")
    prepared, stepper = loaded.request(name, 3), Stepper.for_model(loaded.model)
    assert len(set(prepared.lengths)) == 3 and stepper.fused
    caches, logits = zip(*(filled(loaded.model, prepared, by) for by in (None, stepper)), strict=True)
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)
    for expected, found in zip(*(cache.layers for cache in caches), strict=True):
        for row in range(3):
            parts, others = (live_entries(layer, row) for layer in (expected, found))
            assert all(map(torch.equal, parts.pop("slots"), others.pop("slots")))
            assert parts["keys"].numel() and parts.keys() == others.keys()
            torch.testing.assert_close(others, parts, rtol=0, atol=1e-5)


def test_a_long_prefill_computes_its_mlp_in_parts(emulated, monkeypatch):
    loaded = Loaded.random(kv_heads=2, device="cpu")
    prepared, stepper = loaded.request("full", 3), Stepper.for_model(loaded.model)
    _, expected = filled(loaded.model, prepared, stepper)
    monkeypatch.setattr(decode_step_module, "MLP_TOKENS", 50)
    assert sum(prepared.lengths) > 150
    _, found = filled(loaded.model, prepared, stepper)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def filled(model, prepared, stepper):
    """(cache, logits) of a prefill by the fused layers of a stepper, or by the model's own."""
    cache = prepared.caching.cache(STEPS)
    return cache, prefill_module.prefill(model, prepared, cache, stepper)


def live_entries(layer, row):
    """What later steps read of a row of one layer. slots: its lists; keys, values and scores of the entries in them."""
    image = layer.image[row, : layer.image_len[row]]
    core = layer.core[row, : layer.core_len[row]]
    heads = range(layer.keys.shape[1])
    texts = [layer.text[row, head, : layer.text_len[row, head]] if layer.text.numel() else image[:0] for head in heads]
    front = torch.arange(int(layer.front_len[row]))
    slots = [torch.cat([front, image, text]).long() for text in texts]
    found = {"slots": [image, core, *texts]}
    for name in ("keys", "values"):
        found[name] = torch.cat([getattr(layer, name)[row, head, slots[head]] for head in heads])
    if "scores" in layer.tensors():
        found["scores"] = torch.cat([layer.scores[row, head, : len(texts[head])] for head in heads])
    return found


def test_draws_and_ends(grouped):
    """Rows that draw, beside rows that end earlier than others, over captured steps."""
    prepared, engine = grouped.request("avl, core", 3), grouped.engine()
    sampling = [Sampling(30, temperature=1.0, seed=5), Sampling(20), Sampling(30, temperature=0.7, top_p=0.9)]
    plain = Engine(grouped.model, graphs=False)
    plain.ends = engine.ends = {tokens(plain, prepared)[1][6]}
    expected = [(answer.tokens, answer.finish) for answer in plain.generate(prepared, sampling).answers]
    assert "stop" in [finish for _, finish in expected]
    for _ in range(4):
        assert [(a.tokens, a.finish) for a in engine.generate(prepared, sampling).answers] == expected
    assert kinds(engine) == [{False, True}]


@pytest.mark.parametrize("rows", [1, 3])
def test_ranking_beside_gives_the_same(grouped, rows):
    """On a side stream that is joined again: on a GPU at the same time as the layers that follow, emulated in turn."""
    beside, in_line = grouped.engine(rank_beside=True), grouped.engine()
    for seed in range(3):
        prepared = grouped.request("avl, core", rows, seed)
        assert tokens(beside, prepared) == tokens(in_line, prepared)
    assert kinds(beside) == [{False, True}]


# --- what is captured, and when ----------------------------------------------------------------------------------


def test_one_request_captures_nothing(grouped, captures):
    prepared, engine = grouped.request("full", 2), grouped.engine()
    tokens(engine, prepared)
    tokens(engine, grouped.request("full", 1))
    assert not captures.graphs and not engine.captured_sets()
    tokens(engine, prepared)
    assert kinds(engine) == [{False}]
    tried = len(captures.graphs)
    tokens(engine, prepared)
    assert len(captures.graphs) == tried == 2  # prefill and a step


def test_short_answers_capture_no_steps(grouped, captures):
    """The first step of a set is never captured: from the second on there must be enough."""
    prepared, engine = grouped.request("full", 2), grouped.engine()
    for _ in range(3):
        for new in (1, 2, MIN_STEPS_TO_CAPTURE):
            tokens(engine, prepared, new)
        assert not engine.captured_sets()
    assert len(captures.graphs) == 1  # prefill, which every answer needs
    for new, expected in ((MIN_STEPS_TO_CAPTURE + 1, [set()]), (MIN_STEPS_TO_CAPTURE + 2, [{False}])):
        tokens(engine, prepared, new)
        assert kinds(engine) == expected, new


NODES = {"full": 10, "h2o": 11, "avl, core": 11, "avl and text": 12}


@pytest.mark.parametrize("rows", [2, 1], ids=["batch 2", "batch 1"])
@pytest.mark.parametrize("name", NODES)
def test_nodes_per_layer(name, rows):
    """How much a GPU launches for a layer of a decode step: the difference of a model with two layers more.

    At batch 1 the products of gate and up and their activation are one kernel.
    """
    nodes = []
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        for layers in (2, 4):
            loaded = Loaded.random(kv_heads=2, layers=layers, device="cpu")
            prepared, engine = loaded.request(name, rows), loaded.engine()
            for _ in range(2):
                tokens(engine, prepared)
            (kept,) = engine.captured_sets()
            nodes.append({kind: len(graph.nodes) for kind, graph in kept.graphs.items()})
    assert set(nodes[0]) == set(nodes[1]) == kinds_of(name)
    for kind, few in nodes[0].items():
        assert 0 < (nodes[1][kind] - few) / 2 <= NODES[name] - (rows == 1), kind


# --- several generations of one engine ---------------------------------------------------------------------------


def advance_in_turns(*generations):
    """The tokens of generations that are advanced one step each in turn, until all have ended."""
    while not all(generation.ended for generation in generations):
        for generation in generations:
            next(generation, None)
    return [[answer.tokens for answer in generation.result().answers] for generation in generations]


@pytest.mark.parametrize("graph_bytes", [0, PLENTY])
@pytest.mark.parametrize("name", ["full", "avl and text"])
@pytest.mark.parametrize("rows", [(2, 2), (2, 1)], ids=["one shape", "two shapes"])
def test_interleaved_generations(grouped, rows, name, graph_bytes):
    """Each gives the tokens that it gives alone, whether its steps are captured while the other is under way, or before."""
    requests = [grouped.request(name, count, seed) for seed, count in enumerate(rows)]
    expected = [grouped.plain(prepared) for prepared in requests]
    assert len(set(map(str, expected))) == 2
    engine = grouped.engine(graph_bytes=graph_bytes)
    for _ in range(3):
        assert advance_in_turns(*(engine.stream(prepared, Sampling(NEW)) for prepared in requests)) == expected
    assert engine.captured_sets()


def test_a_generation_that_begins_in_the_middle_of_another(grouped):
    one, two = (grouped.request("h2o", 2, seed) for seed in range(2))
    expected, engine = [grouped.plain(one, 40), grouped.plain(two)], grouped.engine()
    for _ in range(2):
        tokens(engine, one)
    first = engine.stream(one, Sampling(40))
    for _ in range(10):
        next(first)
    assert tokens(engine, two) == expected[1]
    for _ in range(10):
        next(first)
    assert tokens(engine, two) == expected[1]
    assert advance_in_turns(first) == expected[:1]


def test_a_generation_that_nobody_ends(grouped):
    """Its storage serves the next request of its shape once it is forgotten."""
    prepared, engine = grouped.request("full", 2), grouped.engine()
    expected = grouped.plain(prepared)
    for _ in range(2):
        tokens(engine, prepared)
    (kept,) = engine.captured_sets()
    abandoned = engine.stream(grouped.request("full", 2, seed=1), Sampling(NEW))
    next(abandoned)
    next(abandoned)
    assert kept.cache is abandoned.cache
    assert tokens(engine, prepared) == expected and kept.cache is abandoned.cache
    del abandoned
    gc.collect()
    generated = engine.generate(prepared, Sampling(NEW))
    assert [answer.tokens for answer in generated.answers] == expected and kept.cache is generated.cache


@pytest.mark.parametrize("name", ["full", "avl and text"])
def test_the_cache_of_an_earlier_request(grouped, name):
    """It is as it was, or it refuses: it never holds what a later request has written."""
    engine, found = grouped.engine(), []
    for seed in range(4):
        cache = engine.generate(grouped.request(name, 2, seed), Sampling(NEW)).cache
        found.append((cache, cache_bytes(cache)))
    refused = 0
    for cache, before in found:
        try:
            assert all(map(torch.equal, cache_bytes(cache), before))
        except UserError as error:
            assert "went to a later request" in str(error)
            refused += 1
    assert refused == 2  # the storage of the second request served the third and the fourth


def cache_bytes(cache):
    """A copy of what a step reads, bit by bit: what stands in free slots is anything, NaN included."""
    names = ("keys", "values", "front_len", "core", "text", "text_len")
    return [getattr(layer, name).clone().view(torch.uint8) for layer in cache.layers for name in names]


def test_a_step_on_the_cache_of_an_earlier_request(grouped):
    """It is refused before it has changed anything of the request that has the storage now."""
    prepared, engine = grouped.request("full", 2), grouped.engine()
    expected = grouped.plain(prepared)
    earlier = [engine.generate(prepared, Sampling(NEW)).cache for _ in range(2)][-1]
    generation = engine.stream(prepared, Sampling(NEW))
    for _ in range(4):
        next(generation)
    before = [*cache_bytes(generation.cache), generation.cache.tensors.positions.clone()]
    with pytest.raises(UserError, match="went to a later request"), torch.inference_mode():
        earlier.begin_step(1)
        grouped.model.decode_step(torch.tensor([3, 3], device=DEVICE), earlier)
    after = [*cache_bytes(generation.cache), generation.cache.tensors.positions]
    assert all(map(torch.equal, after, before))
    assert advance_in_turns(generation) == [expected]


# --- memory ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:a CUDA graph could not be captured")
@pytest.mark.parametrize(
    "name, failing", [("full", 1), ("full", 100), ("avl, core", 1), ("avl, core", 2), ("avl, core", 3)]
)
def test_captures_that_run_out_of_memory(grouped, captures, name, failing):
    """Prefill, then steps of either kind: those that cannot be captured run as they are, and nothing stays of the attempt."""
    requests = [grouped.request(name, 2, seed) for seed in range(3)]
    expected, engine, stream = [grouped.plain(one) for one in requests], grouped.engine(), torch.cuda.current_stream()
    captures.failing = failing
    for seed in (0, 0, 1, 2):
        assert tokens(engine, requests[seed]) == expected[seed]
        assert torch.cuda.current_stream() == stream and not torch.cuda.is_current_stream_capturing()
    failed = captures.graphs[:failing]
    assert len(failed) == min(failing, len(captures.graphs)) >= 1
    gc.collect()
    assert all(graph() is None for graph in failed)
    # What did not fail was captured.
    assert [graph() is None for graph in captures.graphs] == [n < failing for n in range(len(captures.graphs))]
    captures.failing = 0
    engine.release()
    for seed in (0, 0, 1):
        assert tokens(engine, requests[seed]) == expected[seed]
    assert kinds(engine) == [kinds_of(name)]


@pytest.mark.filterwarnings("ignore:a CUDA graph could not be captured")
def test_a_capture_that_is_refused_leaves_nothing_behind():
    """Not even in torch's random generator, which notes an open capture."""
    numbers = torch.ones(3, device=DEVICE)
    assert capture(lambda: numbers.sum().item()) is None
    assert torch.rand(3, device=DEVICE).isfinite().all()
    graph = capture(lambda: numbers.mul_(2))
    graph.replay()
    assert numbers.tolist() == [2.0, 2.0, 2.0]


@pytest.mark.filterwarnings("ignore:a CUDA graph could not be captured")
def test_a_tower_whose_capture_runs_out_of_memory(captures):
    """It runs as it is and is not tried again; what comes behind it is captured."""
    loaded = Loaded.random(kv_heads=4, layers=1)
    expected = [loaded.request("adav", 2, seed).inputs_embeds for seed in range(3)]
    answers, engine = loaded.plain(loaded.request("adav", 2)), loaded.engine()
    captures.failing = 1
    for seed in (0, 1, 2, 0):
        prepared = loaded.request("adav", 2, seed)
        torch.testing.assert_close(prepared.inputs_embeds, expected[seed], rtol=0, atol=1e-5)
    gc.collect()
    assert [graph() for graph in captures.graphs] == [None]
    for _ in range(2):
        assert tokens(engine, loaded.request("adav", 2)) == answers
    assert len(captures.graphs) == 3 and kinds(engine) == [{False}]  # prefill and a step
    engine.release()
    for _ in range(2):
        found = loaded.request("adav", 2).inputs_embeds
        torch.testing.assert_close(found, expected[0], rtol=0, atol=1e-5)
    assert len(captures.graphs) == 4 and engine.captured_bytes() > 0


# Where memory may run out: the storage of keys and values is made ready, the layers of a prompt, those of a decode step,
# and the choice of the next tokens.
PLACES = {
    "storage": (CacheTensors, "begin"),
    "layers": (prefill_module, "run_layers"),
    "step": (Stepper, "__call__"),
    "choice": (Chooser, "__call__"),
}


@contextmanager
def out_of_memory(where, times, after=0):
    """Memory runs out `times` times in a place, behind what is done there, once that has gone well `after` times."""
    owner, name = PLACES[where]
    real, left = getattr(owner, name), [False] * after + [True] * times

    def failing(*args, **kwargs):
        found = real(*args, **kwargs)
        if left and left.pop(0):
            raise torch.OutOfMemoryError("no memory")
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, failing)
        yield
    assert not left


@pytest.mark.filterwarnings("ignore:a CUDA graph could not be captured")
@pytest.mark.parametrize(
    "where, before, times",
    [
        ("storage", 0, 2),
        ("storage", 1, 2),
        ("storage", 2, 2),
        ("layers", 0, 2),
        ("layers", 1, 3),  # in the capture of a prefill, in the plain one in its place, and in the second attempt
    ],
)
def test_prefill_runs_out_of_memory(grouped, where, before, times):
    """Where letting go of what is kept does not help, the error is the caller's. Later requests know nothing of it.

    before: requests of that shape that have gone well: with one of them steps are captured next, with two they have been.
    """
    one, two = (grouped.request("avl, core", 2, seed) for seed in range(2))
    expected, engine = [grouped.plain(one), grouped.plain(two)], grouped.engine()
    for _ in range(before):
        assert tokens(engine, two) == expected[1]
    with pytest.raises(torch.OutOfMemoryError), out_of_memory(where, times):
        tokens(engine, one)
    for _ in range(2):
        assert tokens(engine, one) == expected[0]
        assert tokens(engine, two) == expected[1]
    assert kinds(engine) == [{False, True}]


@pytest.mark.filterwarnings("ignore:a CUDA graph could not be captured")
@pytest.mark.parametrize(
    "where, before, after, times",
    [
        ("step", 0, 3, 1),
        ("step", 1, 0, 1),  # the first step on storage that is to be captured
        ("step", 1, 1, 2),  # in the capture of the second, and in the plain step in its place
        ("choice", 2, 5, 1),  # behind a replayed step
        ("choice", 2, MIN_STEPS_TO_CAPTURE, 1),  # behind one that was launched ahead
    ],
)
def test_a_step_runs_out_of_memory(grouped, where, before, after, times):
    """The error is the caller's, and the generation has ended with what it had. Later requests know nothing of it."""
    one, two = (grouped.request("full", 2, seed) for seed in range(2))
    expected, engine = [grouped.plain(one), grouped.plain(two)], grouped.engine()
    for _ in range(before):
        assert tokens(engine, two) == expected[1]
    failing = engine.stream(one, Sampling(NEW))
    with pytest.raises(torch.OutOfMemoryError), out_of_memory(where, times, after):
        list(failing)
    assert failing.ended and next(failing, None) is None
    for answer, whole in zip(failing.result().answers, expected[0], strict=True):
        assert 0 < len(answer.tokens) < NEW and answer.finish is None
        assert answer.tokens == whole[: len(answer.tokens)]
    for _ in range(2):
        assert tokens(engine, one) == expected[0]
        assert tokens(engine, two) == expected[1]
    assert len(engine.captured_sets()) == 1 and not any(kept.busy for kept in engine.captured_sets())
    engine.release()
    for _ in range(2):
        assert tokens(engine, two) == expected[1]
    assert kinds(engine) == [{False}]


def test_prefill_is_tried_again(grouped):
    """What is kept of earlier requests goes first."""
    one, two = (grouped.request("full", rows) for rows in (2, 1))
    expected, engine = [grouped.plain(one), grouped.plain(two)], grouped.engine()
    for _ in range(2):
        tokens(engine, two)
    kept = [weakref.ref(captured) for captured in engine.captured_sets()]
    with out_of_memory("storage", times=1):
        assert tokens(engine, one) == expected[0]
    gc.collect()
    assert len(kept) == 1 and kept[0]() is None
    assert tokens(engine, two) == expected[1]


def test_an_error_in_a_generation_frees_its_storage(grouped):
    """A prefill that fails while the storage of captured steps is its own: the next request of the shape can have it."""
    one, two = (grouped.request("full", 2, seed) for seed in range(2))
    expected, engine = grouped.plain(two), grouped.engine()
    for _ in range(2):
        tokens(engine, one)
    failing = engine.stream(one, Sampling(NEW))
    with pytest.raises(torch.OutOfMemoryError), out_of_memory("storage", times=2):
        next(failing)
    assert failing.ended
    for _ in range(3):
        assert tokens(engine, two) == expected
    assert not any(kept.busy for kept in engine.captured_sets())


def test_release(grouped):
    """Nothing of what was captured stays, but what a generation is in the middle of; and everything works afterwards."""
    requests = [grouped.request(name, rows) for name, rows in (("full", 2), ("avl, core", 1))]
    expected, engine = [grouped.plain(prepared) for prepared in requests], grouped.engine()
    for prepared in requests * 2:
        tokens(engine, prepared)
    held = [weakref.ref(part) for kept in engine.captured_sets() for part in (kept, *kept.graphs.values())]
    held += [weakref.ref(kept.cache.tensors) for kept in engine.captured_sets()]
    assert len(held) == 7
    assert engine.captured_bytes() >= sum(kept.nbytes for kept in engine.captured_sets()) > 0
    generation = engine.stream(requests[0], Sampling(NEW))
    next(generation)
    engine.release()
    assert [kept.cache for kept in engine.captured_sets()] == [generation.cache]
    assert advance_in_turns(generation) == expected[:1]
    del generation
    engine.release()
    gc.collect()
    assert engine.captured_bytes() == 0 and engine.captured_sets() == []
    assert all(part() is None for part in held)
    for _ in range(3):
        assert [tokens(engine, prepared) for prepared in requests] == expected
    assert len(engine.captured_sets()) == 2


def test_an_engine_that_is_dropped_takes_everything_with_it(grouped):
    """Nothing of the model, the vision tower above all, holds on to what the engine has captured."""
    prepared, engine = grouped.request("full", 2), grouped.engine()
    for _ in range(2):
        tokens(engine, prepared)
    held = [weakref.ref(part) for kept in engine.captured_sets() for part in (kept, kept.cache.tensors)]
    del engine
    gc.collect()
    assert len(held) == 2 and all(part() is None for part in held)
    torch.testing.assert_close(grouped.request("full", 2).inputs_embeds, prepared.inputs_embeds, rtol=0, atol=1e-5)


def test_captures_after_a_release(grouped, recwarn):
    """A memory pool of CUDA graphs ends with its last graph, so what is captured later needs another one."""
    prepared, engine = grouped.request("full", 2), grouped.engine()
    expected = grouped.plain(prepared)
    for _ in range(2):
        for _ in range(3):
            assert tokens(engine, prepared) == expected
        assert kinds(engine) == [{False}]
        engine.release()
        assert not engine.captured_sets()
    assert not recwarn.list


def test_captured_sets_stay_within_the_bound(grouped, monkeypatch):
    """What is idle is let go of before a prefill, what was used longest ago first."""
    requests = {rows: grouped.request("full", rows) for rows in (1, 2, 3)}
    expected = {rows: grouped.plain(prepared) for rows, prepared in requests.items()}
    unbounded = grouped.engine()
    for rows in (1, 1, 2, 2, 3, 3):
        tokens(unbounded, requests[rows])
    sizes = {kept.cache.layout.batch: kept.nbytes for kept in unbounded.captured_sets()}
    others = unbounded.captured_bytes() - sum(sizes.values())
    # The second is the bytes of the first two sets and of their prefills, which grow with the rows.
    two = sizes[1] + sizes[2] + others // 2
    for bound, left in ((0, [[1], [2], [3], [1]]), (two, [[1], [1, 2], [1, 2, 3], [3, 1]])):
        engine, found = grouped.engine(graph_bytes=bound), []
        idle = idle_bytes(engine, monkeypatch)
        for rows in (1, 2, 3, 1):
            for _ in range(2):
                assert tokens(engine, requests[rows]) == expected[rows]
            found.append([kept.cache.layout.batch for kept in engine.captured_sets()])
        assert len(idle) == 8 and max(idle) <= bound
        assert found == left


def idle_bytes(engine, monkeypatch):
    """A list that grows with every prefill: bytes of what is captured, less the storage that the prefill goes into."""
    prefill, found = engine.prefill, []

    def watched(prepared, cache):
        lent = [kept.nbytes for kept in engine.captured_sets() if kept.cache is cache]
        found.append(engine.captured_bytes() - sum(lent))
        return prefill(prepared, cache)

    monkeypatch.setattr(engine, "prefill", watched)
    return found


# --- merged projections ------------------------------------------------------------------------------------------


def allocations(model):
    """Bytes of each allocation that parameters and buffers lie in."""
    held = (tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers()))
    return {storage.data_ptr(): storage.nbytes() for storage in held}


def weights_of(layer):
    """The weights of one input that are merged, group by group."""
    attention, mlp = layer.self_attn, layer.mlp
    groups = [attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]
    return [[module.weight for module in group] for group in groups]


def is_merged(layer):
    return [len({weight.untyped_storage().data_ptr() for weight in group}) == 1 for group in weights_of(layer)]


def test_merged_projections_are_the_same_weights_in_the_same_memory():
    model = Loaded.random(kv_heads=2, layers=2, merged=False).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    total = sum(allocations(model).values())
    for _ in range(2):  # the second time there is nothing to do
        merge_projections(model)
        assert [is_merged(layer) for layer in model.model.layers] == [[True, True]] * 2
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(value, before[name]) and value.is_contiguous() for name, value in after.items())
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trained
        held = allocations(model)
        assert sum(held.values()) == total
    merge_projections(model)
    assert allocations(model) == held


def test_merged_projections_through_a_file(tmp_path):
    """torch.save writes what they share once, and what is loaded is read by steps that were made before."""
    plain, merged = (Loaded.random(kv_heads=2, layers=2, merged=merged) for merged in (False, True))
    for name, loaded in (("plain", plain), ("merged", merged)):
        torch.save(loaded.model.state_dict(), tmp_path / name)
    sizes = {name: (tmp_path / name).stat().st_size for name in ("plain", "merged")}
    assert sizes["merged"] <= sizes["plain"]
    again = torch.load(tmp_path / "merged")
    assert all(torch.equal(value, again[name]) for name, value in plain.model.state_dict().items())
    prepared, engine = merged.request("full", 2), merged.engine()
    expected = merged.plain(prepared)
    with torch.no_grad():
        for layer in merged.model.model.layers:
            for weight in sum(weights_of(layer), []):
                weight.neg_()
    for _ in range(2):
        assert tokens(engine, prepared) != expected
    merged.model.load_state_dict(again)
    assert [is_merged(layer) for layer in merged.model.model.layers] == [[True, True]] * 2
    assert tokens(engine, prepared) == expected
    assert kinds(engine) == [{False}]


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["heads alike", "grouped"])
def test_merged_products_are_the_separate_ones(emulated, kv_heads):
    """In prefill and in steps, with fewer operations."""
    found, counts = [], []
    for merged in (False, True):
        loaded = Loaded.random(kv_heads, device="cpu", merged=merged)
        prepared, engine = loaded.request("adav", 3), loaded.engine()
        fed = torch.randint(3, 200, (STEPS, 3), generator=torch.Generator().manual_seed(0))
        found.append([forced(loaded.model, prepared, fed, engine) for _ in range(2)][-1])
        (kept,) = engine.captured_sets()
        counts.append(len(kept.graphs[False].nodes))
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)
    assert counts[0] - counts[1] == 3 * 3  # two products of q, k, v and one of gate, up, in each of three layers


def listen(layer):
    layer.mlp.register_forward_hook(lambda *_: None)


def listen_before(layer):
    layer.self_attn.q_proj.register_forward_pre_hook(lambda *_: None)


def take_the_place(layer):
    """As accelerate does where it offloads a layer."""
    layer.self_attn.k_proj.forward = layer.self_attn.k_proj.forward


def quantise(layer):
    """A Linear of another class, as quantised ones and those with adapters are."""
    layer.mlp.up_proj.__class__ = type("Linear8bit", (torch.nn.Linear,), {})


@pytest.mark.parametrize("change", [listen, listen_before, take_the_place, quantise])
def test_layers_that_are_not_plain_are_not_merged(change):
    model = Loaded.random(kv_heads=2, layers=3, merged=False).model
    changed = model.model.layers[1]
    change(changed)
    before = [weight.data_ptr() for group in weights_of(changed) for weight in group]
    merge_projections(model)
    assert [is_merged(layer) for layer in model.model.layers] == [[True, True], [False, False], [True, True]]
    assert [weight.data_ptr() for group in weights_of(changed) for weight in group] == before
    assert Stepper.for_model(model) is None
