"""Qwen2.5-VL and Qwen3-VL in vLLM's engine: kept tokens and greedy tokens are those of compress() for transformers."""

import json
import os
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_checkpoints import QUESTIONS, make_image
from tiny_qwen import IMAGE, KINDS, save_qwen
from vllm_scripts import rows_of
from vllm_sharing import check_sharing

pytest.importorskip("vllm.version", reason="vLLM is not installed here; make vllm makes an environment that has it")
# The engine runs in this process, so that its model can be looked into.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}

from transformers import AutoProcessor  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402
from vllm.exceptions import VLLMValidationError  # noqa: E402

from llava.integrations.transformers import compress  # noqa: E402
from llava.integrations.vllm.engine_check import EngineCheck, refused_because  # noqa: E402
from llava.integrations.vllm.families import qwen_vl  # noqa: E402
from llava.integrations.vllm.prompt_images import GridImages  # noqa: E402

METHODS = ("none", "random", "cls", "t2i", "mix", "fastervlm", "divprune", "cdpruner", "holov", "adav", "adav_cover")
OPTIONS = {"cdpruner": {"relevance": "embeddings"}}  # its default needs CLIP's text tower
NEW = 10  # tokens per answer
COMMON = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 512,
    "limit_mm_per_prompt": {"image": 2, "video": 1},
    # vLLM would normalise pixels in the model, whose result differs from the processor's in the last digit.
    "mm_device_do_normalize": False,
}
# Small steps, so that images are cut; and without shared prefixes.
CUT = {"enable_prefix_caching": False, "max_num_batched_tokens": 48, "max_num_seqs": 8}


def settings(method, tokens, **options):
    return {"method": method, "overall_tokens": tokens, "options": OPTIONS.get(method, {}) | options}


def chat(*turns):
    """A prompt of the user's turns, with an answer between two of them."""
    said = "<|im_end|>\n<|im_start|>assistant\nNo<|im_end|>\n".join(f"<|im_start|>user\n{turn}" for turn in turns)
    return said + "<|im_end|>\n<|im_start|>assistant\n"


class Pair:
    """One checkpoint in vLLM and in transformers. asked: ImageRequests by prompt; kept: what vLLM kept of each of them."""

    def __init__(self, folder, kind, **options):
        self.model = save_qwen(folder, kind)
        self.processor = AutoProcessor.from_pretrained(folder)
        self.llm = LLM(str(folder), **COMMON, **options)
        self.asked, self.kept, self.tower_runs, self.selected = [], {}, 0, 0

    def ask(self, prompts):
        """Outputs of the greedy answers to (text, images, keys or None for plain vLLM)."""
        requests = [{"prompt": text, "multi_modal_data": {"image": images}} for text, images, _ in prompts]
        for request, (_, _, keys) in zip(requests, prompts, strict=True):
            if keys is not None:
                request["mm_processor_kwargs"] = {"adav": keys}
        return self.llm.generate(requests, SamplingParams(temperature=0, max_tokens=NEW), use_tqdm=False)

    def expected(self, text, images, keys):
        """(kept tokens of each image or None, token ids of the answer) of transformers."""
        inputs = self.processor(images=images, text=[text], return_tensors="pt")
        sampling = {"max_new_tokens": NEW, "do_sample": False}
        if keys is None:
            kept, ids = None, self.model.generate(**inputs, **sampling)
        else:
            with compress(self.model, processor=self.processor, **keys) as compression:
                ids = self.model.generate(**inputs, **sampling)
            kept = [selection.indices for selection in compression.last_selection]
        return kept, ids[0, inputs["input_ids"].shape[1] :].tolist()

    def check(self, prompts):
        self.asked.clear()
        outputs, asked = self.ask(prompts), iter(self.asked)
        for (text, images, keys), output in zip(prompts, outputs, strict=True):
            kept, tokens = self.expected(text, images, keys)
            assert list(output.outputs[0].token_ids) == tokens, (keys, text)
            if keys is None:
                continue
            for request, indices in zip(next(asked), kept, strict=True):
                assert torch.equal(self.kept[request.to_bytes()], indices), keys
                run = [self.model.config.image_token_id] * len(indices)
                assert " ".join(map(str, run)) in " ".join(map(str, output.prompt_token_ids))


@pytest.fixture
def watched(monkeypatch):
    """Makes a Pair see what the plugin does."""

    def watch(pair):
        model, images = qwen_vl._SelectsFromGrids, GridImages
        select, run, ask = model._select, model._run_tower, images.requests

        def selecting(self, seen, requests):
            found = select(self, seen, requests)
            pair.selected += len(requests)
            pair.kept |= {
                request.to_bytes(): selection.indices for request, selection in zip(requests, found, strict=True)
            }
            return found

        def running(self, *given):
            pair.tower_runs += 1
            return run(self, *given)

        def asking(self, *given):
            pair.asked.append(ask(self, *given))
            return pair.asked[-1]

        monkeypatch.setattr(model, "_select", selecting)
        monkeypatch.setattr(model, "_run_tower", running)
        monkeypatch.setattr(images, "requests", asking)
        return pair

    return watch


@pytest.fixture(
    scope="module",
    params=[(kind, options) for options in ({}, CUT) for kind in KINDS],
    ids=[f"{kind}{cut}" for cut in ("", "-cut") for kind in KINDS],
)
def pair(request, tmp_path_factory):
    kind, options = request.param
    pair = Pair(tmp_path_factory.mktemp(kind), kind, **options)
    yield pair
    del pair.llm


@pytest.mark.long
def test_every_method_keeps_the_same_tokens_and_answers_the_same(pair, watched):
    watched(pair)
    prompts = []
    for nth, method in enumerate(METHODS):
        for width, tokens in ((90, 3), (200, 11)):
            text = chat(IMAGE + QUESTIONS[nth % 2])
            prompts.append((text, [make_image(width, 120, seed=nth)], settings(method, tokens)))
    pair.check(prompts)


def mixed():
    """64 prompts of all kinds: some are plain vLLM's, some have two images, some a second turn."""
    # Images of a few pixels are left out: tokens of one are equal up to rounding, or have equal distances.
    sizes = [(44, 61), (400, 70), (70, 400), (57, 57), (31, 90), (300, 300), (120, 110), (56, 56)]
    images = [make_image(*size) for size in sizes]
    asked = [settings(method, tokens) for method in METHODS for tokens in (1, 6)]
    asked += [
        None,
        settings("adav", 8, min_share=0.0, temperature=0.1),
        settings("adav", 5, text_scope="turn"),
        settings("random", 5, seed=7),
        settings("fastervlm", 5, saliency="distance"),
        settings("cls", 300),
    ]
    drawn = random.Random(0)
    prompts = []
    for nth in range(64):
        own = drawn.sample(images, 2 if nth % 4 == 0 else 1)
        turn = "".join(IMAGE + drawn.choice(QUESTIONS) for _ in own)
        turns = (turn, drawn.choice(QUESTIONS)) if nth % 8 == 1 else (turn,)
        prompts.append((chat(*turns), own, asked[nth % len(asked)]))
    return prompts


@pytest.mark.long
def test_64_mixed_requests_at_once_in_any_order(pair, watched):
    watched(pair)
    prompts = mixed()
    for seed in range(2):
        random.Random(seed).shuffle(prompts)
        pair.check(prompts)


@pytest.mark.long
def test_the_same_image_twice_in_one_prompt(pair, watched):
    watched(pair)
    image, text = make_image(161, 147), chat(IMAGE + QUESTIONS[0] + IMAGE + QUESTIONS[2])
    pair.check([(text, [image, image], settings(method, 4)) for method in METHODS])


@pytest.mark.long
def test_questions_and_methods_share_the_tower(pair, watched):
    watched(pair)
    image, runs = make_image(177, 178), pair.tower_runs
    for method in METHODS:
        for text in QUESTIONS:
            pair.ask([(chat(IMAGE + text), [image], settings(method, 4))])
    assert pair.tower_runs == runs + 1


@pytest.mark.long
def test_questions_share_tokens_exactly_where_the_method_does_not_read_them(pair, watched):
    check_sharing(watched(pair), METHODS, lambda text: chat(IMAGE + text), lambda method: settings(method, 4), 180)


@pytest.mark.long
def test_wrong_settings_end_a_request_and_not_the_engine(pair):
    image, text = make_image(140, 140), chat(IMAGE + "Yes?")
    good = (text, [image], settings("cls", 3))
    for keys in (
        {"method": "fastv"},
        {"overall_tokens": 0},
        {"bogus": 1},
        {"method": "visionzip"},
        "adav_configs.json",
    ):
        with pytest.raises(VLLMValidationError):
            pair.ask([(text, [image], keys)])
    with pytest.raises(VLLMValidationError, match="2 image placeholders, but 1 images"):
        pair.ask([(chat(IMAGE + IMAGE), [image], good[2])])
    first, second = (pair.ask([good])[0].outputs[0].token_ids for _ in range(2))
    assert first == second


@pytest.mark.long
def test_the_processor_may_resize_an_image_as_a_request_asks(pair, watched):
    """The kept tokens are those of the grid that the model gets."""
    watched(pair)
    image, text = make_image(280, 280), chat(IMAGE + "Yes?")
    keys = {"adav": settings("none", 4), "max_pixels": 16 * 28**2, "min_pixels": 4 * 28**2}
    request = {"prompt": text, "multi_modal_data": {"image": image}, "mm_processor_kwargs": keys}
    (output,) = pair.llm.generate(request, SamplingParams(temperature=0, max_tokens=NEW), use_tqdm=False)
    assert output.prompt_token_ids.count(pair.model.config.image_token_id) == 16


@pytest.mark.long
def test_videos_of_a_prompt_are_left_alone(pair):
    video = np.stack([np.asarray(make_image(90, 90, seed=nth)) for nth in range(4)])
    about = {
        "fps": 2.0,
        "duration": 2.0,
        "total_num_frames": 4,
        "frames_indices": [0, 1, 2, 3],
        "video_backend": "opencv",
    }
    text = chat(IMAGE + "<|vision_start|><|video_pad|><|vision_end|>Yes?")

    def ask(keys):
        data = {"image": make_image(120, 150), "video": [(video, about | {"do_sample_frames": False})]}
        request = {"prompt": text, "multi_modal_data": data} | ({"mm_processor_kwargs": keys} if keys else {})
        (output,) = pair.llm.generate(request, SamplingParams(temperature=0, max_tokens=NEW), use_tqdm=False)
        counts = [output.prompt_token_ids.count(token) for token in tokens]
        return list(output.outputs[0].token_ids), counts

    tokens = pair.model.config.image_token_id, pair.model.config.video_token_id
    plain, (images, videos) = ask(None)
    assert ask({"adav": settings("none", 3)}) == (plain, [images, videos])
    assert ask({"adav": settings("cls", 3)})[1] == [3, videos]


# ----------------------------------------------------------------------------------------------------- other processes
SCRIPT = """
import json, sys
sys.path.insert(0, "tests/support")
from tiny_checkpoints import make_image
from tiny_qwen import IMAGE
from vllm import LLM, SamplingParams

def main():
    folder, options, settings = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    llm = LLM(folder, **options)
    prompts = [
        {"prompt": f"<|im_start|>user\\n{IMAGE}{question}<|im_end|>\\n", "multi_modal_data": {"image": make_image(90 + nth, 170)}}
        | ({"mm_processor_kwargs": {"adav": keys}} if keys else {})
        for keys in settings
        for nth, question in enumerate(("Yes?", "What colour is the shape on the left?"))
    ]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8, logprobs=5), use_tqdm=False)
    modules = llm.apply_model(lambda model: type(model).__module__) if options.get("tensor_parallel_size") is None else [""]
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    steps = [sorted((i, p.logprob) for i, p in step.items()) for o in outputs for step in o.outputs[0].logprobs]
    print("rows", json.dumps([modules[0], tokens, steps]))

if __name__ == "__main__":
    main()
"""


def found(folder, script, options, keys, **environment):
    """[module of the model's class, tokens, log-probabilities] of SCRIPT in a process of its own."""
    script.write_text(SCRIPT)  # workers are spawned, which needs a file
    return rows_of(str(script), str(folder), json.dumps(COMMON | options), json.dumps(keys), **environment)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_without_settings_nothing_changes_bit_for_bit(kind, tmp_path):
    save_qwen(tmp_path / "model", kind)
    (ours, *rows), (theirs, *plain) = (
        found(tmp_path / "model", tmp_path / "ask.py", {}, [None], VLLM_PLUGINS=plugins) for plugins in ("adav", "none")
    )
    assert ours == "llava.integrations.vllm.families.qwen_vl" and theirs.startswith("vllm.")
    assert rows == plain


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_two_tensor_parallel_ranks_answer_as_one(kind, tmp_path):
    save_qwen(tmp_path / "model", kind)
    keys = [settings(method, 7) for method in ("none", "cls", "adav", "fastervlm", "divprune")]
    # The engine runs in the script's own process, as in this one: each further process has to import vLLM first.
    one, two = (
        found(tmp_path / "model", tmp_path / "ask.py", {"tensor_parallel_size": ranks}, keys)[1] for ranks in (1, 2)
    )
    assert one == two


# -------------------------------------------------------------------------------------------------- features of the engine
@pytest.mark.parametrize(
    "changed, words",
    [
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
        ({"enable_dbo": True}, "--enable-dbo"),
        ({"speculative_config": object()}, "--speculative-config"),
        ({"pruning": True}, "--video-pruning-rate"),
        ({"cudagraph_mm_encoder": True}, "cudagraph_mm_encoder"),
        ({"compile_mm_encoder": True}, "compile_mm_encoder"),
        ({"tower_lora": True}, "--enable-tower-connector-lora"),
        ({}, None),
    ],
)
def test_features_of_the_engine_that_are_in_the_way_are_named(changed, words):
    off = dict.fromkeys(("enable_dbo", "cudagraph_mm_encoder", "compile_mm_encoder", "pruning", "tower_lora"), False)
    given = off | {"pipeline_parallel_size": 1, "speculative_config": None} | changed
    multimodal = SimpleNamespace(is_multimodal_pruning_enabled=lambda: given["pruning"])
    model = SimpleNamespace(multimodal_config=multimodal, hf_config=SimpleNamespace())
    rest = SimpleNamespace(**given, enable_tower_connector_lora=given["tower_lora"])
    config = SimpleNamespace(
        model_config=model,
        parallel_config=rest,
        compilation_config=rest,
        lora_config=rest,
        speculative_config=given["speculative_config"],
    )
    EngineCheck.verify_and_update_config(config)
    because = refused_because(model.hf_config)
    assert because is None if words is None else words in because


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_keys_of_a_request_replace_those_of_the_server(kind, tmp_path):
    pair = Pair(tmp_path, kind, mm_processor_kwargs={"adav": settings("cls", 5)})
    image, text = make_image(120, 190), chat(IMAGE + QUESTIONS[0])
    outputs = pair.ask(
        [(text, [image], None), (text, [image], {"method": "adav"}), (text, [image], {"overall_tokens": 2})]
    )
    for output, keys in zip(outputs, (settings("cls", 5), settings("adav", 5), settings("cls", 2)), strict=True):
        _, tokens = pair.expected(text, [image], keys)
        assert list(output.outputs[0].token_ids) == tokens, keys
        assert output.prompt_token_ids.count(pair.model.config.image_token_id) == keys["overall_tokens"]


@pytest.mark.long
def test_a_server_with_such_a_feature_refuses_settings_and_answers_without_them(tmp_path):
    save_qwen(tmp_path, "Qwen2_5_VL")
    llm = LLM(str(tmp_path), **COMMON, video_pruning_rate=0.5)
    request = {"prompt": chat(IMAGE + "Yes?"), "multi_modal_data": {"image": make_image(90, 90)}}
    for _ in range(2):
        with pytest.raises(VLLMValidationError, match="--video-pruning-rate"):
            llm.generate(request | {"mm_processor_kwargs": {"adav": settings("cls", 3)}}, use_tqdm=False)
        assert llm.generate(request, SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
