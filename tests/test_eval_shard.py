"""A loaded checkpoint that answers a work order: batches, formats, measurements, running out of memory; devices of shards."""

import json
import threading

import pytest
import torch
from eval_data import make_vqav2
from tiny_checkpoints import build_reference, save_clip_tower, save_llava_hf, save_original

from llava.config import AdaVConfig
from llava.errors import UserError
from llava.eval import shards
from llava.eval.benchmarks import BENCHMARKS
from llava.eval.checkpoints import find_checkpoint
from llava.eval.loaded_shard import LoadedShard
from llava.eval.run import Generation, Run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_vqav2(tmp_path_factory.mktemp("data"), 7, images=4)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    model = build_reference("llava_next")
    original = save_original(model, folder / "original", save_clip_tower(model, folder / "tower"))
    return {"original": original, "llava-hf": save_llava_hf(model, folder / "hf")}


def order(checkpoint, data, output, batch_size=4, **configuration) -> dict:
    """The work order of a whole run on one shard."""
    found = find_checkpoint(str(checkpoint))
    run = Run(BENCHMARKS["vqav2"](data, found), AdaVConfig(**configuration), found, Generation(12), output)
    run.shards.mkdir(parents=True, exist_ok=True)
    return {**run.order(0, run.samples, batch_size), "answers": str(output / f"answers-{batch_size}.jsonl")}


def rows_of(shard: LoadedShard, spec: dict) -> list[dict]:
    shard.run(spec, threading.Event())
    with open(spec["answers"]) as file:
        return [json.loads(line) for line in file]


def said(rows: list[dict]) -> list[tuple]:
    """What must not depend on the batch."""
    names = ("key", "answer", "total", "kept", "new_tokens", "kv_bytes_live", "kv_bytes_predicted", "conversation")
    names += ("prefill_flops", "layer_mean")
    return [tuple(row[name] for name in names) for row in rows]


@pytest.mark.parametrize(
    "kind, method",
    [
        ("original", "none"),
        ("original", "random"),
        ("original", "adav"),
        ("original", "no_image"),
        ("llava-hf", "adav"),
    ],
)
def test_answers_do_not_depend_on_the_batch(checkpoints, data, tmp_path, kind, method):
    specs = [order(checkpoints[kind], data, tmp_path, size, method=method, overall_tokens=9) for size in (1, 3, 7)]
    shard = LoadedShard(specs[0])
    alone, three, all_at_once = (rows_of(shard, spec) for spec in specs)
    assert said(alone) == said(three) == said(all_at_once) and len(alone) == 7
    assert [row["key"] for row in alone] == [sample["key"] for sample in specs[0]["samples"]]
    kept = {tuple(row["kept"]) for row in alone[:-1]}
    assert (
        kept == {(9,)} if method in ("random", "adav") else kept == {(0,)} if method == "no_image" else min(kept) > (9,)
    )
    assert alone[-1]["kept"] == [], "the last question has no image"
    assert all(row["layer_mean"] == row["kept"] for row in alone)
    assert min(row["prefill_flops"] for row in alone[:-1]) > alone[-1]["prefill_flops"] > 0
    assert all(row["kv_bytes_live"] == row["kv_bytes_predicted"] == row["kv_bytes_allocated"] for row in alone)
    assert all(row["kv_bytes_allocated"] >= row["kv_bytes_live"] for row in all_at_once)


def test_out_of_memory_halves_the_batch(checkpoints, data, tmp_path, monkeypatch):
    spec = order(checkpoints["original"], data, tmp_path, 7)
    shard = LoadedShard(spec)
    whole, room, tried = shard.answer, 2, []

    def answer(samples, *rest):
        tried.append(len(samples))
        if len(samples) > room:
            raise torch.OutOfMemoryError
        return whole(samples, *rest)

    monkeypatch.setattr(shard, "answer", answer)
    assert len(rows_of(shard, spec)) == 7 and tried == [7, 4, 2, 2, 2, 1]
    room = 0
    with pytest.raises(UserError, match="too little memory for one sample"):
        shard.run(spec, threading.Event())


def test_a_stopped_shard_finishes_its_batch(checkpoints, data, tmp_path, monkeypatch):
    spec = order(checkpoints["original"], data, tmp_path, 2)
    shard, stopping = LoadedShard(spec), threading.Event()
    whole = shard.answer
    monkeypatch.setattr(shard, "answer", lambda *args: stopping.set() or whole(*args))
    shard.run(spec, stopping)
    with open(spec["answers"]) as file:
        assert len(file.readlines()) == 2


@pytest.mark.parametrize(
    "visible, per_model, groups",
    [
        ("0,1,2,3", 1, ["0", "1", "2", "3"]),
        ("0, 1,2,3", 2, ["0,1", "2,3"]),
        ("GPU-abc,GPU-def", 1, ["GPU-abc", "GPU-def"]),
        ("", 1, []),
        ("-1", 1, []),
        ("2,-1,3", 1, ["2"]),
        (None, 1, ["0"]),
    ],
)
def test_devices(monkeypatch, visible, per_model, groups):
    monkeypatch.setattr(shards, "gpus", lambda: ["GPU 0: made up", "GPU 1: made up"])
    monkeypatch.setattr(shards, "torch_is_for_cpu", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert shards.device_groups(per_model) == groups


def test_devices_that_do_not_divide(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    with pytest.raises(UserError, match="names 3 devices, allowed is a multiple of the 2 per model"):
        shards.device_groups(2)
