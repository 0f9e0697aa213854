"""The OpenAI-compatible API over HTTP: the official client, batches, malformed requests, limits, a full queue, gone
clients, and SIGTERM."""

import base64
import copy
import gc
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_serve_images import png_header
from tiny_checkpoints import build_reference, make_image, save_llava_hf

from llava.config import AdaVConfig
from llava.model.sampling import Sampling
from llava.serve.images import ImageLimits
from llava.serve.service import Request, Service, Turn

EXTRA = "needs the extras of make test-all"
pytest.importorskip("fastapi", reason=EXTRA)
uvicorn = pytest.importorskip("uvicorn", reason=EXTRA)
openai = pytest.importorskip("openai", reason=EXTRA)
httpx = pytest.importorskip("httpx", reason=EXTRA)

from llava.serve.api import listen  # noqa: E402
from llava.serve.api_app import make_app  # noqa: E402
from llava.serve.openai_chat import Server  # noqa: E402

CONFIG = AdaVConfig(method="adav", overall_tokens=20)
SIZES = [(97, 61), (60, 90), (50, 50), (120, 40)]
QUESTIONS = ("What colour is the circle?", "How many digits are there?", "Is the square on the left red?")
MODEL = "tiny"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random one that never says its end token, so that answers are as long as is asked for."""
    reference = build_reference("llava_next", seed=3)
    reference.lm_head.weight.data[reference.generation_config.eos_token_id] = 0  # some other logit is above 0
    return save_llava_hf(reference, tmp_path_factory.mktemp("api") / MODEL)


class Running:
    """A server in this process, on a free port."""

    def __init__(self, service, server, key=None):
        self.service = service
        self.socket = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        app = make_app(service, server, key)
        settings = uvicorn.Config(app, http="h11", ws="none", lifespan="on", log_level="warning", access_log=False)
        self.server = uvicorn.Server(settings)
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)
        self.thread.start()
        wait_for(lambda: self.server.started)
        self.key = key or "none"
        self.connect()

    def connect(self):
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.client = openai.OpenAI(base_url=self.url + "/v1", api_key=self.key, max_retries=0, timeout=60)

    def close(self):
        self.client.close()
        self.http.close()
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive() and not self.service.alive

    def post(self, body, **options):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        options = {"headers": {"Content-Type": "application/json"}} | options
        return self.http.post("/v1/chat/completions", content=content, **options)


def serve(checkpoint, **settings):
    return Service.load(checkpoint, config=CONFIG, device_map="cpu", **settings)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder that images may come from, with a link that leads out of it."""
    folder = tmp_path_factory.mktemp("images")
    make_image(97, 61).save(folder / "a.png")
    (folder / "out.png").symlink_to(Path(__file__).resolve())
    return folder


@pytest.fixture(scope="module")
def running(checkpoint, images):
    limits = ImageLimits(max_bytes=100_000, max_pixels=200_000)
    server = Server(MODEL, limits, (images,), max_tokens=6, max_body=400_000, read_seconds=2.0)
    running = Running(serve(checkpoint), server)
    yield running
    running.close()


def wait_for(condition):
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("what was waited for did not come")


def written(image, kind="PNG"):
    stream = BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def data_url(image):
    return "data:image/png;base64," + base64.b64encode(written(image)).decode()


def user(text, *pictures):
    parts = [{"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in pictures]
    return {"role": "user", "content": [{"type": "text", "text": text}, *parts]}


def body(**changes):
    return {"model": MODEL, "messages": [{"role": "user", "content": "Why?"}], "max_tokens": 3} | changes


def direct(service, text, *pictures, config=None, **sampling):
    sampling = Sampling(**({"max_new_tokens": 6} | sampling))
    return service.submit(Request((Turn("user", text, pictures),), config, sampling)).result(60)


# --- the official client ----------------------------------------------------------------------------------------------


def test_chat(running):
    picture = make_image(97, 61)
    answer = running.client.chat.completions.create(model=MODEL, messages=[user(QUESTIONS[0], picture)], max_tokens=9)
    expected = direct(running.service, QUESTIONS[0], picture, max_new_tokens=9)
    (choice,) = answer.choices
    assert choice.message.content == expected.text and choice.message.role == "assistant"
    assert choice.finish_reason == "length" and answer.object == "chat.completion" and answer.model == MODEL
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (expected.prompt_tokens, 9)
    assert answer.usage.total_tokens == expected.prompt_tokens + 9
    measured = answer.model_extra["adav"]
    assert measured["vision_tokens"] == {"kept": 20, "of": expected.vision_tokens[1]} and measured["method"] == "adav"
    assert measured["kv_bytes"]["live"] == expected.kv_bytes[0] and measured["batch"] == 1
    assert set(measured["seconds"]) == {"waited", "first_token", "decode"} and measured["tokens_per_second"] > 0


def test_a_conversation_with_settings_of_its_own(running):
    picture = make_image(50, 50)
    answer = running.client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "developer", "content": "Be brief."},
            user("Is it <image>?", picture),
            {"role": "assistant", "content": "red", "refusal": None, "tool_calls": None},
            {"role": "user", "content": "Why?"},
        ],
        max_completion_tokens=7,
        extra_body={"adav": {"method": "fastervlm", "overall_tokens": 5}},
        user="somebody",
        frequency_penalty=0,
        response_format={"type": "text"},
    )
    turns = (Turn("system", "Be brief."), Turn("user", "Is it <image>?", (picture,)), Turn("assistant", "red"))
    config = AdaVConfig(method="fastervlm", overall_tokens=5)
    request = Request((*turns, Turn("user", "Why?")), config, Sampling(7))
    assert answer.choices[0].message.content == running.service.submit(request).result(60).text
    assert answer.model_extra["adav"]["vision_tokens"]["kept"] == 5


def test_streaming(running):
    picture = make_image(60, 90)
    asked = {"model": MODEL, "messages": [user(QUESTIONS[1], picture)], "max_tokens": 12}
    whole = running.client.chat.completions.create(**asked)
    chunks = list(running.client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].object == "chat.completion.chunk"
    pieces = [chunk.choices[0].delta.content for chunk in chunks[1:-2]]
    assert "".join(pieces) == whole.choices[0].message.content and len(pieces) > 5
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-2].model_extra["adav"]["vision_tokens"]["kept"] == 20
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage and len({chunk.id for chunk in chunks}) == 1
    chunks = list(running.client.chat.completions.create(**asked, stream=True))
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in chunks)


def test_sampling_and_stop(running):
    asked = {"model": MODEL, "messages": [user(QUESTIONS[0], make_image(50, 50))], "max_tokens": 12}
    drawn = [
        running.client.chat.completions.create(**asked, temperature=1.5, top_p=0.9, seed=seed) for seed in (1, 1, 2, -2)
    ]
    texts = [answer.choices[0].message.content for answer in drawn]
    assert texts[0] == texts[1] and len(set(texts)) == 3
    assert running.client.chat.completions.create(**asked, temperature=1e-9, top_p=1e-300).choices  # greedy by then
    words = texts[0].split()
    stopped = running.client.chat.completions.create(**asked, temperature=1.5, top_p=0.9, seed=1, stop=[words[4]])
    assert stopped.choices[0].finish_reason == "stop" and words[4] not in stopped.choices[0].message.content
    assert texts[0].startswith(stopped.choices[0].message.content)


def test_images_of_the_folder(running, images):
    expected = direct(running.service, QUESTIONS[0], make_image(97, 61)).text
    for url in ("a.png", str(images / "a.png"), f"file://{images}/a.png"):
        parts = [{"type": "text", "text": QUESTIONS[0]}, {"type": "image_url", "image_url": {"url": url}}]
        answer = running.client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": parts}])
        assert answer.choices[0].message.content == expected


def test_models(running):
    assert [model.id for model in running.client.models.list()] == [MODEL]
    assert running.client.models.retrieve(MODEL).owned_by == "adav"
    with pytest.raises(openai.NotFoundError, match="there is no such model here, allowed is tiny"):
        running.client.models.retrieve("gpt/4")


def test_errors_of_the_client(running):
    create = running.client.chat.completions.create
    why = [{"role": "user", "content": "Why?"}]
    with pytest.raises(openai.NotFoundError, match='there is no model "gpt-4" here, allowed is tiny') as error:
        create(model="gpt-4", messages=why)
    assert error.value.code == "model_not_found" and error.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="n is not 1") as error:
        create(model=MODEL, messages=why, n=2)
    assert error.value.type == "invalid_request_error" and error.value.param == "n"
    with pytest.raises(openai.BadRequestError, match="tokens, images included, allowed are 1,023") as error:
        create(model=MODEL, messages=[{"role": "user", "content": "red " * 2000}])
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match='adav: unknown key "tokens", allowed are method'):
        create(model=MODEL, messages=why, extra_body={"adav": {"tokens": 3}})
    with pytest.raises(openai.BadRequestError, match='"overall_tokens" is 0, allowed is a whole number of at least 1'):
        create(model=MODEL, messages=why, stream=True, extra_body={"adav": {"overall_tokens": 0}})


# --- requests that arrive together ------------------------------------------------------------------------------------


def test_32_at_once_are_answered_as_one_by_one(running):
    """Different images, questions, lengths and three configurations: the texts of each alone, from batches that were
    larger than 1."""
    settings = ({}, {"method": "fastv", "overall_tokens": 9}, {"method": "none", "vision_adaptive_attention": True})
    asked = [
        {
            "model": MODEL,
            "messages": [user(QUESTIONS[n % 3] + " red" * (n % 4), make_image(*SIZES[n % 4], seed=n))],
            "max_tokens": 5 + n % 7,
            "extra_body": {"adav": settings[n % 5 // 2]},
        }
        for n in range(32)
    ]

    def text_of(fields):
        if fields["max_tokens"] % 2:
            stream = running.client.chat.completions.create(**fields, stream=True)
            chunks = list(stream)
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks), chunks[-1].model_extra["adav"]
        answer = running.client.chat.completions.create(**fields)
        return answer.choices[0].message.content, answer.model_extra["adav"]

    alone = [text_of(fields) for fields in asked]
    assert all(measured["batch"] == 1 for _, measured in alone)
    before = running.service.stats()["batches"]
    with ThreadPoolExecutor(32) as threads:
        together = list(threads.map(text_of, asked))
    assert [text for text, _ in together] == [text for text, _ in alone]
    assert len({text for text, _ in alone}) > 16
    assert sum(measured["batch"] > 1 for _, measured in together) >= 16
    after = running.service.stats()["batches"]
    new = {size: count - before.get(size, 0) for size, count in after.items()}
    assert sum(size * count for size, count in new.items()) == 32 and sum(new.values()) <= 16
    assert [m["vision_tokens"] for _, m in together] == [m["vision_tokens"] for _, m in alone]


# --- malformed requests -----------------------------------------------------------------------------------------------


def with_image(url):
    return body(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])


def url_of(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@pytest.mark.parametrize(
    "sent, status, words",
    [
        (b"", 400, "the body is not JSON"),
        (b"{", 400, "the body is not JSON (line 1, column 2"),
        (b"\xff\xfe{}", 400, "the body is not UTF-8 (byte 0)"),
        (b"[1]", 400, "the body is a list, allowed is a JSON object"),
        (b'{"seed": NaN}', 400, "NaN is no JSON"),
        (b"[" * 100_000, 400, "nests deeper than 32"),
        (b'{"a":' * 50 + b"1" + b"}" * 50, 400, "nests deeper than 32"),
        (b'{"seed": ' + b"9" * 5000 + b"}", 400, "the body is not JSON"),
        (b"{}", 400, "messages is missing or empty"),
        (body(nonsense=1), 400, 'unknown field "nonsense", allowed are model, messages'),
        (body(messages="Why?"), 400, "messages is a string, allowed is a list"),
        (body(messages=[3]), 400, "messages[0] is 3, allowed is an object"),
        (body(messages=[{"role": "tool", "content": "x"}]), 400, 'messages[0].role is "tool", allowed are system'),
        (body(messages=[{"role": ["user"], "content": "x"}]), 400, "messages[0].role is a list"),
        (
            body(messages=[{"role": "user", "content": 3}]),
            400,
            "messages[0].content is 3, allowed is a string or a list",
        ),
        (body(messages=[{"role": "user", "content": [{"type": "video"}]}]), 400, "messages[0].content[0] is no part"),
        (body(messages=[{"role": "user", "content": ""}]), 400, "message 1 (user) is empty"),
        (body(messages=[{"role": "user", "content": "\ud800"}]), 400, "half a character"),
        (body(messages=[{"role": "user", "content": "<image>?"}]), 400, "places 1 images with <image>, but 0 came"),
        (body(messages=[{"role": "user", "content": "x", "tool_calls": [3]}]), 400, 'has the field "tool_calls"'),
        (body(temperature=3), 400, "temperature is 3, allowed is a number from 0 to 2"),
        (body(temperature="hot"), 400, "temperature is a string, allowed is a number"),
        (body(top_p=0), 400, "top_p is 0, allowed is a number above 0, at most 1"),
        (body(max_tokens=0), 400, "max_tokens is 0, allowed is a whole number of at least 1"),
        (body(max_tokens=True), 400, "max_tokens is true or false, allowed is a whole number"),
        (body(seed=2**64), 400, "seed is out of range"),
        (body(stop=["a", "b", "c", "d", "e"]), 400, "stop is not a string or a list of up to 4"),
        (body(stream_options={"include_usage": True}), 400, "stream_options go with stream: true"),
        (body(tools=[{"type": "function"}]), 400, "tools is not supported, allowed is []"),
        (body(logprobs=True), 400, "logprobs is not supported, allowed is false"),
        (body(presence_penalty=0.5), 400, "presence_penalty is not supported, allowed is 0"),
        (body(response_format={"type": "json_object"}), 400, "response_format is not supported"),
        (body(adav=3), 400, "adav is 3, allowed is an object"),
        (body(adav={"method": "magic"}), 400, '"method" is "magic", allowed is one of'),
        (body(adav={"overall_tokens": 10**10}), 400, "a number that is out of all range"),
        (body(adav={"options": {"text_tower": "/etc"}}), 400, '"options.text_tower" names a file'),
        (body(adav={"options": {"magic": 1}}), 400, 'adav: unknown option "magic"'),
        (body(adav={"method": "fastv", "options": {"layer": 99}}), 400, "layer"),
        (with_image("http://127.0.0.1:1/a.png"), 400, "http addresses are not fetched: send the image as a data URL"),
        (with_image("HTTPS://example.com/a.png"), 400, "https addresses are not fetched"),
        (with_image("ftp://example.com/a.png"), 400, "is not a file below a folder that images may come from"),
        (with_image("../../../etc/passwd"), 400, "is not a file below a folder"),
        (with_image("/etc/passwd"), 400, "is not a file below a folder"),
        (with_image("file:///etc/passwd"), 400, "is not a file below a folder"),
        (with_image("out.png"), 400, "is not a file below a folder"),
        (with_image("file://%2e%2e/etc/passwd"), 400, "is not a file below a folder"),
        (with_image(3), 400, "image_url is an object, allowed is"),
        (with_image("data:text/html;base64,PGI+"), 400, "a data URL that begins with 'data:text/html"),
        (with_image("data:image/png;base64,%%%"), 400, "base64 cannot be read"),
        (with_image(url_of(b"%PDF-1.4")), 400, "not an image that can be read"),
        (with_image(url_of(written(make_image(60, 60))[:2000])), 400, "damaged or cut short"),
        (with_image(url_of(png_header(50_000, 50_000))), 400, "pixels"),
        (with_image(url_of(png_header(9_000, 20))), 400, "9,000 x 20 pixels, allowed are 8,192 for the longer side"),
        (with_image(url_of(png_header(500, 401))), 400, "500 x 401 pixels, allowed are 200,000 pixels altogether"),
        (with_image(url_of(b"x" * 100_001)), 400, "bytes, allowed are 100,000"),
        (body(messages=[user("x", *[Image.new("1", (300, 300))] * 3)]), 400, "allowed are 20,000 pixels altogether"),
        (b" " * 400_001, 413, "the request has more than 400,000 bytes"),
    ],
    ids=range(57),
)
def test_refused_in_the_clients_shape(running, sent, status, words):
    response = running.post(sent)
    error = response.json()["error"]
    assert response.status_code == status and words in error["message"], response.text
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert len(error["message"]) < 1500 and "\n" not in error["message"] and "Traceback" not in error["message"]


def test_refused_by_route_and_type(running):
    for method, path, status in (
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/", 404),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("GET", "/health/", 404),
        ("GET", "/v1/../../etc/passwd", 404),
        ("OPTIONS", "/v1/chat/completions", 405),
        ("POST", "/metrics", 405),
    ):
        response = running.http.request(method, path, headers={"Host": "[", "Origin": "http://elsewhere"})
        assert response.status_code == status and response.json()["error"]["message"].startswith(method)
        assert "access-control-allow-origin" not in response.headers
    response = running.post(body(), headers={"Content-Type": "text/plain"})
    assert response.status_code == 415 and "allowed is application/json" in response.json()["error"]["message"]


def test_a_body_without_a_length(running):
    """Chunked: what is too much is refused when it has come, and what does not come is not waited for."""

    def parts():
        for _ in range(50):
            yield b" " * 10_000

    headers = {"Content-Type": "application/json"}
    response = running.http.post("/v1/chat/completions", content=parts(), headers=headers)
    assert response.status_code == 413

    def slow():
        yield b"{"
        time.sleep(3)
        yield b"}"

    response = running.http.post("/v1/chat/completions", content=slow(), headers=headers)
    assert response.status_code == 408 and "did not come within 2 seconds" in response.json()["error"]["message"]


def mutations(count, seed):
    """Bodies that are broken somewhere: seeded, from whole requests."""
    draw = random.Random(seed)
    picture = data_url(make_image(50, 50))
    junk = [
        None,
        True,
        -1,
        0,
        3.5,
        1e308,
        10**30,
        -(10**18),
        "",
        "x" * 3000,
        "\ud800",
        "\0",
        [],
        {},
        [[[[1]]]],
        {"a": {"b": [{}]}},
    ]
    junk += [
        "data:image/png;base64," + "A" * 99,
        "data:,",
        "file:///dev/zero",
        "//",
        "1e999",
        ["\udfff"],
        {"": None},
        2**31,
        1e-300,
    ]

    def whole():
        return {
            "model": MODEL,
            "messages": [
                {"role": "system", "content": "Be brief."},
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "What?"},
                        {"type": "image_url", "image_url": {"url": picture}},
                    ],
                },
                {"role": "assistant", "content": "red"},
                {"role": "user", "content": "Why?"},
            ],
            "max_tokens": 3,
            "temperature": 0.5,
            "top_p": 0.9,
            "stop": ["zzz"],
            "seed": 1,
            "n": 1,
            "stream": draw.random() < 0.5,
            "adav": {
                "method": draw.choice(["adav", "fastv", "visionzip", "sparsevlm", "adav_cover", "divprune"]),
                "overall_tokens": 9,
                "vision_adaptive_attention": True,
                "text_pruning_flag": True,
                "options": draw.choice(
                    [
                        {},
                        {"temperature": 0.1},
                        {"min_share": 0.2},
                        {"alpha": 2},
                        {"strength": 1},
                        {"layer": 1},
                        {"keep": [30, 20, 10]},
                    ]
                ),
            },
        }

    def places(value, path=()):
        yield path
        for key, inner in (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        ):
            yield from places(inner, (*path, key))

    def changed(value):
        path = draw.choice([path for path in places(value) if path])
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        kind, old = draw.randrange(4), holder[path[-1]]
        if kind == 0:
            del holder[path[-1]]
        elif kind == 1 and isinstance(old, str) and len(old) > 2:
            at = draw.randrange(len(old))
            holder[path[-1]] = (
                old[:at] + draw.choice(["", "%", "\n", "=", "é", "<image>", "</s>", "\0"]) + old[at + 1 :]
            )
        elif kind == 2 and isinstance(holder, dict):
            holder[draw.choice([*holder, "options", "name", "layer", "text_init_cache", "prefill_filter_layer"])] = (
                copy.deepcopy(draw.choice(junk))
            )
        else:
            holder[path[-1]] = copy.deepcopy(draw.choice(junk))

    for n in range(count):
        value = whole()
        for _ in range(draw.randrange(1, 4)):
            changed(value)
        data = json.dumps(value).encode()
        if n % 5 == 4:
            data = bytearray(data)
            for _ in range(draw.randrange(1, 6)):
                data[draw.randrange(len(data))] = draw.randrange(256)
            data = bytes(data[: draw.randrange(len(data))] if draw.random() < 0.4 else data)
        yield data


def test_fuzzed_requests_do_no_harm(running):
    """No 5xx, whatever comes, and nothing of it stays: threads, open files and tensors are as before."""

    def state():
        wait_for(lambda: not running.service._running and running.service.stats()["waiting"] == 0)
        running.client.close()
        running.http.close()
        running.connect()
        wait_for(lambda: not running.server.server_state.connections)
        gc.collect()
        tensors = sum(isinstance(value, torch.Tensor) for value in gc.get_objects())
        return tensors, len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

    def send(requests):
        statuses = []
        for data in requests:
            response = running.post(data)
            statuses.append(response.status_code)
            assert response.status_code < 500, (data[:3000], response.text)
            if response.status_code >= 400:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}
            elif response.headers["content-type"].startswith("text/event-stream"):
                assert response.text.endswith("data: [DONE]\n\n"), (data[:3000], response.text)
        return statuses

    send(mutations(40, seed=7))  # what is loaded and kept once
    before = state()
    statuses = send(mutations(200, seed=8))
    assert state() == before
    assert len(statuses) == 200 and statuses.count(400) > 100 and statuses.count(200) > 10
    assert running.client.chat.completions.create(**body()).usage.completion_tokens == 3
    failed = running.service.stats()["failed"]
    assert failed == 0


# --- queue, clients that go, keys -------------------------------------------------------------------------------------


class Gate:
    """Holds the model back at the start of each batch until it is opened."""

    def __init__(self, service):
        self.open, self.entered = threading.Event(), threading.Semaphore(0)
        answer = service.model.answer

        def gated(jobs):
            self.entered.release()
            assert self.open.wait(60)
            return answer(jobs)

        service.model.answer = gated


@pytest.fixture
def gated(checkpoint):
    running = Running(serve(checkpoint, max_waiting=2), Server(MODEL, max_tokens=5))
    gate = Gate(running.service)
    yield running, gate
    gate.open.set()
    running.close()


def test_a_full_queue(gated):
    running, gate = gated
    with ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(running.post, body())]
        assert gate.entered.acquire(timeout=60)
        asked += [threads.submit(running.post, body(stream=bool(n))) for n in range(2)]
        wait_for(lambda: running.service.stats()["waiting"] == 2)
        response = running.post(body())
        assert response.status_code == 429 and response.headers["retry-after"] == "1"
        assert response.json()["error"]["code"] == "queue_full"
        with pytest.raises(openai.RateLimitError, match="2 requests are waiting, which is as many as may wait"):
            running.client.chat.completions.create(**body())
        gate.open.set()
        assert [one.result(60).status_code for one in asked] == [200] * 3


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_row(running, stream):
    """Whether it listens to a stream or waits for the whole: the row ends at the next step, long before its 900 tokens."""
    before = running.service.stats()
    client = httpx.Client(base_url=running.url, timeout=httpx.Timeout(30, read=30 if stream else 0.3))
    asked = json.dumps(body(stream=stream, max_tokens=900)).encode()
    headers = {"Content-Type": "application/json"}
    slow = running.service.model.engine.steps_for

    def slower(cache):
        steps = slow(cache)

        class Slow:
            cache = steps.cache

            def __call__(self, tokens):
                time.sleep(0.01)
                return steps(tokens)

        return Slow()

    running.service.model.engine.steps_for = slower
    try:
        if stream:
            with client.stream("POST", "/v1/chat/completions", content=asked, headers=headers) as response:
                assert next(response.iter_lines()).startswith("data: ")
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/chat/completions", content=asked, headers=headers)
        client.close()
        wait_for(lambda: running.service.stats()["cancelled"] == before["cancelled"] + 1)
        wait_for(lambda: not running.service._running)
    finally:
        running.service.model.engine.steps_for = slow
    assert running.service.stats()["new_tokens"] - before["new_tokens"] < 900


def test_who_goes_while_waiting_is_not_answered(gated):
    running, gate = gated
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(running.post, body())
        assert gate.entered.acquire(timeout=60)
        with pytest.raises(httpx.ReadTimeout):
            running.post(body(), timeout=0.3)
        wait_for(lambda: running.service.stats()["cancelled"] == 1)
        assert running.service.stats()["waiting"] == 0
        gate.open.set()
        assert first.result(60).status_code == 200
    assert running.service.stats()["batches"] == {1: 1}


def test_a_model_that_breaks(gated):
    """500 where nothing has been sent, an error in the stream where something has; and the next request is answered."""
    running, gate = gated
    gate.open.set()
    engine = running.service.model.engine
    plain, prefill = engine.steps_for, running.service.model.model.prefill

    def broken(*args):
        raise RuntimeError("broke")

    try:
        running.service.model.model.prefill = broken
        for stream in (False, True):
            response = running.post(body(stream=stream))
            assert response.status_code == 500 and response.json()["error"]["code"] == "model_failed"
        running.service.model.model.prefill = prefill
        engine.steps_for = lambda cache: type("Broken", (), {"cache": cache, "__call__": broken})()
        with pytest.raises(openai.APIError, match=r"the model failed on this request \(RuntimeError: broke\)"):
            list(running.client.chat.completions.create(**body(stream=True, seed=3, temperature=2)))
    finally:
        running.service.model.model.prefill, engine.steps_for = prefill, plain
    assert running.post(body()).status_code == 200


def test_keys(checkpoint):
    running = Running(serve(checkpoint), Server(MODEL), key="sesame")
    try:
        assert [model.id for model in running.client.models.list()] == [MODEL]
        assert running.client.chat.completions.create(**body()).usage.completion_tokens == 3
        for given in (
            {},
            {"Authorization": "Bearer sesam"},
            {"Authorization": "sesame"},
            {"Authorization": b"Bearer \xff"},
        ):
            for method, path in (("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/v1/chat/completions")):
                response = running.http.request(method, path, headers=given)
                assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
        assert running.http.get("/health").status_code == 200
        with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
            running.client.with_options(api_key="wrong").models.list()
    finally:
        running.close()


def test_health_and_metrics(gated):
    running, gate = gated
    gate.open.set()
    for stream in (False, True):
        assert running.post(body(stream=stream, messages=[user("Why?", make_image(50, 50))])).status_code == 200
    assert running.post(b"{").status_code == 400
    assert running.http.get("/health").json() == {"live": True, "ready": True, "waiting": 0, "running": 0}
    response = running.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    values = dict(line.rsplit(" ", 1) for line in response.text.splitlines() if not line.startswith("#"))
    assert float(values['adav_chat_responses_total{status="200"}']) == 2
    assert float(values['adav_chat_responses_total{status="400"}']) == 1
    assert float(values['adav_requests_ended_total{how="answered"}']) == 2
    assert float(values['adav_tokens_total{kind="new"}']) == 6 and float(values["adav_requests_waiting"]) == 0
    assert float(values['adav_batches_total{size="1"}']) == 2
    assert float(values['adav_vision_tokens_total{what="kept"}']) == 2 * 20
    assert float(values["adav_first_token_seconds_count"]) == 2 == float(values["adav_request_seconds_count"])
    running.service.close()
    response = running.http.get("/health")
    assert response.status_code == 503 and response.json()["ready"] is False
    response = running.post(body())
    assert response.status_code == 503 and response.json()["error"]["code"] == "shutting_down"


# --- the command ------------------------------------------------------------------------------------------------------


def started(checkpoint, *flags):
    """The command in a process of its own: (process, its URL)."""
    command = [sys.executable, "-m", "llava.serve.api", "--model-path", str(checkpoint), "--port", "0", *flags]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "SECRET_KEY": "sesame"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    line = process.stdout.readline()
    found = re.search(r"http://127.0.0.1:\d+", line)
    assert found, (line, process.stderr.read() if process.poll() is not None else "")
    return process, found[0]


@pytest.mark.parametrize("by", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_a_signal_while_streaming(checkpoint, by):
    """The stream is finished, a request that waits is refused with 503, nobody else gets in, and the exit code is 0."""
    process, url = started(checkpoint, "--method", "adav", "--overall-tokens", "20")
    try:
        with httpx.Client(base_url=url, timeout=60) as http, ThreadPoolExecutor(1) as threads:
            wait_for(lambda: http.get("/health").status_code == 200)
            asked = {"content": json.dumps(body(stream=True, max_tokens=900)).encode()}
            asked["headers"] = {"Content-Type": "application/json"}
            with http.stream("POST", "/v1/chat/completions", **asked) as response:
                lines = response.iter_lines()
                text = [next(lines) for _ in range(9)]
                waiting = threads.submit(http.post, "/v1/chat/completions", json=body(max_tokens=4))
                wait_for(lambda: http.get("/health").json()["waiting"] == 1)
                process.send_signal(by)
                assert waiting.result(60).status_code == 503
                text += list(lines)
            events = [line.removeprefix("data: ") for line in text if line]
            assert events[-1] == "[DONE]"
            finish = json.loads(events[-2])
            assert finish["choices"][0]["finish_reason"] == "length" and len(events) > 100
            with pytest.raises(httpx.TransportError):
                httpx.get(url + "/health", timeout=5)
        assert process.wait(60) == 0
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--port", "70000"], "'70000', allowed is a port from 0 to 65535"),
        (["--image-folder", "/nowhere"], "--image-folder /nowhere: is no folder"),
        (["--api-key-env", "NO_SUCH_KEY"], "--api-key-env NO_SUCH_KEY: the environment variable holds no key"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1 --port 8000: cannot listen there"),
        (["--overall-tokens", "0"], '"overall_tokens" is 0'),
        (["--max-batch", "0"], "'0', allowed is a whole number of at least 1"),
    ],
)
def test_bad_flags_are_sentences(flags, words, capsys):
    from llava.serve.api import main

    with pytest.raises(SystemExit) as stop:
        main(["--model-path", "playground/llava-shapes-v1.5", *flags])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and error.count("\n") == 1
