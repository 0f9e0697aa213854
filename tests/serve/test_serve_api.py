"""The OpenAI-compatible API over HTTP: the official client, requests that arrive together, a full queue, clients that go,
keys, metrics, and SIGTERM."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain

import pytest
from api_server import MODEL, Running, Server, body, httpx, make_checkpoint, openai, run_tiny, serve, user
from serve_cases import wait_for
from tiny_checkpoints import make_image

from llava.config import AdaVConfig
from llava.model.decoding.sampling import Sampling
from llava.serve.service.service import Request, Turn

SIZES = [(97, 61), (60, 90), (50, 50), (120, 40)]
QUESTIONS = ("What colour is the circle?", "How many digits are there?", "Is the square on the left red?")


class Gate:
    """Holds the model back at the start of each batch until it is opened."""

    def __init__(self, service):
        self.model, self.open, self.entered = service.model, threading.Event(), threading.Semaphore(0)
        answer = service.model.answer

        def gated(jobs):
            self.entered.release()
            assert self.open.wait(60)
            return answer(jobs)

        service.model.answer = gated

    def remove(self):
        self.open.set()
        del self.model.answer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    yield from run_tiny(tmp_path_factory.mktemp("api"))


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


@pytest.mark.parametrize("content", ["", None, [], "What is an <image>?"], ids=str)
def test_any_answer_can_be_in_the_history(running, content):
    picture, asked = make_image(50, 50), {"role": "user", "content": "Why?"}
    history = [{"role": "system", "content": "<image> is text."}, user(QUESTIONS[0], picture)]
    sent = [*history, {"role": "assistant", "content": content}, asked]
    answer = running.client.chat.completions.create(model=MODEL, messages=sent, max_tokens=5)
    turns = (Turn("system", "< image > is text."), Turn("user", QUESTIONS[0], (picture,)))
    said = Turn("assistant", (content or "").replace("<image>", "< image >"))
    expected = running.service.submit(Request((*turns, said, Turn("user", "Why?")), sampling=Sampling(5))).result(60)
    assert answer.choices[0].message.content == expected.text
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (expected.prompt_tokens, 5)


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
    greedy, none = (
        running.client.chat.completions.create(**asked, **how) for how in ({}, {"temperature": 2, "top_p": 0})
    )
    assert none.choices[0].message.content == greedy.choices[0].message.content
    words = texts[0].split()
    stopped = running.client.chat.completions.create(**asked, temperature=1.5, top_p=0.9, seed=1, stop=[words[4]])
    assert stopped.choices[0].finish_reason == "stop" and words[4] not in stopped.choices[0].message.content
    assert texts[0].startswith(stopped.choices[0].message.content)


def test_images_of_the_folder(running):
    images = running.folder
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
    gate = Gate(running.service)
    with ThreadPoolExecutor(32) as threads:
        together = [threads.submit(text_of, fields) for fields in asked]
        wait_for(lambda: running.service.stats()["waiting"] + running.service.stats()["running"] == 32)
        gate.remove()
        together = [one.result(60) for one in together]
    assert [text for text, _ in together] == [text for text, _ in alone]
    assert len({text for text, _ in alone}) > 16
    assert sum(measured["batch"] > 1 for _, measured in together) >= 28
    after = running.service.stats()["batches"]
    new = {size: count - before.get(size, 0) for size, count in after.items()}
    assert sum(size * count for size, count in new.items()) == 32 and sum(new.values()) <= 6
    assert [m["vision_tokens"] for _, m in together] == [m["vision_tokens"] for _, m in alone]


# --- queue, clients that go, keys -------------------------------------------------------------------------------------


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
    client = httpx.Client(base_url=running.url, timeout=httpx.Timeout(30, read=30 if stream else 1.5))
    asked = json.dumps(body(stream=stream, max_tokens=900)).encode()
    headers = {"Content-Type": "application/json"}
    slow = running.service.model.engine.steps_for

    def slower(cache, *others):
        steps = slow(cache, *others)

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
            running.post(body(), timeout=1.5)
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
    plain, prefill = engine.steps_for, engine.prefill

    def broken(*args):
        raise RuntimeError("broke")

    try:
        engine.prefill = broken
        for stream in (False, True):
            response = running.post(body(stream=stream))
            assert response.status_code == 500 and response.json()["error"]["code"] == "model_failed"
        engine.prefill = prefill
        engine.steps_for = lambda cache, *others: type("Broken", (), {"cache": cache, "__call__": broken})()
        with pytest.raises(openai.APIError, match=r"the model failed on this request \(RuntimeError: broke\)"):
            list(running.client.chat.completions.create(**body(stream=True, seed=3, temperature=2)))
    finally:
        engine.prefill, engine.steps_for = prefill, plain
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


@contextmanager
def streaming(checkpoint, tokens, *flags):
    """A server that streams `tokens` tokens while another request waits: (process, url, the other's future, events).

    Nine lines of the stream are read, and `events` yields all of them. The server must end with exit code 0 and no message.
    """
    process, url = started(checkpoint, *flags)
    try:
        with httpx.Client(base_url=url, timeout=60) as http, ThreadPoolExecutor(1) as threads:
            wait_for(lambda: http.get("/health").status_code == 200)
            asked = {"content": json.dumps(body(stream=True, max_tokens=tokens)).encode()}
            asked["headers"] = {"Content-Type": "application/json"}
            with http.stream("POST", "/v1/chat/completions", **asked) as response:
                lines = response.iter_lines()
                text = [next(lines) for _ in range(9)]
                waiting = threads.submit(http.post, "/v1/chat/completions", json=body(max_tokens=4))
                wait_for(lambda: http.get("/health").json()["waiting"] == 1)
                yield process, url, waiting, (line.removeprefix("data: ") for line in chain(text, lines) if line)
        assert process.wait(60) == 0
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("by", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_a_signal_while_streaming(checkpoint, by):
    """The stream is finished, a request that waits is refused with 503, nobody else gets in, and the exit code is 0."""
    with streaming(checkpoint, 900, "--method", "adav", "--overall-tokens", "20") as (process, url, waiting, lines):
        process.send_signal(by)
        assert waiting.result(60).status_code == 503
        events = list(lines)
        assert events[-1] == "[DONE]"
        finish = json.loads(events[-2])
        assert finish["choices"][0]["finish_reason"] == "length" and len(events) > 100
        with pytest.raises(httpx.TransportError):
            httpx.get(url + "/health", timeout=5)


def test_a_second_signal_ends_what_runs_with_an_error_and_no_traceback(checkpoint):
    """As the end of --shutdown-seconds does; uvicorn would cancel it in the middle."""
    with streaming(checkpoint, 1000) as (process, _, waiting, lines):
        process.send_signal(signal.SIGTERM)
        assert waiting.result(60).status_code == 503
        process.send_signal(signal.SIGTERM)
        events = list(lines)
        assert json.loads(events[-1])["error"]["code"] == "shutting_down" and len(events) < 1000


def test_help_says_what_the_limits_are_for(capsys):
    from llava.serve.api import main, parse

    with pytest.raises(SystemExit):
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    limits = parse(["--model-path", "x"])
    most = limits.max_batch + limits.max_waiting
    assert f"the defaults answer {most} and refuse {100 - most} with status 429" in said and "use vLLM" in said


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
