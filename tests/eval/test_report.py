"""The report: one page from run folders, its figures, its flips, what is left out, and that nothing of a run is markup."""

import itertools
import json
import re
import shutil
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from benchmark_data import make_benchmark
from eval_data import launch
from report_runs import Bench
from test_benchmarks import SCORED, right_answer
from tiny_checkpoints import build_reference, save_clip_tower, save_original

from llava.common.find_checkpoint import EvalCheckpoint
from llava.config import AdaVConfig
from llava.eval.benchmarks import BENCHMARKS
from llava.eval.report import charts, page, pictures
from llava.eval.report.__main__ import main
from llava.eval.report.comparison import compare
from llava.eval.report.records import Cell, records
from llava.eval.report.runs import Questions, find
from llava.eval.runs.run import Run
from llava.eval.runs.work_order import Generation
from llava.eval.scoring.bootstrap import cluster_intervals, ratio_intervals
from llava.eval.scoring.verdicts import headline


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def judged(*folders, data_root=None):
    runs, notes = find(folders)
    questions = Questions(data_root)
    for run in runs:
        questions.judge(run)
    return runs, notes


def report(bench, *arguments) -> str:
    out = bench.root / "report.html"
    main([str(bench.output), "-o", str(out), *arguments])
    return out.read_text(encoding="utf-8")


class Page(HTMLParser):
    """Tags with their attributes, the text, and every void or unclosed tag checked for balance."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, html):
        super().__init__()
        self.tags, self.open, self.text = [], [], []
        self.feed(html)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        self.text.append(data)


# ---------------------------------------------------------------------------------------------------- every answer
@pytest.mark.parametrize("name, split", SCORED)
def test_the_terms_of_the_verdicts_make_the_score(bench, name, split):
    for wrong in ((), (1, 2, 5), (0, 3, 4, 6, 7, 11)):
        (run,), _ = judged(bench.run(name, split=split, wrong=wrong, tokens=3 + len(wrong), method="random"))
        assert not run.gap and run.answers
        assert [answer.verdict.right for answer in run.answers.values()] == [
            n not in wrong for n in range(len(run.answers))
        ]
        for n, answer in enumerate(run.answers.values()):
            if name in ("pope", "mme", "gqa", "textvqa"):
                assert answer.verdict.expected == right_answer(name, n)
            if name in ("seed", "sqa") or "mmbench" in name:
                assert answer.verdict.expected.startswith(right_answer(name, n) + ". ")
        again = headline([answer.verdict for answer in run.answers.values()])
        assert again * (1 if run.points else 100) == pytest.approx(run.score)


def test_kinds_are_the_benchmarks_own(bench):
    kinds = {}
    for name, split in SCORED:
        (run,), _ = judged(bench.run(name, split=split))
        kinds[name] = {kind for answer in run.answers.values() for kind in answer.verdict.kinds}
    assert kinds["textvqa"] == set()
    assert kinds["pope"] == {"adversarial", "popular", "random"} and kinds["gqa"] == {"query", "verify"}
    assert kinds["mme"] == {"existence", "artwork", "code_reasoning", "posters"}
    assert kinds["vqav2"] == {"other", "number", "yes/no"} and kinds["mmbench"] == {"colour", "place"}
    assert kinds["sqa"] == {"with image", "without image"}
    assert kinds["seed"] == {"Scene Understanding", "Instance Identity"}


def test_intervals_of_a_ratio_of_sums():
    """POPE's F1 and MME's points: the same draws as for means, recomputed here with a plain loop."""
    values = np.random.default_rng(3).integers(0, 2, (30, 3)).astype(float)
    pictures = [n // 3 for n in range(30)]
    below = np.random.default_rng(4).integers(0, 3, (30, 3)).astype(float)
    combine = np.array([[1.0, 1, 0], [1, 0, 1], [0, -1, 0]])
    value, low, high = ratio_intervals(values, below, combine, pictures, resamples=400, seed=7)
    plain = values.sum(0) / below.sum(0)
    assert value == pytest.approx(plain @ combine)
    weights = np.random.default_rng(7).multinomial(10, [0.1] * 10, size=400)
    drawn = []
    for counts in weights:
        rows = [3 * picture + i for picture, count in enumerate(counts) for _ in range(count) for i in range(3)]
        drawn.append((values[rows].sum(0) / below[rows].sum(0)) @ combine)
    assert low == pytest.approx(np.quantile(drawn, 0.025, axis=0))
    assert high == pytest.approx(np.quantile(drawn, 0.975, axis=0))
    means = cluster_intervals(values, pictures, 400, seed=7)
    same = ratio_intervals(values, np.ones((30, 1)), None, pictures, 400, seed=7)
    assert all(np.array_equal(a, b) for a, b in zip(means[1:], same[1:], strict=True))


# ------------------------------------------------------------------------------------------------------ comparisons
def test_differences_and_flips_by_hand(bench):
    bench.run(method="none", wrong=(0, 1))
    bench.run(method="adav", wrong=(1, 2, 3, 9))
    bench.run(method="random", wrong=(2,), tokens=4)
    (comparison,) = compare(judged(bench.output)[0])
    assert [run.title for run in comparison.runs] == ["none", "adav, 8 tokens", "random, 4 tokens"]
    assert comparison.reference == 0 and comparison.pictures == 4
    assert [score.value for score in comparison.scores] == [87.5, 75.0, 93.75]
    assert comparison.differences[0] is None
    assert [difference.value for difference in comparison.differences[1:]] == [-12.5, 6.25]
    assert [comparison.flipped(n) for n in range(3)] == [None, (3, 1), (1, 2)]
    shown = [(flip.reference.sample.question_id, flip.wrong) for flip in comparison.worst(9)]
    assert shown == [("20000002", 2), ("20000003", 1), ("20000009", 1)], "what most runs get wrong comes first"
    assert len(comparison.worst(1)) == 1 and comparison.worst(0) == []
    kinds = {kind.name: [share.value for share in kind.shares] for kind in comparison.kinds}
    assert kinds == {"query": [87.5, 87.5, 87.5], "verify": [87.5, 62.5, 100.0]}


def test_questions_are_split_by_what_downsampling_answers(bench):
    """Each run of method downsample makes two groups; a group without questions is left out."""
    folders = [
        bench.run(),
        bench.run(method="adav", wrong={0, 1, 4}, tokens=9),
        bench.run(method="downsample", wrong={0, 1, 2, 3}, tokens=9),
        bench.run(method="downsample", wrong=(), tokens=4),
    ]
    (comparison,) = compare(judged(*folders)[0])
    shares = {kind.name: [share.value for share in kind.shares] for kind in comparison.kinds}
    counts = {kind.name: kind.questions for kind in comparison.kinds}
    assert [run.title for run in comparison.runs] == [
        "none",
        "adav, 9 tokens",
        "downsample, 9 tokens",
        "downsample, 4 tokens",
    ]
    assert list(shares)[:2] == ["query", "verify"] and "downsample, 4 tokens: wrong" not in shares
    assert shares["downsample, 9 tokens: wrong"] == [100, 50, 0, 100] and counts["downsample, 9 tokens: wrong"] == 4
    right = shares["downsample, 9 tokens: right"]
    assert right == pytest.approx([100, 100 * 11 / 12, 100, 100]) and counts["downsample, 9 tokens: right"] == 12
    html = report(bench)
    assert "downsample, 9 tokens: wrong" in html


def test_without_an_unpruned_run_most_tokens_are_the_reference(bench):
    bench.run(method="adav", tokens=4)
    bench.run(method="random", tokens=9)
    (comparison,) = compare(judged(bench.output)[0])
    assert comparison.runs[comparison.reference].title == "random, 9 tokens"


def test_only_runs_of_one_checkpoint_benchmark_and_part_are_compared(bench):
    bench.run()
    bench.run(method="adav")
    bench.run(method="adav", checkpoint="other")
    bench.run(method="adav", limit=8)
    bench.run(method="adav", subset=8)
    bench.run("pope", method="adav")
    bench.checkpoints["tiny"] = EvalCheckpoint("tiny", bench.checkpoint("retrained").folder, {})
    bench.run(method="adav", tokens=5)
    comparisons = compare(judged(bench.output)[0])
    assert sorted(len(comparison.runs) for comparison in comparisons) == [1, 1, 1, 1, 1, 2]
    html = report(bench)
    assert html.count("Scores and costs</h3>") == 6
    assert "the first 8 of 16 questions" in html and "8 of 16 questions, drawn with seed 0" in html


def test_comparisons_with_the_unpruned_run_come_first(bench):
    bench.run("pope", method="adav", checkpoint="a")
    bench.run("gqa", method="adav", checkpoint="b")
    bench.run("mme", method="random", checkpoint="c")
    bench.run("mme", method="none", checkpoint="c", wrong=(1,))
    bench.run("gqa", method="none", checkpoint="d")
    comparisons = compare(judged(bench.output)[0])
    assert [one.first.checkpoint for one in comparisons] == ["c", "d", "a", "b"]
    assert [run.method for run in comparisons[0].runs] == ["none", "random"]
    sections = re.findall(r'<section id="c\d"[^>]*>\s*<h2>(\w+) ', report(bench))
    assert sections == ["mme", "gqa", "pope", "gqa"]


def test_a_run_with_a_missing_label_is_judged_and_says_what_part_it_is(bench):
    bench.run(method="none")
    path = bench.run(method="adav", wrong=(1,))
    labels = bench.data / "gqa" / "data" / "testdev_balanced_questions.json"
    labels.write_text(
        json.dumps({key: one for key, one in json.loads(labels.read_text()).items() if key != "20000002"})
    )
    known = bench.checkpoint("tiny")
    benchmark = BENCHMARKS["gqa"](bench.data, known)
    run = Run(benchmark, AdaVConfig(method="adav", overall_tokens=8), known, Generation(16), bench.output, partial=True)
    assert run.folder == path
    run.open()
    run.record(
        {"outcome": "finished"} | json.loads((path / "run.json").read_text())["sessions"][0], run.finish(partial=True)
    )
    run.close()
    (judged_run,) = [run for run in judged(bench.output)[0] if run.method == "adav"]
    assert len(judged_run.answers) == 15 and judged_run.score == pytest.approx(100 * 14 / 15)
    assert judged_run.state == "partial: 15 questions with a label, out of 16 questions"


def test_a_partial_run_is_compared_on_what_both_answered(bench):
    bench.run(method="none", wrong=(1,))
    bench.run(method="adav", wrong=(2,), unreadable=(8, 9, 10, 11))
    (comparison,) = compare(judged(bench.output)[0])
    assert comparison.scores[1].value == pytest.approx(100 * 11 / 12) and comparison.differences[1] is None
    assert comparison.flipped(1) == (1, 1)
    assert "partial: 4 of 16 questions left out" in report(bench)


def test_configurations_of_one_method_are_told_apart(bench):
    bench.run(method="adav")
    bench.run(method="adav", vision_adaptive_attention=True)
    bench.run(method="adav", options={"min_share": 0.1})
    html = report(bench)
    for label in ("adav", "adav (vision_adaptive_attention=true)", "adav (min_share=0.1)"):
        assert f">{label}</a>" in html


@pytest.mark.long
def test_runs_of_the_real_worker(tmp_path):
    model = build_reference("llava")
    checkpoint = save_original(model, tmp_path / "tiny-v1.5", save_clip_tower(model, tmp_path / "tower"))
    make_benchmark("pope", tmp_path / "data", 12)
    flags = ["--checkpoint", checkpoint, "--data-root", tmp_path / "data", "--output", tmp_path / "runs"]
    for more in (["--method", "none"], ["5", "--method", "fastervlm"]):
        done = launch("pope", *more, *flags, "--max-new-tokens", "4")
        assert done.returncode == 0, done.stderr
    (comparison,) = compare(judged(tmp_path / "runs")[0])
    assert len(comparison.judged) == 2 and comparison.kinds[0].questions == 4
    assert comparison.scores[1].value == pytest.approx(comparison.runs[1].score)
    main([str(tmp_path / "runs"), "-o", str(tmp_path / "report.html")])
    html = (tmp_path / "report.html").read_text()
    assert Page(html) and "fastervlm" in html and html.count('class="point') == 6


# ------------------------------------------------------------------------------------------------------- what is not
def test_unfinished_and_unscored_runs_are_shown_as_such(bench):
    bench.run(method="none")
    bench.run(method="adav", finish=False)
    bench.run("vqav2", method="adav")
    started = bench.run(method="random")
    (started / "run.json").unlink()
    html = report(bench)
    assert "not finished: 16 of 16 questions are answered" in html
    assert "no score here: a file to upload" in html
    assert f"{started}: has no run.json yet, so it is left out" in html


def test_questions_that_are_gone_or_changed_are_told(bench):
    bench.run(method="none")
    folder = bench.run(method="adav", wrong=(2,))
    file = bench.data / "gqa" / "llava_gqa_testdev_balanced.jsonl"
    content = file.read_text()
    moved = bench.data.rename(bench.root / "moved")
    html = report(bench)
    assert "llava_gqa_testdev_balanced.jsonl: missing" in html and ">93.8</td>" in html.replace("\n", "")
    assert "Answers that were lost" in report(bench, "--data-root", str(moved))
    moved.rename(bench.data)
    file.write_text(content.replace("How many", "How few"))
    (run,), _ = judged(folder)
    assert "holds other questions than the run was asked" in run.gap
    file.write_text(content)
    labels = bench.data / "gqa" / "data" / "testdev_balanced_questions.json"
    labels.write_text(labels.read_text().replace('"red"', '"blue"'))
    (run,), _ = judged(folder)
    assert "by the annotations that are there now" in run.gap


def test_pictures_that_are_gone_or_damaged_or_outside(bench):
    bench.run(method="none")
    bench.run(method="adav", wrong=(0, 4, 8))
    images = bench.data / "gqa" / "data" / "images"
    (images / "n0.jpg").unlink()
    (images / "n1.jpg").write_bytes(b"no picture")
    secret = bench.root / "secret.png"
    secret.write_bytes((images / "n2.jpg").read_bytes())
    (images / "n2.jpg").unlink()
    (images / "n2.jpg").symlink_to(secret)
    html = report(bench)
    assert "is not in" in html and "cannot be read" in html and "leaves the image folder" in html
    assert "data:image" not in html


@pytest.mark.parametrize("file", ["run.json", "identity.json"])
@pytest.mark.parametrize("damage", ["{", "[]", '{"benchmark": "gqa"}'])
def test_a_damaged_record_is_one_sentence(bench, damage, file, capsys):
    (bench.run() / file).write_text(damage)
    with pytest.raises(SystemExit) as exit_:
        main([str(bench.output)])
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and file in said


def test_a_folder_without_a_run_is_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([str(tmp_path)])
    assert exit_.value.code == 2 and "holds no run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, says",
    [
        (["-o", "nowhere/x.html"], "-o is nowhere/x.html, but there is no folder nowhere"),
        (["--examples", "-1"], "'-1', allowed is a whole number of at least 0"),
        (["--data-root", "nowhere"], "--data-root: there is no folder nowhere"),
    ],
)
def test_a_flag_that_cannot_be_followed_is_one_sentence(bench, monkeypatch, capsys, flags, says):
    monkeypatch.chdir(bench.root)
    bench.run()
    with pytest.raises(SystemExit) as exit_:
        main([str(bench.output), *flags])
    said = capsys.readouterr().err
    assert exit_.value.code == 2 and says in said and said.startswith("error: ") and said.count("\n") == 1
    assert not (bench.root / "nowhere").exists() and not (bench.root / "report.html").exists()


# ------------------------------------------------------------------------------------------------------------ the page
def test_benchmarks_and_checkpoints_are_chosen_by_flags(bench, capsys):
    for name, checkpoint in (("gqa", "one"), ("pope", "one"), ("gqa", "two"), ("mme", "two")):
        bench.run(name, checkpoint=checkpoint)
    page_ = bench.root / "report.html"

    def shown(*flags):
        main([str(bench.output), "-o", str(page_), *flags])
        return set(re.findall(r"<h2>(\w+) <span class=\"faint\">[\w-]+</span>, (\w+)</h2>", page_.read_text()))

    assert len(shown()) == 4
    assert shown("--benchmark", "gqa") == {("gqa", "one"), ("gqa", "two")}
    assert shown("--checkpoint", "two", "--benchmark", "gqa,mme") == {("gqa", "two"), ("mme", "two")}
    for flags, says in (
        (("--benchmark", "seed"), '--benchmark: there is no run of "seed", allowed are gqa, pope, mme'),
        (("--checkpoint", "three"), '--checkpoint: there is no run of "three", allowed are one, two'),
        (("--checkpoint", "two", "--benchmark", "pope"), '--checkpoint: there is no run of "two", allowed are one'),
    ):
        with pytest.raises(SystemExit) as exit_:
            shown(*flags)
        assert exit_.value.code == 2 and says in capsys.readouterr().err


def test_boxes_hide_what_belongs_to_a_benchmark_or_checkpoint(bench):
    """Without a script: a style rule per box, and a class on each section, line and record."""
    for name, checkpoint in (("gqa", "one"), ("pope", "one"), ("gqa", "two")):
        bench.run(name, checkpoint=checkpoint)
    html = report(bench)
    parsed = Page(html)
    boxes = [attributes["id"] for tag, attributes in parsed.tags if tag == "input"]
    assert boxes == ["benchmark-0", "benchmark-1", "checkpoint-0", "checkpoint-1"]
    for box in boxes:
        assert f"body:has(#{box}:not(:checked)) .of-{box} {{ display: none; }}" in html
    sections = [a["class"] for tag, a in parsed.tags if tag == "section" and a["id"].startswith("c")]
    assert sections == [f"of-benchmark-{n} of-checkpoint-{m}" for n, m in ((0, 0), (1, 0), (0, 1))], (
        "gqa and pope of the first checkpoint, gqa of the second"
    )
    assert sum(a.get("class") == sections[1] for _, a in parsed.tags) == 4, "contents, section, settings, record"
    bench.run("gqa", checkpoint="one", method="adav")
    main([str(bench.output), "-o", str(bench.root / "r.html"), "--benchmark", "gqa", "--checkpoint", "one"])
    assert "<input" not in (bench.root / "r.html").read_text(), "nothing to choose"


def test_ticks_of_a_chart_do_not_touch_each_other_or_the_name_of_the_axis():
    """Text is taken as 0.62 of its height wide, which is more than the sans-serif fonts have on average."""

    def width(text):
        return 0.62 * 11.5 * len(text)

    for name, scores, costs in (
        ("gqa", (97.1, 97.9), (1e9, 9.7e9)),
        ("gqa", (0, 100), (1.1, 3e3)),
        ("mme", (1611.2, 1614.9), (2.5e12, 9.1e12)),
        ("gqa", (50, 50.01), (104, 106)),
    ):
        runs = [SimpleNamespace(score=s, label="x", title="x", method="adav", scatters=False) for s in scores]
        first = SimpleNamespace(points=name == "mme")
        comparison = SimpleNamespace(runs=runs, scores=[None, None], first=first, score_name="x", reference=None)
        chart = charts._chart(comparison, "cost", "FLOPs", dict(enumerate(costs)))
        assert chart.x_ticks and len(chart.y_ticks) > 2
        for _, text in chart.y_ticks:
            assert charts.LEFT - 7 - width(text) > 17, text  # the axis' own name ends at 17
        ends = [(x - width(text) / 2, x + width(text) / 2) for x, text in chart.x_ticks]
        assert all(left[1] < right[0] for left, right in itertools.pairwise(ends)), chart.x_ticks
        assert ends[0][0] > charts.LEFT - 30 and ends[-1][1] < charts.WIDTH


def test_times_that_scatter_are_marked(bench):
    bench.run(method="none")
    path = bench.run(method="adav") / "run.json"
    assert "scatters" not in report(bench)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prefill_spread": 0.6}))
    html = report(bench)
    assert html.count(">scatters</abbr>") == 1 and "A time that scatters: its repeats differ too much" in html
    assert "adav, 8 tokens: 100.0 % [100.0, 100.0] at 5 ms (scatters)</title>" in html


def test_the_page_is_one_file_that_asks_the_network_for_nothing(bench):
    bench.run(method="none")
    bench.run(method="adav", wrong=(0, 3))
    html = report(bench)
    parsed = Page(html)
    for tag, attributes in parsed.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form"), tag
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            if name in attributes:
                assert re.match(r"#[\w-]+$|data:image/jpeg;base64,", attributes[name]), (tag, attributes[name][:60])
    style = "".join(re.findall(r"<style>(.*?)</style>", html, re.S))
    assert style and "url(" not in html.replace("data:image", "") and "@import" not in html
    targets = {attributes["id"] for _, attributes in parsed.tags if "id" in attributes}
    links = {attributes["href"][1:] for tag, attributes in parsed.tags if tag == "a"}
    assert links and links <= targets
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert ("meta", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in [
        (tag, attributes.get("content")) for tag, attributes in parsed.tags
    ]
    shown = [attributes for tag, attributes in parsed.tags if tag == "img"]
    assert len(shown) == 2 and all("Picture n0.jpg" in attributes["alt"] for attributes in shown)
    assert sum(tag == "svg" and attributes.get("role") == "img" for tag, attributes in parsed.tags) == 3
    assert all(attributes["aria-label"] for tag, attributes in parsed.tags if attributes.get("role") == "img")


def test_nothing_of_a_run_is_markup(bench):
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7*7 }}"
    bench.run(method="none", texts={3: "left side"})
    rows = (bench.data / "gqa" / "llava_gqa_testdev_balanced.jsonl").read_text()
    (bench.data / "gqa" / "llava_gqa_testdev_balanced.jsonl").write_text(
        rows.replace("Where is the shape?", json.dumps(evil)[1:-1])
    )
    for path in bench.output.rglob("run.json"):
        for file in path.parent.rglob("*"):
            file.is_file() and file.unlink()
    bench.run(method="none", checkpoint="a<b>&c")
    folder = bench.run(method="adav", wrong=(3, 7), texts={3: evil, 7: "half \ud800 \x00 pair"}, checkpoint="a<b>&c")
    record = folder / "run.json"
    found = json.loads(record.read_text())
    found["sessions"][0]["command"] = f"python {evil}"
    found["environment"]["cpu"] = evil
    found["checkpoint"]["name"] = evil
    record.write_text(json.dumps(found))
    html = report(bench)
    parsed = Page(html)
    assert not any(tag == "script" or "onerror" in attributes for tag, attributes in parsed.tags)
    assert all(attributes["src"].startswith("data:image/jpeg") for tag, attributes in parsed.tags if tag == "img")
    text = "".join(parsed.text)
    assert text.count(evil) >= 4, "question, answer, command and processor are there as they are"
    assert any(evil in attributes.get("alt", "") for _, attributes in parsed.tags)
    assert "half ? " in text


def test_the_same_runs_make_the_same_page(bench):
    bench.run(method="none")
    bench.run(method="adav", wrong=(0, 3, 5))
    assert report(bench) == report(bench)


def test_examples_and_pictures_are_limited_and_it_is_said(bench, monkeypatch):
    bench.run(method="none")
    bench.run(method="adav", wrong=range(16))
    html = report(bench, "--examples", "5")
    assert html.count("<article>") == 5 and "16 questions are answered rightly by none" in html
    assert "5 of them are shown" in html
    assert report(bench, "--examples", "0").count("<article>") == 0
    monkeypatch.setattr(pictures, "MOST", 2)
    html = report(bench, "--examples", "16")
    assert "a page holds at most 2 pictures" in html and html.count("<img") == 8
    assert page._cut("x" * 700) == "x" * 600 + "... (100 more characters)"


def test_what_differs_is_highlighted(bench):
    for tokens in (3, 4):
        bench.run(method="adav", tokens=tokens)
    folder = bench.run(method="adav", tokens=5)
    found = json.loads((folder / "run.json").read_text())
    found["environment"]["packages"]["torch"] = "9.9"
    found["environment"]["cpu"] = "another processor"
    (folder / "run.json").write_text(json.dumps(found))
    html = report(bench)
    differing = re.search(r"What differs between the runs</h3>.*?</table>", html, re.S)[0]
    assert "environment.packages.torch" in differing and '<td class="left odd"><div>9.9</div></td>' in differing
    assert "environment.packages.numpy" not in differing and "environment.packages.numpy" in html
    assert "their times do not compare" in html
    assert "python launch.py gqa --method adav" in html


def test_what_differs_is_told_by_what_has_an_effect(bench):
    bench.run(method="none", tokens=8)
    for tokens in (3, 5):
        bench.run(method="adav", tokens=tokens, options={"compat": "public"} if tokens == 5 else {})
    bench.run(method="no_image", tokens=9)
    bench.run("pope", method="cls", tokens=3)
    runs, _ = find([bench.output])
    found = records(runs)
    rows = {
        (run.name, run.title): dict(zip(found.differing, row, strict=True))
        for run, row in zip(runs, found.cells, strict=True)
    }
    assert "configuration.options" not in found.differing and "configuration.options" not in found.same
    assert [key for key in found.differing if key.startswith("configuration.")] == found.differing[:3]
    public = rows["gqa", "adav (compat=public), 5 tokens"]
    assert public["configuration.options.compat"] == Cell("public", odd=True)
    assert public["configuration.overall_tokens"] == Cell("5", odd=True)
    plain = rows["gqa", "adav, 3 tokens"]
    assert plain["configuration.options.compat"] == Cell("-", odd=False)
    assert plain["configuration.overall_tokens"] == Cell("3", odd=False)
    for name in ("none", "no_image"):  # whatever their configuration says
        assert rows["gqa", name]["configuration.overall_tokens"] == Cell("-", odd=False)
    alike = records([run for run in runs if run.budget != "5"])
    assert alike.same["configuration.overall_tokens"] == "3" and alike.same["configuration.options"] == "{}"


def test_the_published_table_is_there_with_labelled_averages(bench):
    for name in ("gqa", "pope"):
        bench.run(name, method="none")
        bench.run(name, method="adav", wrong=(0, 1))
    html = report(bench)
    assert "Published table" in html and "100.00 (2/7)" in html.replace("\n", "")


def test_charts_show_every_scored_run_with_its_interval(bench):
    bench.run(method="none", wrong=(3,))
    bench.run(method="adav", wrong=(0, 3), tokens=4, cost=0.5)
    bench.run(method="adav", wrong=(0, 3, 6), tokens=2, cost=0.25)
    html = report(bench)
    said = re.findall(r"<title>(adav, 4 tokens[^<]*)</title>", html)
    assert len(said) == 3 and said[0].startswith("adav, 4 tokens: 87.5 % [") and said[0].endswith(" at 4")
    assert said[1].endswith("at 2 G FLOPs") and said[2].endswith("at 3 ms")
    assert html.count('class="bar"') == 9 and html.count('class="level"') == 3
    numbers = [float(n) for n in re.findall(r"translate\(([\d.]+),", "".join(re.findall(r'class="dot"[^>]*', html)))]
    assert len(numbers) == 9 and all(56 <= n <= 390 for n in numbers)


@pytest.mark.long
def test_in_a_browser_it_asks_for_nothing_and_fits(bench):
    """Real Chromium, at 1280 and at 400 pixels: one request (the file), no complaint, tables scroll and not the page."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="the extra test-all has playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium")
    bench.run(method="none")
    for tokens in range(1, 8):
        bench.run(method="adav", wrong=(0, 3), tokens=tokens)
    report(bench)
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    asked, complaints = [], []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        for width in (1280, 400):
            for scheme in ("light", "dark"):
                page_ = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
                page_.on("request", lambda request: asked.append(request.url))
                page_.on("console", lambda message: complaints.append(message.text))
                page_.goto(f"file://{bench.root / 'report.html'}")
                assert page_.evaluate("document.documentElement.scrollWidth") <= width
                background = page_.evaluate("getComputedStyle(document.body).backgroundColor")
                ink = page_.evaluate("getComputedStyle(document.body).color")
                light = [sum(map(int, re.findall(r"\d+", color)[:3])) > 382 for color in (background, ink)]
                assert light == ([True, False] if scheme == "light" else [False, True])
                assert page_.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
                page_.close()
        browser.close()
    assert not complaints
    assert {url for url in asked if not url.startswith("data:image/jpeg")} == {f"file://{bench.root / 'report.html'}"}
