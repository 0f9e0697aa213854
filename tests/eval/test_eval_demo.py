"""The demo and its benchmark on tiny random checkpoints, in one process: data, score, table, pictures."""

import json
import threading
from pathlib import Path

import pytest
from PIL import Image
from tiny_checkpoints import build_reference, save_clip_tower, save_original

from llava.eval import demo
from llava.eval.benchmarks.shapes import Shapes
from llava.eval.runs.answer_shard import ShardAnswerer


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "DATA_ROOT", tmp_path / "data")
    monkeypatch.setattr(demo, "FOLDER", tmp_path / "demo")
    monkeypatch.setattr(Shapes, "questions", 24)
    return tmp_path


def scene(folder: Path, kind: str, like: demo.Scene) -> demo.Scene:
    model = build_reference(kind)
    checkpoint = save_original(model, folder / kind, save_clip_tower(model, folder / "tower"))
    return demo.Scene(str(checkpoint), 11, 12, 6, like.settings)


def evaluate_runs(runs: dict) -> list[dict]:
    """What the launcher does with its processes, here in this one."""
    reports, shard = [], None
    for run in runs.values():
        run.open(fresh=True)
        order = run.order(0, run.todo(), 6)
        shard = shard or ShardAnswerer(order)
        shard.run(order, threading.Event())
        score = run.finish()
        reports.append(run.record({"answered": len(run.answered)}, score))
        run.close()
    return reports


@pytest.mark.parametrize(
    "kind, family, like", [("llava", "v1.5", demo.SCENES[0]), ("llava_next", "v1.6", demo.SCENES[1])]
)
def test_demo(place, kind, family, like):
    runs = demo.make_runs(scene(place, kind, like), place / "runs")
    assert {"none", "random", "fastervlm", "adav"} <= set(runs) and ("adav, compat=public" in runs) == (
        family == "v1.6"
    )
    folder = place / "data" / f"shapes-{family}"
    assert all(run.benchmark.folder == folder for run in runs.values()), "decided by the checkpoint's configuration"
    assert len((folder / "questions.jsonl").read_text().splitlines()) == 24 and len(runs["none"].samples) == 12
    reports = evaluate_runs(runs)
    lines = demo.table([("tiny", label, report) for label, report in zip(runs, reports, strict=True)]).splitlines()
    assert len(lines) == 2 + len(runs) and len(set(map(len, lines))) == 1
    kept = {label: report["vision_tokens_per_image"] for label, report in zip(runs, reports, strict=True)}
    assert kept["none"]["after"] == kept["none"]["before"] and kept["adav"]["after"] == kept["random"]["after"] == 11
    picture = demo.draw(runs)
    assert picture.parent == place / "demo" and Image.open(picture).width > 400


def test_shapes_scores_by_question_and_kind(place):
    runs = demo.make_runs(scene(place, "llava", demo.SCENES[0]), place / "runs")
    benchmark, samples = runs["none"].benchmark, runs["none"].samples
    labels = benchmark.labels()
    answers = [{"text": labels[s.question_id]["answer"].upper() + " "} for s in samples]
    assert benchmark.finish(samples, answers, place)["accuracy"] == 1
    assert benchmark.finish(samples, answers, place)["ended_after_one_word"] == 1
    answers[1]["text"] += "and more"  # the first word counts
    answers[0] = {"text": "nothing"}
    score = benchmark.finish(samples, answers, place)
    assert score["accuracy"] == score["ended_after_one_word"] == pytest.approx(11 / 12)
    assert score["questions"] == 12
    assert score["per_category"][labels[samples[0].question_id]["category"]] < 1
    assert set(score["per_category"]) == {label["category"] for label in list(labels.values())[:12]}


def test_shapes_data_is_drawn_anew_only_when_the_generator_changed(place, monkeypatch):
    benchmark = demo.make_runs(scene(place, "llava", demo.SCENES[0]), place / "runs")["none"].benchmark
    first = benchmark.question_file.stat().st_mtime_ns
    benchmark.load()
    assert benchmark.question_file.stat().st_mtime_ns == first
    recipe = benchmark.folder / "recipe.json"
    recipe.write_text(json.dumps(json.loads(recipe.read_text()) | {"generator": "another"}))
    benchmark.load()
    assert benchmark.question_file.stat().st_mtime_ns > first
