"""compress() on models that torch.compile has compiled: as a whole, or their tower, LLM or layers.

A model is called before compress(), so that torch.compile has its graphs by then: it does not notice a hook that is added
to a module later.
"""

import pytest
import torch
from family_cases import CASES
from transformers import CompileConfig

from llava.config import AdaVConfig
from llava.integrations.transformers import compress

K = 3
TWO_STEPS = {"max_new_tokens": 2, "do_sample": False}


@pytest.fixture(autouse=True)
def fresh():
    """No graph of another test; a test compiles a function more often than a user does."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=100):
        yield
    torch.compiler.reset()


def counting():
    """(backend of torch.compile that runs graphs as they are, list that grows with each call of a graph)."""
    calls = []

    def backend(graph, inputs, **_):
        def run(*args):
            calls.append(graph)
            return graph.forward(*args)

        return run

    return backend, calls


def tower(model):
    return model.model.visual if hasattr(model.model, "visual") else model.model.vision_tower


def whole(model, compiled):
    return torch.compile(model, backend=compiled)


def whole_in_place(model, compiled):
    model.compile(backend=compiled)
    return model


def llm(model, compiled):
    model.model.language_model = torch.compile(model.model.language_model, backend=compiled)
    return model


def llm_in_place(model, compiled):
    model.model.language_model.compile(backend=compiled)
    return model


def layers_in_place(model, compiled):
    for layer in model.model.language_model.layers:
        layer.compile(backend=compiled)
    return model


def tower_in_place(model, compiled):
    tower(model).compile(backend=compiled)
    return model


def answers(model, inputs, method):
    """(ids, kept tokens, logits of forward()) under compress()."""
    options = {"layer": 1} if method == "fastv" else {}
    with compress(model, AdaVConfig(method=method, overall_tokens=K, options=options)) as compression:
        ids = model.generate(**inputs, **TWO_STEPS)
        kept = [selection.indices.tolist() for selection in compression.last_selection]
        with torch.no_grad():
            return ids, kept, model(**inputs).logits


def check(name, way, method):
    case = CASES[name]
    inputs = case.prompt([2, "tall", 3])
    ids, kept, logits = answers(case.model(), inputs, method)
    backend, calls = counting()
    model = way(case.model(), backend)
    with torch.no_grad():
        before = model.generate(**inputs, **TWO_STEPS), model(**inputs).logits
    assert calls, "the compiled code ran"
    found = answers(model, inputs, method)
    assert torch.equal(found[0], ids) and found[1] == kept and torch.allclose(found[2], logits, atol=1e-4)
    earlier = len(calls)
    with torch.no_grad():
        after = model.generate(**inputs, **TWO_STEPS), model(**inputs).logits
    assert torch.equal(after[0], before[0]) and torch.allclose(after[1], before[1], atol=1e-4)
    assert len(calls) > earlier, "and runs again after the block"


def test_a_compiled_tower():
    check("internvl", tower_in_place, "adav")


@pytest.mark.long
@pytest.mark.parametrize(
    "name, way, method",
    [
        ("qwen3_vl", whole, "adav"),
        ("qwen3_vl", whole_in_place, "adav"),
        ("qwen3_vl", llm, "adav"),
        ("qwen3_vl", tower_in_place, "adav"),
        ("qwen3_vl", layers_in_place, "fastv"),
        ("internvl", llm_in_place, "fastv"),
        ("qwen3_vl", llm_in_place, "adav"),  # DeepStack reaches the LLM by a hook
    ],
)
def test_compiled_models(name, way, method):
    check(name, way, method)


@pytest.mark.long
@pytest.mark.parametrize("name, way", [("internvl", whole), ("qwen3_vl", whole_in_place), ("qwen3_vl", llm_in_place)])
def test_a_model_that_is_compiled_inside_the_block(name, way):
    case, (backend, calls) = CASES[name], counting()
    inputs, plain, model = case.prompt([4, "large", 5]), case.model(), case.model()
    ids, _, logits = answers(plain, inputs, "adav")
    with compress(model, AdaVConfig(method="adav", overall_tokens=K)), torch.no_grad():
        compiled = way(model, backend)
        assert torch.equal(compiled.generate(**inputs, **TWO_STEPS), ids)
        assert torch.allclose(compiled(**inputs).logits, logits, atol=1e-4)
    with torch.no_grad():
        assert torch.allclose(compiled(**inputs).logits, plain(**inputs).logits, atol=1e-4)
    assert torch.equal(compiled.generate(**inputs, **TWO_STEPS), plain.generate(**inputs, **TWO_STEPS)) and calls


@pytest.mark.long
def test_decode_steps_that_transformers_compiles():
    """With a static cache, generate() compiles the decode steps: also under compress()."""
    case, (backend, calls) = CASES["internvl"], counting()
    inputs = case.prompt([4, "large", 5])
    settings = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    compiled = CompileConfig(backend=backend, fullgraph=True)
    compiled._compile_all_devices = True  # transformers compiles on GPUs alone otherwise
    model = case.model()
    with compress(model, AdaVConfig(method="adav", overall_tokens=K)):
        ids = model.generate(**inputs, **settings, disable_compile=True)
        assert not calls
        assert torch.equal(model.generate(**inputs, **settings, compile_config=compiled), ids)
    assert len(calls) == 3, "one call per decode step"
