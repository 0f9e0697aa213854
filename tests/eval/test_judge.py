"""MM-Vet through a judge: a stub of an OpenAI-compatible server on this machine."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from benchmark_data import make_benchmark

from llava.common.errors import UserError
from llava.eval.benchmarks import BENCHMARKS, mmvet
from llava.eval.benchmarks.llm_judge import Judge, grade_all
from llava.eval.scoring.verdicts import headline

KEY = "sk-not-for-any-file"


class Stub(BaseHTTPRequestHandler):
    """Grades 1.0 where the prediction is the ground truth, else 0.2; what `script` holds comes first."""

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, self.headers.get("Authorization"), request))
        _, truth, prediction = request["messages"][0]["content"].splitlines()[-1].split(" | ")
        reply = self.server.script.pop(0) if self.server.script else "1.0" if prediction[:-2] == truth else "0.2 or so"
        if isinstance(reply, int):
            self.send_error(reply)
            return
        body = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    server.seen, server.script = [], []
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def judge(server):
    return Judge(server.url, "stub-4", KEY, wait=0.0)


def test_mmvet_is_graded_by_the_judge_that_the_environment_names(server, tmp_path, monkeypatch, capsys):
    for name, value in (("JUDGE_URL", server.url + "/"), ("JUDGE_MODEL", "stub-4"), ("JUDGE_API_KEY", KEY)):
        monkeypatch.setenv(name, value)
    make_benchmark("mmvet", tmp_path / "data", 4)
    benchmark = BENCHMARKS["mmvet"](tmp_path / "data", None)
    samples = benchmark.load()
    run = tmp_path / "run"
    run.mkdir()
    rows = [{"text": text} for text in ("red", "3", "yes", "on the right")]
    score = benchmark.finish(samples, rows, run)
    assert score["total"] == pytest.approx((1 + 0.2 + 1 + 0.2) / 4) and score["judge"] == "stub-4"
    assert benchmark.published(score) == pytest.approx(60.0)
    assert score["per_capability"] == pytest.approx({"ocr": 1.0, "rec": 0.6})  # ocr: questions 0 and 2
    assert len(server.seen) == 4
    path, key, request = server.seen[0]
    assert path == "/v1/chat/completions" and key == f"Bearer {KEY}"
    assert request["model"] == "stub-4" and request["temperature"] == 0
    content = request["messages"][0]["content"]
    assert content.startswith("Compare the ground truth and prediction from AI models, to give a correctness score")
    assert content.endswith("| 1.0\nWhat colour is the shape? | red | red |")
    again = benchmark.finish(samples[::-1], rows[::-1], run)
    assert again == score and len(server.seen) == 4, "grades are kept, and not asked for twice"
    kept = "".join(path.read_text() for path in tmp_path.rglob("*") if path.suffix in (".json", ".jsonl"))
    assert KEY not in kept and KEY not in repr(Judge.from_environment()) and KEY not in "".join(capsys.readouterr())
    (run / "score.json").write_text(json.dumps(score))
    monkeypatch.delenv("JUDGE_URL")
    verdicts = benchmark.verdicts(samples, rows, run)
    assert [(verdict.value, verdict.expected) for verdict in verdicts] == [
        (1.0, "red"), (0.2, "2"), (1.0, "yes"), (0.2, "left side")
    ]  # fmt: skip
    assert headline(verdicts) == pytest.approx(score["total"]) and verdicts[0].kinds == ("rec", "ocr")
    (run / "grades.jsonl").write_text("")
    with pytest.raises(UserError, match="no grade of stub-4 for 4 answers"):
        benchmark.verdicts(samples, rows, run)
    (run / "score.json").write_text("{}")
    assert benchmark.verdicts(samples, rows, run) is None


def test_without_a_judge_there_is_a_file_and_no_score(tmp_path, monkeypatch):
    monkeypatch.delenv("JUDGE_URL", raising=False)
    make_benchmark("mmvet", tmp_path, 2)
    (tmp_path / "mm-vet" / "mm-vet.json").unlink()
    benchmark = BENCHMARKS["mmvet"](tmp_path, None)
    assert set(benchmark.finish(benchmark.load(), [{"text": "x"}] * 2, tmp_path)) == {"upload", "answered"}


def test_and_or_stand_apart_in_the_prompt(server, judge, tmp_path):
    labels = {"v1_0": {"question": "x?", "answer": "-1<AND>-5", "capability": ["math"]}}
    mmvet.score([(0, "-1")], labels, tmp_path / "F", judge, tmp_path / "grades.jsonl")
    assert server.seen[0][2]["messages"][0]["content"].endswith("\nx? | -1 <AND> -5 | -1 |")


def test_a_reply_that_is_no_score_is_asked_for_again_warmer(server, judge):
    server.script[:] = ["Correctness: high", "7", "", "0.4"]
    assert judge.grade("q | a | b |") == 0.4
    assert [request["temperature"] for *_, request in server.seen] == [0.0, 0.5, 1.0, 1.5]
    server.script[:] = ["no"] * 5
    with pytest.raises(UserError, match="5 replies of stub-4 are no score between 0 and 1"):
        judge.grade("q | a | b |")


def test_a_busy_server_is_asked_again_and_a_refusal_is_one_sentence(server, judge):
    server.script[:] = [429, 503, "0.9"]
    assert judge.grade("q | a | b |") == 0.9
    server.script[:] = [401]
    with pytest.raises(UserError, match=r"the judge refuses with HTTP 401") as error:
        judge.grade("q | a | b |")
    assert KEY not in str(error.value)
    with pytest.raises(UserError, match="http://127.0.0.1:1/v1: no usable answer of the judge"):
        Judge("http://127.0.0.1:1/v1", "stub-4", wait=0.0).grade("q | a | b |")


def test_what_was_graded_before_a_failure_is_kept(server, judge, tmp_path):
    prompts = {name: f"question {name} | a | a |" for name in "abc"}
    server.script[:] = ["0.1", "0.2", 400]
    with pytest.raises(UserError, match="HTTP 400"):
        grade_all(judge, prompts, tmp_path / "grades.jsonl")
    with open(tmp_path / "grades.jsonl", "a") as file:
        file.write('{"name": "c", "pro')
    assert grade_all(judge, prompts, tmp_path / "grades.jsonl") == {"a": 0.1, "b": 0.2, "c": 1.0}
    assert len(server.seen) == 4


@pytest.mark.parametrize("url, model", [("127.0.0.1", "m"), ("http://127.0.0.1", "")])
def test_a_judge_that_cannot_be_one(monkeypatch, url, model):
    monkeypatch.setenv("JUDGE_URL", url)
    monkeypatch.setenv("JUDGE_MODEL", model)
    with pytest.raises(UserError, match="JUDGE_URL is .*, allowed is a http"):
        Judge.from_environment()
