"""A-VL's data sets in one command: the plan, runs of a stand-in for lmms-eval by hand, and lmms-eval itself on small data."""

import csv
import json
import os
import signal
import sys
import time
from pathlib import Path
from threading import Timer

import pytest
from lmms_tasks import SCORES, write_tasks

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.eval import reproduce
from llava.eval.results import lmms_reproduction as lmms
from llava.eval.runs.lmms_eval import LOG, LmmsRun

REPOSITORY = Path(__file__).resolve().parents[2]
CHECKPOINT = "playground/llava-shapes-v1.5"
# What a run does in place of lmms-eval: it reads its arguments and writes the files that lmms-eval writes.
STAND_IN = """
import json, pathlib, sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
task, folder = given["--tasks"], pathlib.Path(given["--output_path"])
method = json.loads((folder / "config.json").read_text())["method"]
pathlib.Path(given["--count"]).open("a").write(task + " " + method + "\\n")
if task == "textvqa_val" and method == "cls":
    sys.exit("ValueError: no such data set")
each = [1.0, 0.5, 0.0, 0.5] if method == "none" else [0.5, 0.5, 0.0, 0.0]
values = [{"ocrbench": {"score": int(x)}}.get(task, x) for x in each]
metric = {"ocrbench": "ocrbench_accuracy", "docvqa_val": "anls", "nocaps_val": "nocaps_CIDEr"}.get(task, "exact_match")
rows = [{"doc_id": n, metric: value} for n, value in enumerate(values)]
(folder / "model").mkdir()
(folder / "model" / f"1_samples_{task}.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
(folder / "model" / "1_results.json").write_text(json.dumps({"results": {task: {metric + ",none": 1.055}}}))
"""


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.delenv("CKPT", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """The file to which each started run adds a line. lmms-eval counts as installed."""
    script, count = tmp_path / "stand_in.py", tmp_path / "count.txt"
    script.write_text(STAND_IN)
    real = LmmsRun.command

    def command(run):
        flags = real(run)[3:]
        return [
            sys.executable,
            str(script),
            *(flag for flag in flags if flag != "--log_samples"),
            "--count",
            str(count),
        ]

    monkeypatch.setattr(LmmsRun, "command", command)
    monkeypatch.setattr(reproduce.importlib.util, "find_spec", lambda name: name)
    return count


def flags(tmp_path, *more):
    return [
        "avl",
        "--checkpoint",
        CHECKPOINT,
        "--output",
        str(tmp_path / "runs"),
        "--out",
        str(tmp_path / "out"),
        *more,
    ]


def test_the_plan_needs_nothing(tmp_path, capsys):
    reproduce.main(["avl", "--plan", "--subset", "500", "--output", str(tmp_path)])
    text = capsys.readouterr().out
    assert "llava-hf/llava-1.5-7b-hf, not here" in text and "4 x 5 runs, 10,000 answers" in text
    for name in lmms.USUAL:
        assert f"https://huggingface.co/datasets/{lmms.TASKS[name].data}" in text
        assert f"bash scripts/reproduce.sh avl --subset 500 --output {tmp_path} --tasks {name}" in [
            line.strip() for line in text.splitlines()
        ]
    assert not list(tmp_path.iterdir())


def test_configurations():
    found = dict(lmms.configurations(["fastv", "h2o", "avl", "none"], [288, 144]))
    assert list(found) == ["none", "fastv-288", "fastv-144", "h2o", "avl"]
    assert found["avl"].cache_policy == "avl" and found["h2o"].cache_policy == "h2o"
    assert {found[name].method for name in ("none", "h2o", "avl")} == {"none"}


@pytest.mark.parametrize(
    "given, said",
    [
        (["avl", "--prepare"], "--prepare is not for avl: lmms-eval fetches its data sets itself"),
        (["avl", "--partial"], "--partial is not for avl"),
        (["avl", "--tasks", "mmmu"], '--tasks: "mmmu" is no task of this table'),
        (["avl", "--methods", "best", "--plan"], '--methods: "best" is no method'),
        (["v1_5", "--tasks", "docvqa_val", "--plan"], "--tasks is about lmms-eval"),
        (["avl", "--checkpoint", CHECKPOINT], "lmms_eval is not installed; make lmms-eval installs it"),
    ],
)
def test_bad_flags_are_one_sentence(given, said, monkeypatch, capsys):
    monkeypatch.setattr(reproduce.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        reproduce.main(given)
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and shown.count("\n") == 1 and said in shown


def test_runs_are_resumed_and_the_table_is_right(stand_in, tmp_path, capsys):
    more = ["--methods", "cls", "--tokens", "9", "--tasks", "docvqa_val,ocrbench,nocaps_val,textvqa_val"]
    with pytest.raises(SystemExit) as stop:
        reproduce.main(flags(tmp_path, *more))
    shown = capsys.readouterr()
    assert stop.value.code == 1, "one run gave no results"
    assert "error: textvqa_val under cls-9: lmms-eval gave no results (ValueError: no such data set)" in shown.err
    rows = {(row["task"], row["run"]): row for row in csv.DictReader((tmp_path / "out/table.csv").open())}
    assert rows["docvqa_val", "none"]["score"] == "50.0" and rows["docvqa_val", "cls-9"]["difference"] == "-25.0"
    assert rows["ocrbench", "none"]["score"] == "250.0", "of the documents that were asked, per thousand"
    assert rows["nocaps_val", "none"]["score"] == "105.5" and rows["nocaps_val", "none"]["low"] == ""
    assert float(rows["docvqa_val", "cls-9"]["difference_low"]) <= -25 <= float(rows["docvqa_val", "cls-9"]["low"])
    table = (tmp_path / "out/table.md").read_text()
    assert "| cls-9 |" in table.replace("  ", "") and "no file of this project" in table
    # Again: only the run without results is started, and the same table comes out.
    before = stand_in.read_text().splitlines()
    assert len(before) == 8
    with pytest.raises(SystemExit):
        reproduce.main(flags(tmp_path, *more))
    assert stand_in.read_text().splitlines()[8:] == ["textvqa_val cls"]
    assert (tmp_path / "out/table.md").read_text() == table


def test_what_changes_answers_changes_the_folder(tmp_path):
    checkpoint = reproduce.find_checkpoint(CHECKPOINT)
    base = dict(task="ocrbench", label="cls-9", config=AdaVConfig(method="cls"), checkpoint=checkpoint, output=tmp_path)
    folder = LmmsRun(**base).folder
    assert LmmsRun(**base, ranks=4, batch_size=1).folder == folder
    for change in ({"limit": 5}, {"dtype": "float16"}, {"flags": ("--seed", "1")}):
        assert LmmsRun(**base, **change).folder != folder
    assert LmmsRun(**{**base, "config": AdaVConfig(method="cls", overall_tokens=3)}).folder != folder
    run = LmmsRun(**base, limit=5, ranks=2, flags=("--seed", "1"))
    command = run.command()
    assert command[1:7] == ["-m", "llava.common.torchrun", "--standalone", "--nproc-per-node", "2", "-m"]
    assert command[-4:] == ["--limit", "5", "--seed", "1"] and f"config={run.folder}/config.json" in command[11]
    with pytest.raises(UserError, match="has a comma, at which lmms-eval splits"):
        LmmsRun(**{**base, "output": tmp_path / "a,b"}).command()


def test_a_signal_ends_the_run_that_is_under_way(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(LmmsRun, "command", lambda run: [sys.executable, "-c", "import time; time.sleep(600)"])
    monkeypatch.setattr(reproduce.importlib.util, "find_spec", lambda name: name)
    begun = time.monotonic()
    Timer(3, os.kill, [os.getpid(), signal.SIGTERM]).start()
    with pytest.raises(SystemExit) as stop:
        reproduce.main(flags(tmp_path, "--tasks", "ocrbench"))
    assert stop.value.code == 128 + signal.SIGTERM and time.monotonic() - begun < 300
    assert "stopped by SIGTERM; the same command continues" in capsys.readouterr().err
    (log,) = (tmp_path / "runs").rglob(LOG)
    assert log.read_text() == ""


@pytest.mark.long
def test_lmms_eval_itself_on_small_data(tmp_path, monkeypatch, capsys):
    """The scores of all tokens are those that were worked out by hand (lmms_tasks.py)."""
    pytest.importorskip("lmms_eval", reason="make lmms-eval installs it")
    tasks = write_tasks(tmp_path / "tasks")
    for name, value in {"HF_HOME": tasks / "hub", "HF_HUB_OFFLINE": 1, "HF_DATASETS_OFFLINE": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    real = {"docvqa": "docvqa_val", "ocrbench": "ocrbench", "nocaps": "nocaps_val"}
    monkeypatch.setattr(lmms, "TASKS", {f"adav_{name}": lmms.TASKS[task] for name, task in real.items()})
    more = ["--methods", "avl", "--tasks", ",".join(lmms.TASKS)]
    reproduce.main(flags(tmp_path, *more, "--lmms-flags", f"--include_path {tasks}"))
    rows = {(row["task"], row["run"]): row for row in csv.DictReader((tmp_path / "out/table.csv").open())}
    assert {run for _, run in rows} == {"none", "avl"}
    for name, task in lmms.TASKS.items():
        # OCRBench's own score is per thousand; here it is of the five documents.
        expected = SCORES[name][1] * (1000 / 5 if name == "adav_ocrbench" else 1) * task.scale
        assert float(rows[name, "none"]["score"]) == pytest.approx(expected, abs=1e-3), name
    # A run that ended before its results were written asks nothing again.
    (results,) = (tmp_path / "runs").rglob("adav_docvqa/avl-*/**/*_results.json")
    results.unlink()
    before = (tmp_path / "out/table.csv").read_text()
    reproduce.main(flags(tmp_path, *more, "--lmms-flags", f"--include_path {tasks}"))
    assert (tmp_path / "out/table.csv").read_text() == before
    (log,) = (tmp_path / "runs").rglob(f"adav_docvqa/avl-*/{LOG}")
    assert "note: 5 of 5 answers were there already" in log.read_text()
    configs = [json.loads(path.read_text()) for path in (tmp_path / "runs").rglob("config.json")]
    assert len(configs) == 6 and sum(config["text_pruning_flag"] for config in configs) == 3
