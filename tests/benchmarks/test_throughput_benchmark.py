"""benchmarks/eval_throughput.py on one picture: both loops answer alike, and where they do not there is no figure."""

import csv
import importlib.util
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "eval_throughput.py"


@pytest.fixture(scope="module")
def throughput():
    spec = importlib.util.spec_from_file_location("eval_throughput", FILE)
    module = sys.modules["eval_throughput"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_loops_answer_alike_and_are_told_apart(throughput, tmp_path, capsys):
    output = tmp_path / "results" / "throughput.csv"
    throughput.main(["--device", "cpu", "--pictures", "1", "--repeats", "2", "--tokens", "58", "--output", str(output)])
    upstream, worker = csv.DictReader(output.open())
    assert (upstream["loop"], worker["loop"]) == ("upstream", "worker") and upstream["of_upstream"] == "1.0"
    for row in (upstream, worker):
        speeds = [float(row[f"questions_per_second{end}"]) for end in ("_min", "", "_max")]
        assert 0 < speeds[0] <= speeds[1] <= speeds[2] and 0 < float(row["llm_share"]) < 1
        assert (row["questions"], row["overall_tokens"], row["batch_size"]) == ("8", "58", "8")
        assert row["torch"] and row["device"] and row["command"].startswith("python benchmarks/eval_throughput.py ")
    assert "of upstream" in capsys.readouterr().out


def test_the_upstream_loop_runs_the_tower_for_every_question_and_materialises_all_maps(throughput, tmp_path):
    samples = throughput.make_questions(tmp_path, "v1.6", 1, 8)
    assert len(samples) == 8 and {sample.images for sample in samples} == {("0000.png",)}
    config = throughput.AdaVConfig(overall_tokens=58)
    spec = throughput.WorkOrder(
        *(str(throughput.CHECKPOINT), None, config, throughput.Generation(2), 8, tmp_path),
        *(tmp_path / "answers.jsonl", tuple(samples)),
    )
    shard = throughput.ShardAnswerer(spec)
    ours = shard.model.get_vision_tower()
    tower, passes = throughput.EagerTower(ours, shard.model.config.vision), []
    tower.register_forward_hook(lambda *_: passes.append(1))
    answers = throughput.Upstream(shard, tower, spec).run(tmp_path / "upstream.jsonl")
    assert len(passes) == 8 and shard.model.get_vision_tower() is ours, "and the tower is put back"
    pixels = throughput.torch.randn(2, 3, 96, 96)
    with throughput.torch.inference_mode():
        for eager, sdpa in zip(tower(pixels)[:2], ours(pixels)[:2], strict=True):
            throughput.torch.testing.assert_close(eager, sdpa, rtol=1e-4, atol=1e-5)
    loops = {"upstream": Fixed(answers), "worker": Fixed(answers[:-1] + ["something else"])}
    with pytest.raises(SystemExit, match="1 of 8 answers differ between upstream and worker, so no figure is given"):
        throughput.measure(loops, 1, tmp_path)


class Fixed:
    """A loop with a fixed outcome."""

    def __init__(self, answers):
        self.answers = answers

    def run(self, file):
        return self.answers
