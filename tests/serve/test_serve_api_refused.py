"""Malformed requests to the API: one sentence in the client's shape, no 5xx, and nothing of them stays."""

import base64
import copy
import gc
import json
import random
import threading
import time
from pathlib import Path

import pytest
import torch
from api_server import MODEL, body, data_url, run_tiny, user, written
from PIL import Image
from serve_cases import wait_for
from test_serve_images import png_header
from tiny_checkpoints import make_image


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    yield from run_tiny(tmp_path_factory.mktemp("api"))


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
        (body(top_p=-0.1), 400, "top_p is -0.1, allowed is a number from 0 to 1"),
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
        time.sleep(5)
        yield b"}"

    response = running.http.post("/v1/chat/completions", content=slow(), headers=headers)
    assert response.status_code == 408 and "did not come within 4 seconds" in response.json()["error"]["message"]


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
