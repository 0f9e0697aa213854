"""benchmarks/serving.py without vLLM: a server that counts, models without an end, the table."""

import base64
import http.server
import json
import threading
import time

import pytest
import serving
from PIL import Image

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.inference.loaded_checkpoint import LoadedCheckpoint
from llava.model.decoding.sampling import Sampling


class Server(http.server.ThreadingHTTPServer):
    """A chat route that streams as many pieces as asked for, less `short`, and notes what it is asked."""

    daemon_threads = True

    def __init__(self, short=0, status=200):
        super().__init__(("127.0.0.1", 0), Handler)
        self.short, self.status = short, status
        self.asked, self.now, self.most = [], 0, 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(request)
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        time.sleep(0.02)
        self.send_response(self.server.status)
        self.end_headers()
        tokens = request["max_tokens"] - self.server.short
        events = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}]
        events += [{"choices": [{"delta": {"content": "w"}}]}] * tokens
        events.append({"choices": [], "usage": {"completion_tokens": tokens}})
        for event in events:
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.wfile.write(b"data: [DONE]\n\n")
        with self.server.lock:
            self.server.now -= 1

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    started = []

    def start(**settings):
        started.append(Server(**settings))
        return started[-1]

    yield start
    for one in started:
        one.shutdown()
        one.server_close()


def picture_of(request: dict) -> bytes:
    image, text = request["messages"][0]["content"]
    assert text["type"] == "text" and text["text"]
    return base64.b64decode(image["image_url"]["url"].partition(",")[2])


def test_a_cell_asks_so_many_users_about_pictures_that_nobody_asked_about(server, tmp_path):
    counted, other = server(), server()
    ports = {"one": counted.server_port, "other": other.server_port}
    pictures = serving.Pictures("tiny", "v1.5", None, tmp_path)
    found = serving.measure(ports, pictures, users=2, each=4, new_tokens=3, repeats=2)
    first = found["one"]
    assert (first["requests"], first["new_tokens"], counted.most) == (8, 3, 2)
    assert len(counted.asked) == 16 and all(r["temperature"] == 0 and r["stream"] for r in counted.asked)
    seen = [picture_of(request) for request in counted.asked]
    assert sorted(seen.count(one) for one in set(seen)) == [4] * 4
    assert sorted(map(picture_of, other.asked)) == sorted(seen)
    assert 0.02 <= first["first_token_p50"] <= first["first_token_p99"]
    assert first["requests_per_second_min"] <= first["requests_per_second"] <= first["requests_per_second_max"]
    assert first["tokens_per_second"] == pytest.approx(3 * first["requests_per_second"], rel=1e-3)
    serving.measure(ports, pictures, users=3, each=1, new_tokens=2, repeats=1)
    assert not {*map(picture_of, counted.asked[16:])} & {*seen} and len(counted.asked) == 16 + 12


def test_short_answers_and_refusals_give_no_figure(server, tmp_path):
    pictures = serving.Pictures("tiny", "v1.5", None, tmp_path)
    with pytest.raises(UserError, match="an answer has 2 tokens in place of 3"):
        serving.measure({"one": server(short=1).server_port}, pictures, 1, 1, 3, 1)
    with pytest.raises(UserError, match="a server answers with status 503"):
        serving.measure({"one": server(status=503).server_port}, pictures, 2, 1, 3, 1)


@pytest.mark.parametrize("name, family", [("llava-shapes-v1.5", "v1.5"), ("tiny", "v1.6")])
def test_the_models_of_the_benchmark_never_end_by_themselves(tmp_path, name, family):
    assert serving.make_folder(name, tmp_path / name, "float32") == family
    loaded = LoadedCheckpoint(tmp_path / name, device="cpu")
    picture = Image.effect_noise((90, 120), 60).convert("RGB")
    config = AdaVConfig(method="fastervlm", overall_tokens=5)
    answers = loaded.engine.generate(loaded.prepare(["What color is it?"], [picture], config), Sampling(24)).answers
    assert len(answers[0].tokens) == 24 and answers[0].finish == "length"
    template = (tmp_path / name / "chat_template.jinja").read_text()
    assert template.index("<image>") < template.index("part['text']") and template.endswith("ASSISTANT:")


def test_a_server_that_does_not_start_is_told(tmp_path):
    start = serving.Start(tmp_path / "nothing", 5, "cpu", "float32", 1, "/bin/false", 512)
    with (
        pytest.raises(UserError, match=r"the server of vLLM \+ adav did not start"),
        serving.running(start, "adav", tmp_path / "log"),
    ):
        pass


def test_what_servers_are_started_with(tmp_path):
    start = serving.Start(tmp_path / "model", 58, "cpu", "float32", 1, "python", 512)
    words = {name: start.command(name, 8000) for name in serving.SERVERS}
    assert "--mm-processor-kwargs" not in words["plain"]
    for name, method in (("fastervlm", "fastervlm"), ("adav", "adav"), ("zoom", "adav_zoom")):
        settings = json.loads(words[name][words[name].index("--mm-processor-kwargs") + 1])
        assert settings == {"adav": {"method": method, "overall_tokens": 58}}
    assert "llava.serve.api" in words["own"] and "--overall-tokens" in words["own"]


FACTS = {"preset": "tiny", "overall_tokens": 5, "vllm": "0.32.0", "command": "python x.py", "commit": "0" * 40}
FACTS |= {"written": "now", "device": "a CPU", "threads": 1, "dtype": "float32", "torch": "2", "transformers": "5"}


def test_the_table_goes_into_the_page(tmp_path):
    page, first = tmp_path / "page.md", tmp_path / "serving.csv"
    page.write_text("before\n<!-- serving -->\n<!-- end of serving -->\n")
    cell = {"users": 8, "questions_per_picture": 4, "new_tokens": 16, "requests_per_second": 12.5}
    cell |= {"first_token_p50": 0.25, "first_token_p99": 0.5, "tokens_per_second": 200.0}
    faster = cell | {"requests_per_second": 25.0, "first_token_p50": 0.125}
    one_user = cell | {"users": 1}
    rows = [{"server": "vLLM", **cell}, {"server": "vLLM + adav", **faster}, {"server": "vLLM + adav", **one_user}]
    serving.write_csv(first, rows, FACTS)
    serving.main(["--table", str(first), "--document", str(page)])
    text = page.read_text()
    lines = [[entry.strip() for entry in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"]
    assert lines[0] == ["new tokens", "questions per picture", "users", "vLLM", "vLLM + adav"]
    assert lines[2:4] == [["16", "4", "1", "-", "12.50"], ["16", "4", "8", "12.50", "25.00 (2.00)"]]
    assert lines[6:] == [["16", "4", "1", "-", "0.250 / 0.500"], ["16", "4", "8", "0.250 / 0.500", "0.125 / 0.500"]]
    assert "vLLM 0.32.0" in text
    assert text.startswith("before")
