"""The launcher with --engine vllm: the rows of its own engine, resume, scores, and what vLLM measured. Needs make vllm."""

import json
import os
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import eval_data
import pytest
from eval_data import command, environment, make_vqav2
from tiny_checkpoints import build_reference, save_clip_tower, save_llava_hf, save_original

from llava.common.errors import UserError
from llava.eval.runs.engines import RunEngine

try:
    VLLM = RunEngine.named("vllm")
except UserError as error:
    pytest.skip(f"vLLM is not there ({error})", allow_module_level=True)
pytestmark = pytest.mark.long

QUESTIONS = 40
PATIENCE = 900  # seconds: vLLM starts in half a minute on an idle core, and each run here starts one
launch = partial(eval_data.launch, timeout=PATIENCE)
# vLLM's kernels have heads of 32 and up.
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Both classes of vLLM; the first in LLaVA's format, which is exported, the second in transformers'."""
    folder = tmp_path_factory.mktemp("checkpoints")
    one, several = build_reference("llava", **SIZES), build_reference("llava_next", seed=1, **SIZES)
    original = save_original(one, folder / "tiny-v1.5", save_clip_tower(one, folder / "tower"))
    return {"v1.5": original, "v1.6": save_llava_hf(several, folder / "tiny-v1.6", layout="published")}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_vqav2(tmp_path_factory.mktemp("data"), QUESTIONS, images=6)


def arguments(checkpoint, data, output, engine, method, *extra):
    flags = {"checkpoint": checkpoint, "data-root": data, "output": output, "max-new-tokens": 12, "engine": engine}
    words = [part for name, value in {**flags, "method": method}.items() for part in (f"--{name}", value)]
    return ["vqav2", "7", *words, *extra]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def merged(output: Path) -> list[dict]:
    """Rows of the only merge.jsonl below `output`, without the id, which the engine is a part of."""
    (path,) = output.rglob("merge.jsonl")
    return [{name: value for name, value in row.items() if name != "answer_id"} for row in rows(path)]


def report(output: Path) -> dict:
    (path,) = output.rglob("run.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize("family", ["v1.5", "v1.6"])
@pytest.mark.parametrize("method", ["none", "fastervlm", "adav"])
def test_the_answers_are_those_of_our_own_engine(checkpoints, data, tmp_path, family, method):
    for engine in ("llava", "vllm"):
        done = launch(*arguments(checkpoints[family], data, tmp_path / engine, engine, method))
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stderr
    assert merged(tmp_path / "vllm") == merged(tmp_path / "llava")
    ours, theirs = report(tmp_path / "llava"), report(tmp_path / "vllm")
    for name in ("vision_tokens_per_image", "prefill_flops_predicted", "new_tokens", "conversation"):
        assert theirs[name] == ours[name], name
    assert theirs["engine"] == {"name": "vllm", "version": VLLM.version}
    measured = theirs["vllm"]
    assert measured["seconds_to_first_token"]["max"] >= measured["seconds_to_first_token"]["mean"] > 0
    assert 0 <= measured["cached_prompt_tokens"]["share"] < 1


def test_a_stopped_run_goes_on_and_another_engine_is_another_run(checkpoints, data, tmp_path):
    args = arguments(checkpoints["v1.5"], data, tmp_path / "runs", "vllm", "adav", "--batch-size", "4")
    whole = launch(*arguments(checkpoints["v1.5"], data, tmp_path / "whole", "vllm", "adav"))
    assert whole.returncode == 0, whole.stderr
    launcher = subprocess.Popen(
        command(*args), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + PATIENCE
    while not _answered(tmp_path / "runs"):
        assert launcher.poll() is None and time.monotonic() < deadline, "no answer came"
        time.sleep(0.01)
    os.kill(launcher.pid, signal.SIGTERM)
    _, said = launcher.communicate(timeout=120)
    before = _answered(tmp_path / "runs")
    if launcher.returncode == 0:
        pytest.fail("the run ended before it was stopped: give it more questions")
    assert launcher.returncode == 143 and f"stopped by SIGTERM: {before} of {QUESTIONS} questions" in said
    done = launch(*args, "--shards", "2")
    assert done.returncode == 0 and f"{QUESTIONS - before} questions answered" in done.stdout, done.stderr
    assert merged(tmp_path / "runs") == merged(tmp_path / "whole")
    keys = [tuple(row["key"]) for path in (tmp_path / "runs").rglob("shard-*.jsonl") for row in rows(path)]
    assert len(keys) == len(set(keys)) == QUESTIONS
    # The own engine begins a run of its own beside it.
    done = launch(*arguments(checkpoints["v1.5"], data, tmp_path / "runs", "llava", "adav", "--plan"))
    assert f"0 answered already, {QUESTIONS} to do" in done.stdout


def _answered(output: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in output.rglob("shard-*.jsonl"))


def test_an_unreadable_image_is_named_and_the_others_are_answered(checkpoints, data, tmp_path):
    name = rows(next((data / "vqav2").glob("*test-dev2015.jsonl")))[0]["image"]
    picture = data / "vqav2" / "test2015" / name
    whole = picture.read_bytes()
    picture.write_bytes(whole[: len(whole) // 2])
    try:
        failed = launch(*arguments(checkpoints["v1.5"], data, tmp_path, "vllm", "cls"))
    finally:
        picture.write_bytes(whole)
    assert failed.returncode == 2 and f'image "{name}" cannot be read (OSError' in failed.stderr
    assert "nothing is scored" in failed.stderr and _answered(tmp_path) > 0


def test_what_the_plugin_refuses_is_one_sentence(checkpoints, data, tmp_path):
    failed = launch(*arguments(checkpoints["v1.5"], data, tmp_path, "vllm", "sparsevlm"))
    assert failed.returncode == 2 and 'error: method "sparsevlm" drops tokens inside the LLM' in failed.stderr
