"""The launcher as a user runs it, with a tiny random checkpoint: kills, resumes, full disks, unreadable images."""

import json
import os
import random
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest
from eval_data import REPOSITORY, SPLIT, command, environment, launch, make_vqav2
from tiny_checkpoints import build_reference, save_clip_tower, save_original

from llava.eval.benchmarks import BENCHMARKS
from llava.eval.benchmarks.drawn import Drawn
from llava.eval.runs.run import FAMILIES

pytestmark = pytest.mark.usefixtures("warm")
QUESTIONS = 72


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model = build_reference("llava")
    return save_original(model, folder / "tiny-v1.5", save_clip_tower(model, folder / "tower"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_vqav2(tmp_path_factory.mktemp("data"), QUESTIONS, images=6)


def arguments(checkpoint, data, output, *extra):
    flags = {"checkpoint": checkpoint, "data-root": data, "output": output, "batch-size": 2, "max-new-tokens": 32}
    return ["vqav2", "5", *(part for name, value in flags.items() for part in (f"--{name}", value)), *extra]


def only(output: Path, pattern: str) -> Path:
    (found,) = output.rglob(pattern)
    return found


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(checkpoint, data, tmp_path_factory):
    """merge.jsonl of a run that nothing happened to, on one shard."""
    output = tmp_path_factory.mktemp("undisturbed")
    done = launch(*arguments(checkpoint, data, output))
    assert done.returncode == 0, done.stderr
    return only(output, "merge.jsonl")


def test_a_run_leaves_everything_behind(undisturbed, data):
    folder = undisturbed.parent
    merged = rows(undisturbed)
    questions = rows(data / "vqav2" / f"{SPLIT}.jsonl")
    assert [(row["question_id"], row["prompt"]) for row in merged] == [(q["question_id"], q["text"]) for q in questions]
    assert len({row["answer_id"] for row in merged}) == QUESTIONS
    assert merged[0]["metadata"] == {"vision_tokens": 5, "vision_tokens_before": 16, "image": questions[0]["image"]}
    assert merged[-1]["metadata"] == {"vision_tokens": 0, "vision_tokens_before": 0}
    report = json.loads((folder / "run.json").read_text())
    assert (
        report["configuration"]["overall_tokens"]
        == 5
        == json.loads((folder / "adav_configs.json").read_text())["overall_tokens"]
    )
    assert report["vision_tokens_per_image"] == {
        "before": 16.0,
        "after": 5.0,
        "layer_mean": 5.0,
        "images": QUESTIONS - 1,
    }
    assert (
        report["prefill_flops_predicted"]["mean"] > 1e6 and report["prefill_flops_predicted"]["questions"] == QUESTIONS
    )
    assert report["kv_bytes_live"] == report["kv_bytes_predicted"]
    assert report["kv_bytes_allocated"]["mean"] >= report["kv_bytes_live"]["mean"] > 0
    stages = {"image_decode", "vision_tower", "projector", "selection", "splice", "prefill", "decode"}
    assert set(report["seconds_per_stage"]) == stages and min(report["seconds_per_stage"].values()) > 0
    assert report["environment"]["packages"]["torch"] and report["peak_memory_bytes_per_shard"]["rss"] > 1e8
    assert report["sessions"][-1]["outcome"] == "finished" and report["conversation"] == ["vicuna_v1"]
    upload = Path(report["score"]["upload"])
    assert len(json.loads(upload.read_text())) == QUESTIONS + 1


# ------------------------------------------------------------------------------------------------------- kills
def workers(output: Path) -> dict[int, int]:
    """Shard number -> process id of the running workers with orders in this folder."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # it ended while we looked
        orders = [Path(word) for word in words if word.startswith(f"{output}/") and "order-" in word]
        if orders:
            found[int(orders[0].stem.removeprefix("order-"))] = int(file.parent.name)
    return found


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def answered(output: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in output.rglob("shard-*.jsonl"))


def start(*args) -> subprocess.Popen:
    return subprocess.Popen(
        command(*args), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_ten_killed_shards_lose_nothing(checkpoint, data, undisturbed, tmp_path):
    """Each time a random shard dies at a random moment: while it loads, or (every other time) after some answers."""
    chance = random.Random(0)
    for attempt in range(10):
        shards = 2 if attempt in (1, 4) else 1
        before = answered(tmp_path)
        launcher = start(*arguments(checkpoint, data, tmp_path, "--shards", shards))
        wait_for(lambda shards=shards: len(workers(tmp_path)) == shards)
        pids = workers(tmp_path)
        if attempt % 2 == 0:
            moment = time.monotonic() + chance.uniform(0, 0.6)  # a warm worker loads in less
            while time.monotonic() < moment and answered(tmp_path) == before:
                time.sleep(0.01)  # not past the first answer: a fast machine would be done before the kill
        else:
            more = chance.randint(1, (QUESTIONS - before) // (11 - attempt))
            wait_for(lambda goal=before + more: answered(tmp_path) >= goal)
        victim = chance.choice(sorted(pids))
        os.kill(pids[victim], signal.SIGKILL)
        _, said = launcher.communicate(timeout=120)
        assert launcher.returncode == 1, said
        assert f"error: shard {victim} (CPU) was killed by SIGKILL" in said and "the same command continues" in said
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values()), "a shard was left behind"
        assert not list(tmp_path.rglob("merge.jsonl")) and answered(tmp_path) >= before
    assert answered(tmp_path) > 0, "no kill came after an answer"
    done = launch(*arguments(checkpoint, data, tmp_path, "--shards", "2"))
    assert done.returncode == 0, done.stderr
    assert only(tmp_path, "merge.jsonl").read_bytes() == undisturbed.read_bytes()
    keys = [tuple(row["key"]) for path in tmp_path.rglob("shard-*.jsonl") for row in rows(path)]
    assert len(keys) == len(set(keys)) == QUESTIONS
    assert len(json.loads(only(tmp_path, "run.json").read_text())["sessions"]) == 11
    again = launch(*arguments(checkpoint, data, tmp_path))
    assert again.returncode == 0 and "0 questions answered in 0" in again.stdout, again.stdout


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_no_shard_outlives_the_launcher(checkpoint, data, tmp_path, cold, number, code):
    launcher = start(*arguments(checkpoint, data, tmp_path, "--shards", "2"))
    wait_for(lambda: len(workers(tmp_path)) == 2)
    pids = list(workers(tmp_path).values())
    launcher.send_signal(number)
    _, said = launcher.communicate(timeout=60)
    assert launcher.returncode == code, said
    wait_for(lambda: not any(_running(pid) for pid in pids), seconds=30)
    if number != signal.SIGKILL:
        assert f"stopped by {number.name}: 0 of {QUESTIONS} questions are answered and kept" in said


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


# --------------------------------------------------------------------------------------------------- bad input
def test_a_full_disk_and_an_unreadable_image_lose_nothing(checkpoint, data, undisturbed, tmp_path):
    """A limit on file sizes stands in for the disk: the answers grow into it, the smaller files do not.

    Then one picture is damaged: it is named, all others are answered, nothing is scored. Then all is well.
    """
    args = arguments(checkpoint, data, tmp_path)
    failed = launch(*args, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (26_000, 26_000)))
    assert failed.returncode == 2, failed.stderr
    said = only_error(failed.stderr)
    assert "shard 0 (CPU): " in said and "cannot be written, a file size limit is reached" in said
    before = answered(tmp_path)
    assert 0 < before < QUESTIONS and not list(tmp_path.rglob("merge.jsonl"))

    held = {tuple(row["key"]) for path in tmp_path.rglob("shard-*.jsonl") for row in complete(path)}
    questions = rows(data / "vqav2" / f"{SPLIT}.jsonl")
    name = next(q["image"] for q in questions if "image" in q and (q["question_id"], q["image"], q["text"]) not in held)
    missing = [q for q in questions if q.get("image") == name and (q["question_id"], name, q["text"]) not in held]
    picture = data / "vqav2" / "test2015" / name
    whole = picture.read_bytes()
    picture.write_bytes(whole[: len(whole) // 2])
    try:
        failed = launch(*args)
    finally:
        picture.write_bytes(whole)
    assert failed.returncode == 2, failed.stderr
    said = only_error(failed.stderr)
    line = questions.index(missing[0]) + 1
    assert f'line {line}: image "{name}" cannot be read (OSError: image file is truncated' in said
    assert f"{QUESTIONS - len(missing)} of {QUESTIONS} questions are answered, nothing is scored" in said
    assert not list(tmp_path.rglob("merge.jsonl")) and not list(tmp_path.rglob("score.json"))

    done = launch(*args)
    assert done.returncode == 0, done.stderr
    assert f"{len(missing)} questions answered" in done.stdout
    assert only(tmp_path, "merge.jsonl").read_bytes() == undisturbed.read_bytes()


def only_error(stderr: str) -> str:
    (said,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    return said


def complete(path: Path) -> list[dict]:
    """The whole lines of a file whose last one may be torn."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def test_the_scripts_are_few_lines_over_one_launcher(tmp_path):
    scripts = sorted(REPOSITORY.glob("scripts/*/eval/*.sh"))
    families = [name for name in FAMILIES if name != "demo"]
    drawn = {name for name, benchmark in BENCHMARKS.items() if issubclass(benchmark, Drawn)}
    expected = {
        *(("demo", name) for name in drawn),
        *((f, name) for f in families for name in BENCHMARKS if name not in drawn),
    }
    assert {(script.parts[-3], script.stem) for script in scripts} == expected and len(expected) == 35
    for script in scripts:
        family = script.parts[-3]
        lines = script.read_text().splitlines()
        assert len(lines) == 3 and lines[2].endswith(f'launch.sh" {script.stem} --family {family} "$@"')
        assert f"bash scripts/{family}/eval/{script.stem}.sh [tokens]" in lines[1]
    # From another folder, with a checkpoint that is not there: the launcher answers.
    env = {**environment(), "CKPT": "./nowhere"}
    done = subprocess.run(["bash", str(scripts[0]), "14"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ./nowhere: no such")


def test_answers_of_another_version_of_the_code_are_pointed_out(undisturbed, checkpoint, data):
    """Also where the start that answered was killed and left no run.json."""
    folder = undisturbed.parent
    kept = {path: path.read_text() for path in (folder / "shards" / "code.json", folder / "run.json")}
    noted = json.loads(kept[folder / "shards" / "code.json"])
    assert noted == [json.loads(kept[folder / "run.json"])["sessions"][0]["code"]]
    (folder / "shards" / "code.json").write_text('["0123456789"]')
    (folder / "run.json").unlink()
    done = launch(*arguments(checkpoint, data, undisturbed.parents[3]))
    assert done.returncode == 0 and f"{QUESTIONS} answers came from another version of the code" in done.stderr
    for path, content in kept.items():
        path.write_text(content)
