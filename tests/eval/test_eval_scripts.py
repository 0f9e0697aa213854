"""Every script of every family, on made data in the real layout with a shipped demo checkpoint."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import huggingface_hub
import pytest
from benchmark_data import MAKERS, make_benchmark
from eval_data import environment, scripts

from llava.eval import launch
from llava.eval.benchmarks import BENCHMARKS
from llava.eval.results.published import TABLE
from llava.eval.runs.run import FAMILIES

pytestmark = pytest.mark.usefixtures("warm")
CHECKPOINT = "playground/llava-shapes-v1.5"
QUESTIONS = 8
NAMES = tuple(MAKERS)
UPLOADED = ("vqav2", "vizwiz", "mmvet")  # by default only their servers know the score
REAL = [name for name in FAMILIES if name != "demo"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for name in NAMES:
        make_benchmark(name, root, QUESTIONS)
    return root


def arguments(family, name, output, *flags) -> list[str]:
    script = scripts() / family / "eval" / f"{name}.sh"
    return ["bash", str(script), "14", "--output", str(output), *map(str, flags)]


def settings(data, **more) -> dict:
    return {**environment(), "DATA_ROOT": str(data), "CKPT": CHECKPOINT, **more}


def run(command, env, code=0) -> subprocess.CompletedProcess:
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    return done


def finished(output: Path, name: str) -> tuple[Path, dict]:
    """The folder of the one run of a benchmark, and its score."""
    (merged,) = output.glob(f"{name}/*/*/merge.jsonl")
    return merged.parent, json.loads((merged.parent / "score.json").read_text())


def check(output: Path, name: str, data: Path, partial=None) -> Path:
    folder, score = finished(output, name)
    benchmark = BENCHMARKS[name](data, None)
    samples = benchmark.read()
    rows = [json.loads(line) for line in (folder / "merge.jsonl").read_text().splitlines()]
    if partial is None:
        assert [row["question_id"] for row in rows] == [sample.question_id for sample in samples]
        assert [row["prompt"] for row in rows] == [sample.prompt for sample in samples]
    assert score.get("partial") == partial
    published = json.loads((folder / "run.json").read_text())["published"]
    if name in UPLOADED:
        assert Path(score["upload"]).is_file() and published is None
    else:
        assert published == score[benchmark.headline] * (1 if benchmark.points else 100)
    return folder


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("gqa", "pope")])
def test_a_script_runs_from_questions_to_score(data, tmp_path, name):
    command = arguments("v1_5", name, tmp_path, "--max-new-tokens", 3)
    run(command, settings(data))
    folder = check(tmp_path, name, data)
    plan = run([*command, "--plan"], settings(data)).stdout
    assert str(folder) in plan and f"{QUESTIONS} answered already, 0 to do" in plan and "llava.eval.worker" not in plan


def test_two_shards_share_no_image(data, tmp_path):
    done = run(arguments("v1_5", "gqa", tmp_path, "--max-new-tokens", 3, "--shards", 2), settings(data))
    folder = check(tmp_path, "gqa", data)
    shards = [
        {json.loads(line)["key"][1] for line in path.read_text().splitlines()}
        for path in sorted(folder.glob("shards/shard-*.jsonl"))
    ]
    assert len(shards) == 2 and all(shards) and not shards[0] & shards[1]
    assert f"{QUESTIONS} questions answered" in done.stdout


def test_a_killed_script_goes_on(data, tmp_path):
    command = arguments("v1_5", "pope", tmp_path, "--max-new-tokens", 200, "--batch-size", 1)
    launcher = subprocess.Popen(command, env=settings(data), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not answered(tmp_path):
        assert time.monotonic() < deadline and launcher.poll() is None, launcher.stderr.read()
        time.sleep(0.01)
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.communicate(timeout=60)
    assert answered(tmp_path) > 0 and not list(tmp_path.rglob("merge.jsonl"))
    deadline = time.monotonic() + 60
    while True:  # the killed launcher's worker holds the run's lock until it has seen that it is alone
        done = subprocess.run(command, env=settings(data), capture_output=True, text=True, timeout=300)
        if "another process is at work" not in done.stderr:
            break
        assert time.monotonic() < deadline, done.stderr
        time.sleep(0.1)
    assert done.returncode == 0, done.stderr
    assert "from before" in done.stdout
    check(tmp_path, "pope", data)


def answered(output: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in output.rglob("shard-*.jsonl"))


def test_all_of_the_published_table_on_a_subset(data, tmp_path, cold):
    """Seven benchmarks by one worker; a seeded subset, scored on its own keys and labelled in every place."""
    env = settings(data, SUBSET="6")
    script = ["bash", str(scripts() / "eval_all.sh"), "v1_5", "14", "--max-new-tokens", "3"]
    done = run([*script, "--output", str(tmp_path)], env)
    for name in TABLE:
        folder, score = finished(tmp_path, name)
        asked = len((folder / "merge.jsonl").read_text().splitlines())
        assert score["partial"] == f"{asked} of 8 questions, drawn with seed 0"
        assert folder.name.startswith(f"adav-14-subset{asked}-")
    line = next(line for line in done.stdout.splitlines() if "adav [subset of 6, seed 0]" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1] == "14" and cells[8:] == ["-", "-"] and all(float(cell) >= 0 for cell in cells[2:8])
    assert "no average, which needs runs of the same checkpoint" in done.stdout
    assert "mmvet" in done.stdout and "has no score, only a file to upload" in done.stdout


# --------------------------------------------------------------------------------------------------------- plans
@pytest.mark.parametrize("family", REAL)
def test_the_plan_of_every_script(data, tmp_path, family, monkeypatch, capsys):
    """The family's own checkpoint, the exact commands of every shard, and nothing run.

    The last script runs. The others say the same three lines (test_eval_runs.py), so their plans are made here.
    """
    env = settings(data, CUDA_VISIBLE_DEVICES="3,1,2,0", GPUS_PER_MODEL="2", HF_HUB_OFFLINE="1")
    del env["CKPT"]
    for name in set(os.environ) - set(env):
        monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def plan(name):
        script, *given = arguments(family, name, tmp_path / "runs", "--plan")[1:]
        if name == NAMES[-1]:
            return run(["bash", script, *given], env).stdout
        launch.main([name, "--family", family, *given])
        return capsys.readouterr().out

    short = FAMILIES[family].checkpoint.rpartition("/")[2]
    for name in NAMES:
        printed = plan(name)
        benchmark = BENCHMARKS[name](data, None)
        assert f"{name} ({benchmark.split}), {FAMILIES[family].checkpoint}, method adav, 14 tokens:" in printed
        assert f"{len(benchmark.read())} questions of {benchmark.question_file}" in printed
        template = "chatml_direct" if family == "v1_6_34B" else "the checkpoint's own"
        assert f"template: {template}; at most {benchmark.max_new_tokens} new tokens" in printed
        commands = [line.strip() for line in printed.splitlines() if "llava.eval.worker" in line]
        assert [command.split()[0] for command in commands] == [
            f"CUDA_VISIBLE_DEVICES={group}" for group in ("3,1", "2,0")[: len(commands)]
        ]
        for shard, command in enumerate(commands):
            order = tmp_path / "runs" / name / short / "adav-14-DIGEST" / "shards" / f"order-{shard}.json"
            assert command.endswith(f"-m llava.eval.worker --watch-stdin {order}")
        assert len(commands) == (1 if name == "pope" else 2), "POPE's questions here are about one image"
    assert not (tmp_path / "runs").exists()


def test_the_plan_of_the_whole_table(data, tmp_path):
    script = ["bash", str(scripts() / "eval_all.sh"), "v1_6", "--plan", "--output", str(tmp_path)]
    printed = run(script, settings(data)).stdout
    assert [line.split()[0] for line in printed.splitlines() if ", method adav, 144 tokens:" in line] == list(TABLE)
    (command,) = [line for line in printed.splitlines() if "llava.eval.worker" in line]
    assert command.count("order-0.json") == len(TABLE), "one worker for all"


# ---------------------------------------------------------------------------------------------------------- long
@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", REAL)
def test_every_script_for_real(data, tmp_path, family, name):
    checkpoint = CHECKPOINT if family == "v1_5" else "playground/llava-shapes-v1.6"
    run(arguments(family, name, tmp_path), settings(data, CKPT=checkpoint))
    check(tmp_path, name, data)
