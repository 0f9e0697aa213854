"""Worker processes and threads of a run where the user names none, and what a loaded checkpoint does by itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from llava.common import threads
from llava.common.find_checkpoint import EvalCheckpoint, find_checkpoint
from llava.common.threads import SMALL_MODEL
from llava.config import AdaVConfig
from llava.eval.benchmarks.questions import Sample
from llava.eval.runs import worker_processes
from llava.eval.runs.engines import RunEngine
from llava.eval.runs.shard_count import batch_size_of, shard_threads, shards_to_start
from llava.eval.runs.worker_processes import threads_of_each, worker_settings
from llava.inference.loaded_checkpoint import LoadedCheckpoint

DEMO = "playground/llava-shapes-v1.5"


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    for module in (threads, worker_processes):
        monkeypatch.setattr(module, "cores", lambda: 8)
    monkeypatch.setattr(threads, "available_memory", lambda: 100 << 30)


def run(parameters: int | None, base: int | None = None, engine: str = "llava", anyres=False, **keys):
    """What is read of a Run. keys: of its configuration."""
    model_base = None if base is None else SimpleNamespace(parameters=base)
    checkpoint = SimpleNamespace(parameters=parameters, anyres=anyres)
    return SimpleNamespace(
        checkpoint=checkpoint, model_base=model_base, engine=RunEngine(engine), config=AdaVConfig(**keys)
    )


def questions(number: int) -> list[Sample]:
    return [Sample(n, n, f"{n}.png", "x", "x", (n, f"{n}.png", "x"), {}) for n in range(number)]


@pytest.mark.parametrize(
    "one, number, asked, devices, expected",
    [
        (run(1), 10_000, None, [], 8),
        (run(1), 1_300, None, [], 2),  # too few questions for more
        (run(1), 10, None, [], 1),
        (run(1), 10, 3, [], 3),
        (run(1), 2, 3, [], 2),  # one image each
        (run(SMALL_MODEL + 1), 10_000, None, [], 1),
        (run(None), 10_000, None, [], 1),
        (run(1, base=SMALL_MODEL), 10_000, None, [], 1),
        (run(1, base=1), 10_000, None, [], 8),
        (run(1, engine="vllm"), 10_000, None, [], 1),
        (run(1), 10, None, ["0", "1"], 2),
        (run(SMALL_MODEL + 1, engine="vllm"), 10, None, ["0,1", "2,3"], 2),
    ],
)
def test_shards_where_the_user_names_none(one, number, asked, devices, expected):
    assert shards_to_start([one], [questions(number)], asked, devices) == expected


def test_the_questions_of_all_runs_count():
    assert shards_to_start([run(1), run(1)], [questions(900), questions(400)], None, []) == 2


@pytest.mark.parametrize(
    "runs, asked, devices, expected",
    [
        ([run(1)], None, [], 32),
        ([run(1)], 5, [], 5),
        ([run(1)], None, ["0"], 8),
        ([run(SMALL_MODEL + 1)], None, [], 8),
        ([run(1, engine="vllm")], None, [], 128),
        ([run(1, method="none")], None, [], 32),
        ([run(1, anyres=True)], None, [], 32),
        ([run(1, anyres=True, overall_tokens=720)], None, [], 8),
        ([run(1, anyres=True, method="fastv")], None, [], 8),
        ([run(1, anyres=True), run(1, anyres=True, method="none")], None, [], 8),
    ],
)
def test_a_batch(runs, asked, devices, expected):
    assert batch_size_of(runs, asked, devices) == expected


def test_threads_of_a_shard(monkeypatch):
    assert shard_threads([run(1)], None, []) == 1
    assert shard_threads([run(1)], 3, []) == 3
    assert shard_threads([run(SMALL_MODEL + 1)], None, []) is None
    assert shard_threads([run(1)], None, ["0"]) is None, "beside a GPU, threads decode images"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert shard_threads([run(1)], None, []) == 5
    assert (threads_of_each(3, None), threads_of_each(99, None), threads_of_each(3, 4)) == (2, 1, 4)


def test_the_environment_of_a_shard(monkeypatch):
    assert worker_settings(None, 2, None) == {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "4",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    expected = {"CUDA_VISIBLE_DEVICES": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "ACTIVE"}
    assert worker_settings("1", 2, 1) == expected


def test_parameters_are_counted_in_the_files(tmp_path):
    found = find_checkpoint(DEMO)
    loaded = LoadedCheckpoint(found.folder, device="cpu", threads=1)
    # The file also has the last layer of the tower, whose output is not used.
    assert 0 < found.parameters - sum(part.numel() for part in loaded.model.parameters()) < 0.2 * found.parameters
    assert EvalCheckpoint("x", None, {}).parameters is None
    (tmp_path / "pytorch_model.bin").write_bytes(bytes(100))
    assert EvalCheckpoint("x", tmp_path, {}).parameters == 50, "of 16 bits"
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    assert EvalCheckpoint("x", tmp_path, {}).parameters == 0, "the worker says what is wrong with it"


def test_a_small_checkpoint_takes_one_thread(monkeypatch):
    before = torch.get_num_threads()
    try:
        for asked, named, expected in ((None, None, 1), (2, None, 2), (None, "3", 3)):
            if named:
                monkeypatch.setenv("OMP_NUM_THREADS", named)
            torch.set_num_threads(4)
            LoadedCheckpoint(DEMO, device="cpu", threads=asked)
            assert torch.get_num_threads() == expected
        monkeypatch.delenv("OMP_NUM_THREADS")
        monkeypatch.setattr(threads, "SMALL_MODEL", 1000)
        torch.set_num_threads(4)
        LoadedCheckpoint(DEMO, device="cpu")
        assert torch.get_num_threads() == 4, "a large one takes what torch has"
    finally:
        torch.set_num_threads(before)
