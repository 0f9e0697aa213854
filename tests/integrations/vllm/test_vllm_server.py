"""`vllm serve` with the plugin: wrong requests are answered with HTTP 400, and the server lives."""

import base64
import io
import itertools
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_checkpoints import build_reference, make_image, save_llava_hf

from llava.integrations.vllm.settings import KEY

pytest.importorskip("vllm.version", reason="vLLM is not installed here; make vllm makes an environment that has it")

pytestmark = pytest.mark.long
ROOT = Path(__file__).resolve().parents[3]
TEMPLATE = (
    "{% for m in messages %}USER: {% for c in m['content'] %}"
    "{{ '<image>\\n' if c['type'] == 'image' else c['text'] }}{% endfor %} ASSISTANT:{% endfor %}"
)


class Server:
    """`vllm serve` of a checkpoint. keys: settings of the server; None is vLLM without the plugin."""

    def __init__(self, folder: Path, log: Path, keys: dict | None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.name, self.log = str(folder), log
        (folder / "chat.jinja").write_text(TEMPLATE)
        command = [Path(sys.executable).with_name("vllm"), "serve", self.name, "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
        command += ["--chat-template", str(folder / "chat.jinja")]
        if keys is not None:
            command += ["--mm-processor-kwargs", json.dumps({KEY: keys})]
        # vLLM refuses settings of requests unless its operator trusts the clients.
        command += ["--trust-request-mm-kwargs", "--limit-mm-per-prompt", '{"image": 2}']
        environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        if keys is None:
            environment["VLLM_PLUGINS"] = "none"
        environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
        with log.open("w") as file:
            self.process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=file, stderr=file)

    def wait(self, seconds: int = 600) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5)
                return
            except OSError:
                time.sleep(1)
        raise AssertionError(self.log.read_text()[-3000:])

    def post(self, body: bytes) -> tuple[int, dict]:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/v1/chat/completions", body)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"{}")

    def ask(self, image=None, text="Yes?", **fields) -> tuple[int, dict]:
        content = [{"type": "text", "text": text}]
        if image is not None:
            content.insert(0, {"type": "image_url", "image_url": {"url": image}})
        body = {
            "model": self.name,
            "max_tokens": 4,
            "temperature": 0,
            "messages": [{"role": "user", "content": content}],
        }
        return self.post(json.dumps(body | fields).encode())


def data_url(image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    return save_llava_hf(build_reference("llava_next", hidden_size=128), folder, "published")


@contextmanager
def running(folder, log, keys):
    server = Server(folder, log, keys)
    try:
        server.wait()
        yield server
    finally:
        server.process.terminate()
        server.process.wait(60)


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    with running(folder, tmp_path_factory.mktemp("log") / "server.log", {"method": "adav", "overall_tokens": 7}) as one:
        yield one


@pytest.fixture(scope="module")
def plain_server(folder, tmp_path_factory):
    with running(folder, tmp_path_factory.mktemp("log") / "plain.log", None) as one:
        yield one


def wrong_settings():
    """200 values of "adav" that no request may have."""
    values = [0, -1, 1.5, "9", None, True, [], {}, "x" * 1000, float("inf")]
    keys = [
        "overall_tokens",
        "method",
        "options",
        "vision_adaptive_attention",
        "text_init_cache",
        "prefill_filter_rate",
    ]
    allowed = {("options", 7), ("text_init_cache", 0), ("prefill_filter_rate", 0)}
    for key, (nth, value) in itertools.product(keys, enumerate(values)):
        if (key, nth) not in allowed and not (key == "vision_adaptive_attention" and value is False):
            yield {key: value}
    methods = ["fastv", "pyramiddrop", "sparsevlm", "fitprune", "no_image", "ADAV", "", "adav.json", "../adav", "none "]
    yield from ({"method": method} for method in methods)
    yield from ("adav_configs.json", "/etc/passwd", "", None, 3, 0.5, True, False, [], [{}], "{}")
    flags = ["vision_adaptive_attention", "text_pruning_flag", "prefill_filter_flag", "all_use_h2o"]
    yield from ({flag: True} for flag in flags)
    yield from ({a: True, b: True} for a, b in itertools.combinations(flags, 2))
    options = {
        "text_tower": ["/etc", "openai/clip", 3, None],
        "table": ["/etc/passwd"],
        "positions": ["original", 3, None],
        "text_scope": ["all", 3],
        "anyres": ["other", 3],
        "min_share": [-1, 0.6, "a"],
        "temperature": [0, -1, "a"],
        "compat": ["private", 3],
        "seed": [3],
        "layer": [3],
        "relevance": ["clip", "other"],
    }
    yield from ({"options": {name: value}} for name, own in options.items() for value in own)
    yield from ({"method": "visionzip", "options": {name: 3}} for name in ("dominant", "contextual"))
    yield from ({"options": {"compat": "public"}, "overall_tokens": tokens} for tokens in (1, 2, 3))
    # These fit no image of this size; the error must not come from the model, because it would end the engine.
    yield {"method": "hiprune", "options": {"compat": "public"}, "overall_tokens": 1}
    yield {"method": "apet", "options": {"start": 1_000}}
    yield from ({f"unknown_{i}": i} for i in itertools.count())


def test_200_malformed_requests_are_400_and_the_server_lives(server):
    image = data_url(make_image(50, 90))
    for nth, value in enumerate(itertools.islice(wrong_settings(), 200)):
        status, answer = server.ask(image, mm_processor_kwargs={KEY: value})
        assert status == 400, (value, status, answer)
        message = answer["error"]["message"]
        assert message and "\n" not in message and "Traceback" not in message, message
        if nth % 20 == 0:
            assert server.ask(image)[0] == 200, value
    assert server.ask(image)[0] == 200


def test_no_malformed_request_is_a_server_error_that_plain_vllm_does_not_give(server, plain_server):
    def statuses(running):
        image = data_url(make_image(50, 90))
        answers = {
            "broken": running.ask("data:image/png;base64,AAAA"),
            "no picture": running.ask("data:image/png;base64," + base64.b64encode(b"x" * 1000).decode()),
            "a file": running.ask("file:///etc/passwd"),
            "long": running.ask(image, text="Yes? " * 600),
            "placeholder": running.ask(image, text="<image>"),
            "kwargs": running.ask(image, mm_processor_kwargs=3),
            "no object": running.post(b"[]"),
            "no JSON": running.post(b"{"),
        }
        assert running.ask(image)[0] == 200
        return {name: status for name, (status, _) in answers.items()}

    ours, theirs = statuses(server), statuses(plain_server)
    assert {name for name, status in ours.items() if status >= 500} <= {
        name for name, status in theirs.items() if status >= 500
    }, (ours, theirs)
    assert 200 not in ours.values()


def test_settings_of_requests_count_in_tokens(server):
    image = data_url(make_image(57, 57))

    def prompt_tokens(keys):
        status, answer = server.ask(image, **({} if keys is None else {"mm_processor_kwargs": {KEY: keys}}))
        assert status == 200, answer
        return answer["usage"]["prompt_tokens"]

    own = prompt_tokens(None)
    assert prompt_tokens({}) == own and prompt_tokens({"overall_tokens": 3}) == own - 4
    assert prompt_tokens({"method": "cls"}) == own and prompt_tokens({"method": "none"}) > own + 50
    assert server.ask(None)[0] == 200  # no image
