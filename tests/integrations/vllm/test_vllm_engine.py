"""The plugin inside vLLM's engine: kept patches and greedy tokens are those of load_pretrained_model, in any batch."""

import json
import os
import random
from dataclasses import replace

import pytest
import torch
from tiny_checkpoints import QUESTIONS, build_reference, make_image, save_llava_hf
from vllm_scripts import ROOT, rows_of
from vllm_sharing import check_sharing

pytest.importorskip("vllm.version", reason="vLLM is not installed here; make vllm makes an environment that has it")
# The engine runs in this process, so that its model can be looked into.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}

from vllm import LLM, SamplingParams  # noqa: E402
from vllm.exceptions import VLLMValidationError  # noqa: E402

from llava.config import AdaVConfig  # noqa: E402
from llava.conversation import single_turn  # noqa: E402
from llava.inference.loaded_checkpoint import LoadedCheckpoint  # noqa: E402
from llava.integrations.vllm.families import llava as plugin  # noqa: E402
from llava.integrations.vllm.processor import forget_images  # noqa: E402
from llava.integrations.vllm.prompt_images import TiledImages  # noqa: E402
from llava.methods.before_llm import SELECTORS  # noqa: E402
from llava.mm_utils import tile_plan, tokenizer_image_token  # noqa: E402
from llava.model.decoding.sampling import Sampling  # noqa: E402
from llava.model.export import load_and_save  # noqa: E402
from llava.model.image_tokens import PartLayout  # noqa: E402

pytestmark = pytest.mark.long
METHODS = sorted(set(SELECTORS) - {"no_image"})  # which is refused
NEW = 12  # tokens per answer
COMMON = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "limit_mm_per_prompt": {"image": 2}}


class Pair:
    """One checkpoint in vLLM and in our own engine. kept: what vLLM kept of each ImageRequest, its hash left out."""

    def __init__(self, folder, **options):
        self.loaded = LoadedCheckpoint(folder, config=AdaVConfig(method="none"))
        self.llm = LLM(str(folder), **COMMON, **options)
        tokenizer, processor = self.loaded.tokenizer, self.loaded.image_processor
        config = self.llm.llm_engine.model_config.hf_config
        self.images = TiledImages(config, processor.to_dict(), tokenizer, "tiny")
        self.kept, self.tower_runs, self.selected = {}, 0, 0

    def ids(self, text):
        return tokenizer_image_token(text, self.loaded.tokenizer, return_tensors="pt")

    def ask(self, prompts):
        """Token ids of the greedy answers to (text, images, keys or None for plain vLLM)."""
        requests = [{"prompt": text, "multi_modal_data": {"image": images}} for text, images, _ in prompts]
        for request, (_, _, keys) in zip(requests, prompts, strict=True):
            if keys is not None:
                request["mm_processor_kwargs"] = {"adav": keys}
        outputs = self.llm.generate(requests, SamplingParams(temperature=0, max_tokens=NEW), use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def expected(self, text, images, keys):
        """(Selection of each image, token ids of the answer) of our own engine."""
        config = AdaVConfig(**keys)
        encoded = self.loaded.encode([self.loaded.pixels(image, config) for image in images], config)
        prepared = self.loaded.prepare_ids([self.ids(text)], encoded, config)
        return prepared.selections[0], list(self.loaded.engine.generate(prepared, Sampling(NEW)).answers[0].tokens)

    def check(self, prompts):
        answers = self.ask(prompts)
        image_id = self.loaded.tokenizer.convert_tokens_to_ids("<image>")
        for (text, images, keys), answer in zip(prompts, answers, strict=True):
            selections, tokens = self.expected(text, images, keys)
            ids = self.ids(text)
            ids = ids.masked_fill(ids < 0, image_id).tolist()
            sizes = [image.size for image in images]
            asked = self.images.requests(ids, sizes, [""] * len(images), AdaVConfig(**keys))
            for request, selection in zip(asked, selections, strict=True):
                kept, expected = self.kept[request.to_bytes()], selection.indices
                if request.selector.resizes and (expected < 0).all():  # of a smaller picture, which has other patches
                    expected = torch.arange(len(expected))
                assert torch.equal(kept, expected), (request.method, request.size)
            # vLLM's answer ends with the end token, ours before it.
            assert answer[: len(tokens)] == tokens and len(answer) - len(tokens) in (0, 1), keys


@pytest.fixture
def watched(monkeypatch):
    """Makes a Pair see what the plugin does."""

    def watch(pair):
        select, run = plugin._SelectsTiles._select, plugin._SelectsTiles._run_tower

        def selecting(model, images, requests):
            found = select(model, images, requests)
            pair.selected += len(requests)
            for image, selection in zip(images, found, strict=True):
                if isinstance(image.places, PartLayout):  # the method left crops unencoded
                    image.places.in_whole_image(selection)
            pair.kept |= {
                replace(request, image="").to_bytes(): selection.indices
                for request, selection in zip(requests, found, strict=True)
            }
            return found

        def running(model, pixels, maps):
            pair.tower_runs += 1
            return run(model, pixels, maps)

        monkeypatch.setattr(plugin._SelectsTiles, "_select", selecting)
        monkeypatch.setattr(plugin._SelectsTiles, "_run_tower", running)
        return pair

    return watch


# Small steps, so that prompts and images are cut; and without shared prefixes.
CUT = {"enable_prefix_caching": False, "max_num_batched_tokens": 128, "max_num_seqs": 8}


@pytest.fixture(
    scope="module",
    params=[("llava", {}), ("llava_next", {}), ("llava", CUT), ("llava_next", CUT)],
    ids=["v1.5", "v1.6", "v1.5-cut", "v1.6-cut"],
)
def pair(request, tmp_path_factory):
    kind, options = request.param
    folder = tmp_path_factory.mktemp(kind)
    save_llava_hf(build_reference(kind, text="mistral" if options else "llama", hidden_size=128), folder, "published")
    pair = Pair(folder, **options)
    yield pair
    del pair.llm


def question(pair, text):
    return single_turn(pair.loaded.conversation, text)


def test_every_method_keeps_the_same_patches_and_answers_the_same(pair, watched):
    watched(pair)
    prompts = []
    for nth, method in enumerate(METHODS):
        for width, tokens in ((40, 5), (110, 11)):
            image = make_image(width + nth, 60)
            text = question(pair, "<image>\n" + QUESTIONS[nth % 2])
            prompts.append((text, [image], {"method": method, "overall_tokens": tokens}))
    pair.check(prompts)


def mixed(pair):
    """64 prompts of all kinds. Images of one size are one image: their size identifies them in `kept`."""
    sizes = [(1, 1), (3000, 70), (70, 3000), (57, 57), (31, 90), (2, 300), (120, 110), (56, 56)]
    images = [make_image(*size) for size in sizes]
    # A picture that is made smaller has at least one patch and a newline token.
    settings = [
        {"method": method, "overall_tokens": max(tokens, 2 if method == "downsample" else 1)}
        for method in METHODS
        for tokens in (1, 6, 12)
    ]
    settings += [
        {"method": "adav_zoom", "overall_tokens": 20, "options": {"crops": 1}},
        {"method": "adav_zoom", "overall_tokens": 7, "options": {"crop_share": 0.6}},
        {"method": "fastervlm", "overall_tokens": 9, "options": {"crops": 1}},
        {"method": "visionzip", "overall_tokens": 9, "options": {"crops": 2}},
        {"method": "downsample", "overall_tokens": 16},
        {"method": "adav", "overall_tokens": 8, "options": {"min_share": 0.0, "temperature": 0.1}},
        {"method": "adav", "overall_tokens": 12, "options": {"compat": "public"}},
        {"method": "adav", "overall_tokens": 5, "options": {"text_scope": "turn"}},
        {"method": "visionzip", "overall_tokens": 5, "options": {"dominant": 2, "contextual": 1}},
        {"method": "random", "overall_tokens": 5, "options": {"seed": 7}},
        {"method": "fastervlm", "overall_tokens": 5, "options": {"anyres": "fastervlm"}},
        {"method": "hiprune", "overall_tokens": 8, "options": {"compat": "public"}},
        {"method": "hiprune", "overall_tokens": 9, "options": {"anchor_share": 0.7}},
        {"method": "mmtok", "overall_tokens": 5, "options": {"text_scope": "turn"}},
    ]
    drawn = random.Random(0)
    prompts = []
    for nth in range(64):
        own = drawn.sample(images, 2 if nth % 4 == 0 else 1)
        text = "".join(f"<image>\n{drawn.choice(QUESTIONS)}\n" for _ in own)
        if nth % 8 == 1:  # a second turn
            text = question(pair, text) + " No</s>" + question(pair, drawn.choice(QUESTIONS)).removeprefix("<s>")
        else:
            text = question(pair, text)
        prompts.append((text, own, settings[nth % len(settings)]))
    return prompts


def test_64_mixed_requests_at_once_in_any_order(pair, watched):
    watched(pair)
    prompts = mixed(pair)
    for seed in range(2):
        random.Random(seed).shuffle(prompts)
        pair.check(prompts)


def test_the_same_image_twice_in_one_prompt(pair, watched):
    watched(pair)
    image, text = make_image(61, 47), question(pair, f"<image>\n{QUESTIONS[0]}<image>\n{QUESTIONS[2]}")
    pair.check([(text, [image, image], {"method": method, "overall_tokens": 4}) for method in METHODS])


def test_questions_and_methods_share_the_tower(pair, watched):
    watched(pair)
    # One run, and one more for attention maps, which the tower gives only to methods that read them. A smaller picture is
    # another one.
    whole = [method for method in METHODS if method != "downsample"]
    read_maps = [method for method in whole if "received" in SELECTORS[method]().tower_states]
    for image, methods, runs in ((make_image(77, 78), whole, 2), (make_image(78, 77), read_maps + whole, 1)):
        before = pair.tower_runs
        for method in methods:
            for text in QUESTIONS:
                pair.ask([(question(pair, "<image>\n" + text), [image], {"method": method, "overall_tokens": 4})])
        assert pair.tower_runs == before + runs


def test_a_method_that_zooms_shares_tiles_with_all_others(pair, watched):
    image, seen = make_image(79, 77), []  # five tiles on v1.6, one on v1.5
    run = plugin._SelectsTiles._run_tower
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugin._SelectsTiles, "_run_tower", lambda *given: (seen.append(len(given[1])), run(*given))[1])
        for keys in (
            {"method": "adav_zoom", "overall_tokens": 5, "options": {"crops": 1}},
            {"method": "adav_zoom", "overall_tokens": 4, "options": {"crops": 1}},
            {"method": "adav", "overall_tokens": 5},
            {"method": "adav_zoom", "overall_tokens": 5, "options": {"crops": 3}},
        ):
            pair.ask([(question(pair, "<image>\n" + QUESTIONS[0]), [image], keys)])
    tiles = tile_plan(image.size, pair.loaded.model.config).tiles
    assert sum(seen) == tiles, "each tile once"
    assert seen[:2] == [1, 1] if tiles > 1 else seen == [1]


def test_forgotten_images_are_encoded_anew(pair, watched):
    watched(pair)
    prompt, before = (question(pair, "<image>\nYes?"), [make_image(83, 84)], {"method": "adav"}), pair.tower_runs
    answers = [pair.ask([prompt]), pair.ask([prompt])]
    assert pair.tower_runs == before + 1
    pair.llm.reset_prefix_cache()
    pair.llm.reset_mm_cache()
    forget_images()
    answers.append(pair.ask([prompt]))
    assert pair.tower_runs == before + 2 and answers[0] == answers[1] == answers[2]


def test_questions_share_tokens_exactly_where_the_method_does_not_read_them(pair, watched):
    def settings(method):
        return {"method": method, "overall_tokens": 4}

    check_sharing(watched(pair), METHODS, lambda text: question(pair, "<image>\n" + text), settings, 80)


def test_wrong_settings_end_a_request_and_not_the_engine(pair):
    image, text = make_image(40, 40), question(pair, "<image>\nYes?")
    good = (text, [image], {"method": "cls", "overall_tokens": 3})
    for keys in ({"method": "fastv"}, {"overall_tokens": 0}, {"bogus": 1}, "adav_configs.json", {"method": "no_image"}):
        with pytest.raises(VLLMValidationError):
            pair.ask([(text, [image], keys)])
    with pytest.raises(VLLMValidationError, match="2 image placeholders, but 1 images"):
        pair.ask([("<image><image>", [image], good[2])])
    assert pair.ask([good]) == pair.ask([good])


def test_a_chat_request_does_not_read_the_checkpoint_again(tmp_path, monkeypatch):
    # vLLM makes a processor for each of them. Reading the checkpoint took two thirds of a short request.
    save_llava_hf(build_reference("llava", hidden_size=128), tmp_path, "published")
    llm = LLM(str(tmp_path), **COMMON, mm_processor_kwargs={"adav": {"method": "cls", "overall_tokens": 3}})
    read = []
    monkeypatch.setattr(plugin, "TiledImages", lambda *args: read.append(args))
    parts = [{"type": "image_pil", "image_pil": make_image(40, 40)}, {"type": "text", "text": "Yes?"}]
    template = single_turn("vicuna_v1", "{% for part in messages[0]['content'] if part['type'] == 'image' %}<image>{% endfor %}")
    sampling = SamplingParams(temperature=0, max_tokens=1)
    chat = {"chat_template": template, "chat_template_content_format": "openai", "use_tqdm": False}
    (output,) = llm.chat([{"role": "user", "content": parts}], sampling, **chat)
    image_id = llm.llm_engine.model_config.hf_config.image_token_index
    assert output.prompt_token_ids.count(image_id) == 3 and not read


# ----------------------------------------------------------------------------------------------------- without settings
PLAIN = """
import json, sys
sys.path.insert(0, "tests/support")
from tiny_checkpoints import make_image
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], **json.loads(sys.argv[2]))
images = [make_image(40, 60), make_image(300, 20)]
prompts = [{"prompt": "USER: <image>\\n Yes? ASSISTANT:", "multi_modal_data": {"image": image}} for image in images]
outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=6, logprobs=5), use_tqdm=False)
rows = [[sorted((i, p.logprob) for i, p in step.items()) for step in o.outputs[0].logprobs] for o in outputs]
print("rows", json.dumps([type(llm.llm_engine.model_executor.driver_worker.get_model()).__module__, rows]))
"""


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_without_settings_nothing_changes_bit_for_bit(kind, tmp_path):
    save_llava_hf(build_reference(kind, hidden_size=128), tmp_path, "published")
    found = []
    for plugins in ("adav", "none"):
        found.append(rows_of("-c", PLAIN, str(tmp_path), json.dumps(COMMON), VLLM_PLUGINS=plugins))
    (ours, rows), (theirs, plain) = found
    assert ours == "llava.integrations.vllm.families.llava" and theirs.startswith("vllm.")
    assert rows == plain


# --------------------------------------------------------------------------------------------------- demo checkpoints
@pytest.mark.parametrize("version, tokens", [("1.5", 14), ("1.6", 58)])
def test_demo_checkpoints_answer_the_same(version, tokens, tmp_path, watched):
    load_and_save(str(ROOT / f"playground/llava-shapes-v{version}"), None, str(tmp_path), "llava-hf", "float32")
    pair = watched(Pair(tmp_path))
    prompts = []
    for nth, method in enumerate(METHODS):
        image = make_image(100 + nth, 90)
        for text in ("What color is the circle?", "How many squares are there?"):
            text = question(pair, "<image>\n" + text)
            prompts.append((text, [image], {"method": method, "overall_tokens": tokens}))
    pair.check(prompts)


# ------------------------------------------------------------------------------------------------------------- long runs
SOAK = """
import gc, json, os, random, sys
sys.path.insert(0, "tests/support")
import torch
from tiny_checkpoints import QUESTIONS, make_image
from vllm import LLM, SamplingParams
from llava.integrations.vllm import prompt_images

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def tensors():
    gc.collect()
    found = [one.untyped_storage() for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter)]
    return sum({one.data_ptr(): one.nbytes() for one in found}.values())

# Small caches, so that they are full long before the end.
prompt_images.PIXEL_BYTES = 1 << 20
small = {"mm_processor_cache_gb": 0.01, "num_gpu_blocks_override": 32}
llm = LLM(sys.argv[1], additional_config={"adav": {"tower_bytes": 1 << 20}}, **small, **json.loads(sys.argv[2]))
methods, batches = json.loads(sys.argv[3]), int(sys.argv[4])
drawn, rows = random.Random(1), []
for _ in range(batches):
    prompts = [
        {
            "prompt": f"USER: <image>\\n{drawn.choice(QUESTIONS)} ASSISTANT:",
            "multi_modal_data": {"image": make_image(drawn.randint(1, 200), drawn.randint(1, 200), seed=nth % 3)},
            "mm_processor_kwargs": {"adav": {"method": drawn.choice(methods), "overall_tokens": drawn.randint(1, 30)}},
        }
        for nth in range(50)
    ]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    assert all(output.outputs[0].token_ids for output in outputs)
    rows.append([resident() >> 10, tensors() >> 10])
print("rows", json.dumps(rows))
"""
# oneDNN, which computes on CPUs, keeps the code of its last 1,024 shapes. It would make new code during the whole soak.
STEADY = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16", "MALLOC_MMAP_THRESHOLD_": "65536"}


WARM_UP = 8  # batches of 50 requests


def test_memory_of_the_process_is_stable_over_1000_requests(tmp_path):
    save_llava_hf(build_reference("llava_next", hidden_size=128), tmp_path, "published")
    arguments = [str(tmp_path), json.dumps(COMMON), json.dumps(METHODS)]
    rows = rows_of("-c", SOAK, *arguments, str(WARM_UP + 20), **STEADY)
    for name, kibibytes in zip(("resident", "tensors"), zip(*rows, strict=True), strict=True):
        after = kibibytes[WARM_UP - 1 :]
        assert max(after) <= 1.05 * after[0], (name, kibibytes)


RANKS = """
import json, sys
sys.path.insert(0, "tests/support")
from tiny_checkpoints import make_image
from vllm import LLM, SamplingParams

def main():
    llm = LLM(sys.argv[1], tensor_parallel_size=int(sys.argv[3]), **json.loads(sys.argv[2]))
    prompts = [
        {
            "prompt": f"USER: <image>\\n {question} ASSISTANT:",
            "multi_modal_data": {"image": make_image(90 + nth, 70)},
            "mm_processor_kwargs": {"adav": {"method": method, "overall_tokens": 7}},
        }
        for method in ("none", "cls", "adav", "fastervlm", "visionzip", "hiprune", "mmtok")
        for nth, question in enumerate(("Yes?", "What colour is the shape on the left?"))
    ]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    print("rows", json.dumps([list(output.outputs[0].token_ids) for output in outputs]))

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_two_tensor_parallel_ranks_answer_as_one(kind, tmp_path):
    save_llava_hf(build_reference(kind, hidden_size=128), tmp_path / "model", "published")
    script = tmp_path / "ranks.py"  # workers are spawned, which needs a file
    script.write_text(RANKS)
    # The engine runs in the script's own process, as in this one: each further process has to import vLLM first.
    one, two = (rows_of(str(script), str(tmp_path / "model"), json.dumps(COMMON), ranks) for ranks in ("1", "2"))
    assert one == two
