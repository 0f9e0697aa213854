"""benchmarks/eval_throughput.py without vLLM: providers that answer alike, and no figure where they do not; tables."""

import csv
import sys

import eval_throughput as throughput
import pytest
from record import write_csv

from llava.common.errors import UserError


@pytest.fixture
def without_vllm(monkeypatch):
    monkeypatch.setattr(throughput, "packages_distributions", dict)
    monkeypatch.setattr(throughput, "worker_python", lambda engine: sys.executable)


def order(folder, samples) -> throughput.WorkOrder:
    return throughput.WorkOrder(
        *(
            str(throughput.CHECKPOINT),
            None,
            throughput.AdaVConfig(overall_tokens=58),
            throughput.Generation(2),
            8,
            folder,
        ),
        *(folder / "answers.jsonl", tuple(samples)),
    )


def test_all_providers_answer_and_are_told_apart(without_vllm, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    output = tmp_path / "results" / "throughput.csv"
    flags = ["--device", "cpu", "--pictures", "1", "--repeats", "2", "--tokens", "58", "--each", "1", "3"]
    throughput.main([*flags, "--output", str(output)])
    rows = list(csv.DictReader(output.open()))
    own = ["upstream", "own_none", "own_fastervlm", "own_adav"]
    assert [(row["questions_per_picture"], row["provider"]) for row in rows] == [(n, one) for n in "13" for one in own]
    for row in rows:
        speeds = [float(row[f"questions_per_second{end}"]) for end in ("_min", "", "_max")]
        assert 0 < speeds[0] <= speeds[1] <= speeds[2] and 0 < float(row["llm_share"]) < 1
        assert row["questions"] == row["questions_per_picture"] and row["of_plain"] == row["vllm"] == ""
        assert row["overall_tokens"] == ("" if row["provider"] == "own_none" else "58")
        assert row["torch"] and row["device"] and row["command"].startswith("python benchmarks/eval_throughput.py ")
    assert rows[0]["of_upstream"] == rows[4]["of_upstream"] == "1.0"
    printed = capsys.readouterr()
    assert "of upstream" in printed.out and "so vLLM is left out" in printed.err


def test_the_upstream_loop_runs_the_tower_for_every_question_and_materialises_all_maps(tmp_path):
    samples = throughput.make_questions(tmp_path, "v1.6", 1, 8)
    assert len(samples) == 8 and {sample.images for sample in samples} == {("0000.png",)}
    upstream, passes = throughput.Upstream(order(tmp_path, samples)), []
    ours = upstream.shard.model.get_vision_tower()
    upstream.tower.register_forward_hook(lambda *_: passes.append(1))
    answers = upstream.run(tmp_path / "upstream.jsonl")
    assert len(passes) == 8 and upstream.shard.model.get_vision_tower() is ours, "and the tower is put back"
    pixels = throughput.torch.randn(2, 3, 96, 96)
    with throughput.torch.inference_mode():
        for eager, sdpa in zip(upstream.tower(pixels)[:2], ours(pixels)[:2], strict=True):
            throughput.torch.testing.assert_close(eager, sdpa, rtol=1e-4, atol=1e-5)
    loops = {"upstream": Fixed(answers), "own_adav": Fixed(answers[:-1] + ["something else"])}
    with pytest.raises(SystemExit, match="1 of 8 answers differ between upstream and own_adav, so no figure is given"):
        throughput.measure(loops, 1, tmp_path)


class Fixed:
    """A provider with fixed answers, of which a later run may give others."""

    def __init__(self, *runs):
        self.runs = list(runs)

    def run(self, file):
        return self.runs.pop(0) if len(self.runs) > 1 else self.runs[0]


def test_a_repetition_that_answers_otherwise_gives_no_figure(tmp_path):
    for wavering in ("plain", "own_none"):
        with pytest.raises(SystemExit, match=f"1 of 2 answers differ between two repetitions of {wavering}"):
            throughput.measure({"own_adav": Fixed("ab"), wavering: Fixed("ab", "ac")}, 1, tmp_path)
        throughput.measure({wavering: Fixed("ab", "ac")}, 1, tmp_path, may_differ=0.5)


def test_ratios_and_the_table_of_the_page(tmp_path):
    loops = {}
    for name in ("upstream", "plain", "own_adav"):
        spec = order(tmp_path, ())
        method = throughput.PROVIDERS[name][2]
        loops[name] = throughput.Worker(None, throughput.replace(spec, config=throughput.AdaVConfig(method=method)))
    loops["plain"].llm_seconds = None
    loops["own_adav"].llm_seconds = 1.5
    seconds = {"upstream": [8.0, 8.0, 8.0], "plain": [2.0, 1.0, 4.0], "own_adav": [1.0, 1.0, 1.0]}
    rows = throughput.rows_of(seconds, loops, 8)
    assert [(row["of_plain"], row["of_upstream"]) for row in rows] == [(0.25, 1.0), (1.0, 4.0), (2.0, 8.0)]
    assert [row["questions_per_second"] for row in rows] == [1.0, 4.0, 8.0]
    assert (rows[1]["questions_per_second_min"], rows[1]["questions_per_second_max"]) == (2.0, 8.0)
    assert [row["llm_share"] for row in rows] == [0.0, None, 0.5]
    facts = {"preset": "tiny", "command": "python x.py", "commit": "0" * 40, "questions_per_picture": 4}
    facts |= {"written": "now", "device": "a CPU", "threads": 1, "dtype": "float32", "torch": "2", "transformers": "5"}
    page, results = tmp_path / "page.md", tmp_path / "t.csv"
    write_csv(results, rows, facts)
    page.write_text("before\n<!-- eval_throughput -->\n<!-- end of eval_throughput -->\n")
    throughput.main(["--table", str(results), "--document", str(page)])
    text = page.read_text()
    assert text.startswith("before") and "tiny. `python x.py` at commit" in text
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "own engine" in line]
    assert cells == [["4", "own engine + adav", "144", "8.0", "8.0", "8.0", "2.00", "8.00", "50%"]]


def test_vllm_is_asked_for_where_no_python_has_it(without_vllm):
    assert throughput.chosen(["own_none"], []) == ["own_none"]
    with pytest.raises(UserError, match="has no vLLM, which --providers asks for; make vllm"):
        throughput.chosen(["plain", "own_none"], [])
    with pytest.raises(UserError, match='--providers has "fast", allowed are upstream, plain'):
        throughput.chosen(["fast"], [])


def test_the_command_changes_to_the_python_that_has_vllm(without_vllm, monkeypatch):
    seen = []
    monkeypatch.setattr(throughput, "worker_python", lambda engine: "/other/python")
    monkeypatch.setattr(throughput.os, "execve", lambda *given: seen.append(given))
    with pytest.raises(UserError):  # reached only because the process was not replaced
        throughput.chosen(["plain"], ["--each", "4"])
    ((python, command, environment),) = seen
    assert python == command[0] == "/other/python" and command[1].endswith("eval_throughput.py")
    assert command[2:] == ["--each", "4"] and str(throughput.REPOSITORY) in environment["PYTHONPATH"]
