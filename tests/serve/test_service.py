"""The service: batches of waiting requests, answers of the engine, cancelling, failing, closing; and prompts of a chat."""

import gc
import threading

import pytest
import torch
from serve_cases import wait_for
from tiny_checkpoints import build_reference, make_image, save_llava_hf

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.conversation import default_conv_mode, single_turn
from llava.methods.index import method_names
from llava.methods.inside_llm import dropper_names
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.decoding.engine import Engine
from llava.model.decoding.sampling import Sampling
from llava.overlay.page import draw_overlay
from llava.serve.service.request import chat_prompt
from llava.serve.service.service import Busy, Closed, Failed, Request, Service, Turn

CONFIG = AdaVConfig(method="adav", overall_tokens=20)
ASKED = ("What colour is the circle?", "How many digits are there?", "Is the square red?")
PICTURES = [make_image(*size, seed=i) for i, size in enumerate([(97, 61), (200, 300), (120, 120)])]


class Gate:
    """Holds a service's model back at the start of each batch until it is opened: what waits then is known."""

    def __init__(self, service):
        self.open, self.sizes, self.entered = threading.Event(), [], threading.Semaphore(0)
        answer = service.model.answer

        def gated(jobs):
            self.sizes.append(len(jobs))
            self.entered.release()
            assert self.open.wait(60)
            return answer(jobs)

        service.model.answer = gated


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random one, which says a word at nearly every step and, its end token forgotten, as many as are asked for."""
    return save_llava_hf(build_reference("llava_next", seed=3), tmp_path_factory.mktemp("tiny"))


def serve(checkpoint, **settings):
    service = Service.load(checkpoint, config=CONFIG, device_map="cpu", **settings)
    service.model.engine.ends = set()
    return service


@pytest.fixture(scope="module")
def service(checkpoint):
    with serve(checkpoint) as service:
        yield service
        assert service.alive


@pytest.fixture
def gate(service):
    answer = service.model.answer
    gate = Gate(service)
    yield gate
    gate.open.set()
    service.model.answer = answer


def ask(question, *pictures, config=None, **sampling):
    return Request((Turn("user", question, pictures),), config, Sampling(**({"max_new_tokens": 6} | sampling)))


def alone(service, request):
    return service.submit(request).result(60)


def test_the_answer_is_the_engines(service, checkpoint):
    tokenizer, model, processor, _ = load_pretrained_model(checkpoint, device_map="cpu")
    engine = Engine(model, tokenizer)
    engine.ends = set()
    for question, picture in zip(ASKED, PICTURES, strict=True):
        prompt = single_turn(default_conv_mode(model.config, tokenizer), "<image>\n" + question)
        ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")
        prepared = model.prepare(ids, process_images([picture], processor, model.config), [picture.size], config=CONFIG)
        (expected,) = engine.generate(prepared, Sampling(6)).answers
        reply = service.submit(ask(question, picture))
        assert "".join(reply) == expected.text and list(reply) == []
        answered = reply.result()
        assert answered.text == expected.text and answered.finish == "length" and answered.new_tokens == 6
        assert answered.prompt_tokens == prepared.lengths[0] and answered.batch == 1
        (kept,), (selection,) = answered.images, prepared.selections[0]
        assert torch.equal(kept.selection.indices, selection.indices) and kept.plan.image_size == picture.size
        assert answered.vision_tokens == (20, selection.total)
        assert draw_overlay(picture, kept.plan, answered.side, {"adav": kept.selection}).width > 100
        assert set(answered.seconds) == {"waited", "first_token", "decode"} and min(answered.seconds.values()) > 0
        assert answered.tokens_per_second == 5 / answered.seconds["decode"]
        live, allocated = answered.kv_bytes
        assert 0 < live <= allocated and answered.prefill_flops > 0


def test_what_waits_together_is_a_batch(service, gate):
    """12 requests of two configurations behind one that runs: batches from the head, at most 8, and the answers of each alone."""
    other = AdaVConfig(method="fastv", overall_tokens=30)
    requests = [
        ask(ASKED[n % 3], PICTURES[n % 2], config=other if n in (2, 5) else None, max_new_tokens=2 + n)
        for n in range(12)
    ]
    first = service.submit(ask("Is it red?", PICTURES[2]))
    assert gate.entered.acquire(timeout=60)
    replies = [service.submit(request) for request in requests]
    assert service.stats()["waiting"] == 12 and service.stats()["running"] == 1
    gate.open.set()
    answers = [reply.result(60) for reply in replies]
    assert first.result().batch == 1
    assert [answered.batch for answered in answers] == [8, 8, 2, 8, 8, 2, 8, 8, 8, 8, 2, 2]
    assert gate.sizes == [1, 8, 2, 2]
    for request, together in zip(requests, answers, strict=True):
        single = alone(service, request)
        assert (single.text, single.new_tokens, single.prompt_tokens) == (
            together.text,
            together.new_tokens,
            together.prompt_tokens,
        )
        assert single.vision_tokens == together.vision_tokens and single.kv_bytes[0] == together.kv_bytes[0]
        assert all(
            torch.equal(a.selection.indices, b.selection.indices)
            for a, b in zip(single.images, together.images, strict=True)
        )


@pytest.mark.parametrize("method", method_names())
@pytest.mark.filterwarnings("ignore:no FitPrune table was fitted")
def test_every_method_is_served(service, method):
    config = AdaVConfig(method=method, overall_tokens=30, vision_adaptive_attention=True, text_pruning_flag=True)
    answered = alone(service, ask("Is <image> like <image>?", PICTURES[0], PICTURES[1], config=config))
    assert answered.new_tokens == 6 and len(answered.images) == 2
    kept, total = answered.vision_tokens
    assert kept == {"none": total, "no_image": 0, "downsample": 34}.get(method, 60)


def test_a_cache_that_keeps_nothing(service):
    nothing = AdaVConfig(method="none", h2o_heavy_share=0, h2o_recent_share=0)
    answered = alone(service, ask("Why?", config=nothing, max_new_tokens=1))
    assert answered.new_tokens == 1 and answered.kv_bytes == (0, 0)


def test_text_alone_and_a_conversation(service):
    turns = (Turn("system", "Be brief."), Turn("user", ASKED[0], (PICTURES[0],)), Turn("assistant", "red"))
    answered = alone(service, Request((*turns, Turn("user", "Why?")), sampling=Sampling(3)))
    assert len(answered.images) == 1 and answered.new_tokens == 3
    answered = alone(service, ask("Why?"))
    assert answered.images == () and answered.vision_tokens == (0, 0)


def test_cancelling(service, gate):
    runs, goes_on = (service.submit(ask(ASKED[0], PICTURES[0], max_new_tokens=n)) for n in (1000, 30))
    waits = service.submit(ask(ASKED[0], PICTURES[0], config=AdaVConfig(method="none")))
    assert gate.entered.acquire(timeout=60)
    before = service.stats()["waiting"]  # on a busy machine, goes_on may have missed the first batch
    waits.cancel()
    assert waits.result(5).finish == "cancelled" and list(waits) == [] and service.stats()["waiting"] == before - 1
    gate.open.set()
    next(iter(runs))
    runs.cancel()
    ended = runs.result(60)
    assert ended.finish == "cancelled" and 1 <= ended.new_tokens < 1000 and ended.text == runs.text
    assert goes_on.result(60).new_tokens == 30
    assert goes_on.result().text == alone(service, ask(ASKED[0], PICTURES[0], max_new_tokens=30)).text
    ended.seconds["decode"] = ended.kv_bytes  # a record of its own: nobody else's
    late = service.submit(ask(ASKED[1]))
    late.result(60)
    late.cancel()
    assert late.result().finish == "length"


def test_a_cancelled_batch_ends(service):
    reply = service.submit(ask(ASKED[0], PICTURES[0], max_new_tokens=1500))
    pieces = iter(reply)
    next(pieces)
    reply.cancel()
    assert "".join(pieces) != "" or reply.result().new_tokens < 1500
    wait_for(lambda: service.stats()["running"] == 0)


def test_full(service, gate):
    service.max_waiting = 2
    try:
        replies = [service.submit(ask(ASKED[0]))]
        assert gate.entered.acquire(timeout=60)
        replies += [service.submit(ask(ASKED[0])) for _ in range(2)]
        with pytest.raises(Busy, match="2 requests are waiting, which is as many as may wait"):
            service.submit(ask(ASKED[0]))
        replies[2].cancel()
        replies.append(service.submit(ask(ASKED[1])))
        gate.open.set()
        assert [reply.result(60).finish for reply in replies] == ["length", "length", "cancelled", "length"]
    finally:
        service.max_waiting = 64


def test_one_bad_request_fails_alone(service, gate):
    """The model breaks on one of three that run together: the others are answered, and the service goes on."""
    encode, poison = service.model.model.encode, make_image(33, 44)

    def breaks(pixels, sizes, *rest):
        if (33, 44) in sizes:
            raise RuntimeError("something broke\nat great length")
        return encode(pixels, sizes, *rest)

    service.model.model.encode = breaks
    try:
        first = service.submit(ask("Why?"))
        assert gate.entered.acquire(timeout=60)
        before = service.stats()
        replies = [service.submit(ask(ASKED[0], picture)) for picture in (PICTURES[0], poison, PICTURES[1])]
        gate.open.set()
        with pytest.raises(Failed, match=r"^the model failed on this request \(RuntimeError: something broke\)$"):
            list(replies[1])
        assert [replies[n].result(60).new_tokens for n in (0, 2)] == [6, 6] and first.result().finish == "length"
        assert gate.sizes[:2] == [1, 3] and sorted(gate.sizes[2:]) in ([1, 1, 1, 2], [1, 1, 2])
        wait_for(lambda: service.stats()["running"] == 0)
        after = service.stats()
        assert after["failed"] == before["failed"] + 1 and after["answered"] == before["answered"] + 3
    finally:
        service.model.model.encode = encode


def test_a_failure_in_the_middle(service):
    """After the first pieces there is no second try: the rows that were running fail."""
    engine = service.model.engine
    steps_for = engine.steps_for

    def breaking(cache, *others):
        steps = steps_for(cache, *others)

        def step(tokens):
            if cache.steps == 4:
                raise RuntimeError("broke")
            return steps(tokens)

        return step

    engine.steps_for = breaking
    try:
        reply = service.submit(ask(ASKED[0], PICTURES[0]))
        pieces = []
        with pytest.raises(Failed, match="broke"):
            pieces.extend(reply)
        with pytest.raises(Failed, match="broke"):
            reply.result()
        assert len(pieces) == 5
    finally:
        engine.steps_for = steps_for
    assert alone(service, ask(ASKED[0], PICTURES[0])).text.startswith(reply.text)


def test_nothing_of_a_request_stays(service):
    def live():
        wait_for(lambda: not service._running)
        gc.collect()
        tensors = [value for value in gc.get_objects() if isinstance(value, torch.Tensor)]
        return len(tensors), sum(tensor.nbytes for tensor in tensors), threading.active_count()

    counts = []
    for n in range(40):
        config = AdaVConfig(method=("adav", "fastv", "none", "visionzip")[n % 4], overall_tokens=20)
        replies = [service.submit(ask(ASKED[n % 3], PICTURES[n % 3], config=config)) for _ in range(2)]
        if n % 5 == 0:
            replies[0].cancel()
        assert replies[1].result(60).new_tokens == 6
        replies[0].result(60)
        del replies
        if n in (11, 39):
            counts.append(live())
    assert counts[0] == counts[1]


def test_pictures_are_encoded_once(checkpoint):
    """Within a batch always; from one request to the next where the service keeps them."""
    with serve(checkpoint, image_cache=1 << 24) as service:
        seen = []
        encode = service.model.model.encode
        service.model.model.encode = lambda pixels, sizes, *rest: (
            seen.append(len(sizes)) or encode(pixels, sizes, *rest)
        )
        gate = Gate(service)
        first = service.submit(ask("Why?"))
        assert gate.entered.acquire(timeout=60)
        replies = [service.submit(ask(question, PICTURES[0].copy())) for question in ASKED]
        gate.open.set()
        assert [reply.result(60).images_reused for reply in (first, *replies)] == [0, 0, 0, 0] and seen == [1]
        again = alone(service, ask(ASKED[0], PICTURES[0]))
        assert again.images_reused == 1 and seen == [1] and again.text == replies[0].result().text
        other = alone(service, ask(ASKED[0], PICTURES[0], config=AdaVConfig(method="visionzip", overall_tokens=40)))
        assert other.images_reused == 0 and seen == [1, 1]


@pytest.mark.parametrize("finish", [True, False])
def test_closing(checkpoint, finish):
    service = serve(checkpoint)
    gate = Gate(service)
    runs = service.submit(ask(ASKED[0], max_new_tokens=40))
    assert gate.entered.acquire(timeout=60)
    waits = service.submit(ask(ASKED[0]))
    closing = threading.Thread(target=service.close, args=(finish,))
    closing.start()
    with pytest.raises(Closed, match="the service was closed before the request's turn came"):
        waits.result(60)
    wait_for(lambda: finish or runs.cancelled)
    gate.open.set()
    closing.join(60)
    assert not closing.is_alive() and not service.alive
    answered = runs.result(0)
    assert (answered.finish, answered.new_tokens) == (("length", 40) if finish else ("cancelled", 0))
    with pytest.raises(Closed, match="the service has been closed"):
        service.submit(ask(ASKED[0]))
    service.close()


def test_prompts_that_are_too_long(service):
    with pytest.raises(
        UserError, match=r"the prompt has 1,1\d\d tokens, images included, allowed are 1,023: a shorter"
    ):
        service.submit(ask("red " * 1100))
    with pytest.raises(UserError, match=r"the prompt has 4,000,\d\d\d letters"):
        service.submit(ask("red " * 1_000_000))
    whole = AdaVConfig(method="none")
    with pytest.raises(UserError, match="fewer images or fewer vision tokens"):
        service.submit(ask("Why?", *[PICTURES[2]] * 13, config=whole))
    assert alone(service, ask("Why?", *[PICTURES[2]] * 13)).vision_tokens[0] == 13 * 20
    answered = alone(service, ask("red " * 900, max_new_tokens=1_000_000))
    assert answered.finish == "length" and answered.prompt_tokens + answered.new_tokens == 1024


def test_the_length_that_is_checked_is_the_length(service):
    for method in method_names():
        for size in ((97, 61), (200, 300), (120, 120)):
            for tokens in (20, 5000):
                config = AdaVConfig(method=method, overall_tokens=tokens)
                request = ask("Why?", make_image(*size), config=config, max_new_tokens=1)
                reply = service.submit(request)
                images = reply.result(60).images
                longest = service.model.longest(images[0].plan, config)
                inside = method in dropper_names()
                assert longest == (images[0].selection.total if inside else len(images[0].selection.indices))


def test_settings_of_a_request(service):
    assert service.configure({"overall_tokens": 7}) == AdaVConfig(method="adav", overall_tokens=7)
    for settings, words in (
        ({"tokens": 7}, 'adav: unknown key "tokens", allowed are method, overall_tokens'),
        ({"overall_tokens": 0}, '"overall_tokens" is 0, allowed is a whole number of at least 1'),
        ({"options": {"text_tower": "/etc"}}, '"options.text_tower" names a file'),
        ({"method": "fitprune", "options": {"table": "/etc/passwd"}}, '"options.table" names a file'),
    ):
        with pytest.raises(UserError, match=words):
            service.configure(settings)
    with pytest.raises(UserError, match='"original", but method "visionzip" makes tokens'):
        service.submit(ask("Why?", config=AdaVConfig(method="visionzip", options={"positions": "original"})))
    with pytest.raises(UserError, match="max_batch is 0, allowed is a whole number of at least 1"):
        Service(service.model, CONFIG, max_batch=0)


def test_listeners(service):
    heard = []
    reply = service.submit(ask(ASKED[0], PICTURES[0]), heard.append)
    reply.result(60)
    wait_for(lambda: heard and heard[-1] is None)
    assert "".join(heard[:-1]) == reply.text and len(heard) > 2

    def gone(piece):
        raise ValueError("nobody listens")

    reply = service.submit(ask(ASKED[0], PICTURES[0], max_new_tokens=1000), gone)
    assert reply.result(60).finish == "cancelled" and reply.result().new_tokens < 1000
    with pytest.raises(TimeoutError, match="no answer within 0.01 seconds"):
        service.submit(ask(ASKED[0], PICTURES[0], max_new_tokens=1000)).result(0.01)


# --- prompts ---------------------------------------------------------------------------------------------------------

IMAGE = make_image(4, 4)


@pytest.mark.parametrize(
    "template, expected",
    [
        ("vicuna_v1", "Be brief. USER: <image>\n<image>\nOne? ASSISTANT: Two.</s>USER: Why? ASSISTANT:"),
        (
            "chatml_direct",
            "<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\n<image>\n<image>\nOne?<|im_end|>"
            "<|im_start|>assistant\nTwo.<|im_end|><|im_start|>user\nWhy?<|im_end|><|im_start|>assistant\n",
        ),
        ("mistral_instruct", "[INST] Be brief.\n\n<image>\n<image>\nOne? [/INST] Two. </s>[INST] Why? [/INST]"),
    ],
)
def test_chat_prompt(template, expected):
    turns = [Turn("system", "Be brief."), Turn("user", "One?", (IMAGE, IMAGE)), Turn("assistant", "Two.")]
    assert chat_prompt(template, [*turns, Turn("user", "Why?")]) == expected
    assert chat_prompt(template, [Turn("user", "Why?")]) == single_turn(template, "Why?")
    assert chat_prompt(template, [Turn("user", "Is <image> it?", (IMAGE,))]) == single_turn(template, "Is <image> it?")


ROLES = {"s": "system", "u": "user", "a": "assistant"}


def conversation(*messages):
    """Turns of texts like "u: Why?"; an * in front of a text stands for an image that comes with it."""
    turns = []
    for message in messages:
        role, _, text = message.partition(": ")
        turns.append(Turn(ROLES[role], text.lstrip("*"), (IMAGE,) * text.count("*")))
    return turns


@pytest.mark.parametrize(
    "template, messages, expected",
    [
        # Empty answers: the cue alone, as in LLaVA.
        ("vicuna_v1", ["s: S", "u: A", "a: ", "u: B"], "S USER: A ASSISTANT:USER: B ASSISTANT:"),
        ("mistral_instruct", ["u: A", "a: ", "u: B"], "[INST] A [/INST][INST] B [/INST]"),
        (
            "chatml_direct",
            ["s: S", "u: A", "a: ", "u: B"],
            "<|im_start|>system\nS<|im_end|><|im_start|>user\nA<|im_end|><|im_start|>assistant\n"
            "<|im_start|>user\nB<|im_end|><|im_start|>assistant\n",
        ),
        ("vicuna_v1", ["s: S", "u: A", "a: "], "S USER: A ASSISTANT:"),  # a client's place for the answer
        # <image> is text where no image can be.
        ("vicuna_v1", ["s: S <image>", "u: A", "a: an <image>", "u: B"],
         "S < image > USER: A ASSISTANT: an < image ></s>USER: B ASSISTANT:"),
        # One role in a row: one message. Images stay where they came.
        ("vicuna_v1", ["s: S", "u: A", "u: B", "a: C", "a: D", "u: E"],
         "S USER: A\nB ASSISTANT: C\nD</s>USER: E ASSISTANT:"),
        ("mistral_instruct", ["u: *", "u: B"], "[INST] <image>\nB [/INST]"),
        ("mistral_instruct", ["u: A", "u: *Is <image> it?", "u: ", "u: *B"], "[INST] A\nIs <image> it?\n<image>\nB [/INST]"),
        # System texts: one, wherever they stand.
        ("vicuna_v1", ["s: S", "s: T", "u: A"], "S\nT USER: A ASSISTANT:"),
        ("vicuna_v1", ["u: A", "s: S", "u: B"], "S USER: A\nB ASSISTANT:"),
        ("mistral_instruct", ["u: A", "a: B", "u: C", "s: S", "s: "], "[INST] S\n\nA [/INST] B </s>[INST] C [/INST]"),
        # The assistant first or last.
        ("vicuna_v1", ["s: S", "a: Hi!", "u: A"], "S ASSISTANT: Hi!</s>USER: A ASSISTANT:"),
        ("vicuna_v1", ["s: S", "u: A", "a: B"], "S USER: A ASSISTANT: B</s>ASSISTANT:"),
        ("vicuna_v1", ["s: S", "a: B"], "S ASSISTANT: B</s>ASSISTANT:"),
    ],
)  # fmt: skip
def test_conversations_as_clients_send_them(template, messages, expected):
    assert chat_prompt(template, conversation(*messages)) == expected


@pytest.mark.parametrize(
    "template, turns, words",
    [
        ("vicuna_v1", [], "there is no message of the user or the assistant"),
        ("vicuna_v1", conversation("s: x"), "there is no message of the user or the assistant"),
        (
            "mistral_instruct",
            conversation("u: x", "a: y"),
            "the last message is the assistant's, but under the template",
        ),
        ("mistral_instruct", conversation("a: x", "u: y"), "the first message is the assistant's, but the template"),
        ("vicuna_v1", conversation("u: "), r"message 1 \(user\) is empty"),
        ("vicuna_v1", conversation("s: x", "u: y", "a: z", "u: "), r"message 4 \(user\) is empty"),
        ("vicuna_v1", conversation("u: x", "a: *y", "u: y"), "allowed are images of the user"),
        ("vicuna_v1", conversation("s: *x", "u: y"), "allowed are images of the user"),
        ("vicuna_v1", conversation("u: <image> x"), "places 1 images with <image>, but 0 came with it"),
        ("vicuna_v1", [Turn("user", "\ud800")], "half a character"),
    ],
)
def test_bad_conversations_are_sentences(template, turns, words):
    with pytest.raises(UserError, match=words):
        chat_prompt(template, turns)
