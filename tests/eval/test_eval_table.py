"""The published table: its averages, and our runs in its layout beside it."""

import csv
import io
import json

import pytest

from llava.eval import table
from llava.eval.results.published import COLUMNS, TABLE, average, published_models, published_rows

PLAIN = {"gqa": 60.0, "sqa": 70.0, "textvqa": 58.0, "pope": 85.0, "mme": 1500.0, "mmbench": 64.0, "mmvet": 30.0}


def test_all_published_averages_come_out():
    whole = {row.model: row for row in published_rows() if row.unpruned}
    pruned = [row for row in published_rows() if not row.unpruned]
    assert len(pruned) == 25 and set(whole) == set(published_models()) and len(whole) == 2
    for row in pruned:
        mean, columns = average(row.scores, whole[row.model].scores)
        assert (f"{mean:.2f}", columns) == (f"{row.average:.2f}", 7), row


def test_an_average_says_over_how_many_columns_it_is():
    assert average({"gqa": 30.0}, PLAIN) == (50.0, 1)
    assert average({**PLAIN, "mmvet": 15.0}, PLAIN) == (pytest.approx(100 * 6.5 / 7), 7)
    assert average(PLAIN, {"gqa": 60.0, "mme": 1000.0}) == (125.0, 2)
    assert average({}, PLAIN) is None


def write(root, name, value, method="adav", tokens="144", checkpoint="llava-v1.5-7b", **changes):
    """A finished run, as far as the table reads it."""
    configuration = {"method": method, "overall_tokens": 144, "options": changes.pop("options", {})}
    report = {
        "benchmark": name,
        "split": {"gqa": "testdev-balanced", "textvqa": "val", "mmbench": "dev"}.get(name, "test"),
        "asked": {"limit": None, "subset": None, "seed": None},
        "tokens": tokens,
        "checkpoint": {"name": checkpoint, "content": checkpoint},
        "configuration": configuration,
        "configuration_digest": json.dumps(configuration),
        "generation": {"max_new_tokens": 1024 if name == "mmvet" else 128, "dtype": "auto"},
        "score": {"headline": value},
        "published": value,
        **changes,
    }
    folder = root / name / checkpoint / f"{method}-{tokens}-{len(list(root.rglob('run.json')))}"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(report))
    return folder


@pytest.fixture
def runs(tmp_path):
    for name, value in PLAIN.items():
        write(tmp_path, name, value, "none", "all")
        if name != "mmvet":
            write(tmp_path, name, value / 2)
    return tmp_path


def shown(*folders, published=None, style="csv"):
    rows, notes = table.collect(folders)
    text, said = table.render(rows, notes, style, published)
    return (list(csv.DictReader(io.StringIO(text))) if style == "csv" else text), said


def test_our_rows_beside_the_published_ones(runs):
    lines, said = shown(runs)
    kinds = [(line["row"], line["method"], line["tokens"]) for line in lines]
    assert kinds[:6] == [
        ("ours", "none", "all"),
        ("published", "none", "all"),
        ("difference", "none", "all"),
        ("ours", "adav", "144"),
        ("published", "AdaV", "144"),
        ("difference", "adav", "144"),
    ]
    assert len(kinds) == 2 + 2 + 15, "every other published row is there once"
    ours, published, difference = lines[3:6]
    assert (ours["GQA"], published["GQA"], float(difference["GQA"])) == ("30.0", "58.38", pytest.approx(-28.38))
    assert (ours["average"], ours["average_columns"]) == ("50.0", "6")
    assert published["average"].startswith("97.83") and published["average_columns"] == "7"
    assert ours["MM_Vet"] == difference["MM_Vet"] == difference["average"] == ""
    assert "README of JiayiV/AdaV, llava-v1.5-7b" in said


def test_markdown_and_latex(runs):
    text, _ = shown(runs, style="markdown")
    lines = text.splitlines()
    assert lines[0] == "llava-v1.5-7b"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert cells[0] == ["method", "tokens", "GQA", "SQA-IMG", "TextVQA", "POPE", "MME", "MMB", "MM-Vet", "average"]
    assert cells[5] == ["adav", "144", "30.00", "35.00", "29.00", "42.50", "750.00", "32.00", "-", "50.00 (6/7)"]
    assert cells[4][0] == "difference" and cells[4][2] == "-1.94" and cells[4][3] == "+0.49"
    latex, _ = shown(runs, style="latex", published="none")
    assert latex.count(r"\hline") == 3 and "50.00 (6/7) \\\\" in latex and "published" not in latex
    assert table._escaped("adav (seed_x=1)") == r"adav (seed\_x=1)"


def test_no_average_without_the_unpruned_run_of_the_same_questions(tmp_path):
    write(tmp_path, "gqa", 60.0, "none", "all")
    part = {"limit": None, "subset": 500, "seed": 0}
    folder = write(tmp_path, "gqa", 30.0, asked=part)
    lines, said = shown(tmp_path, published="none")
    assert [(line["method"], line["average"]) for line in lines] == [
        ("none", "100.0"),
        ("adav [subset of 500, seed 0]", ""),
    ]
    assert "no average, which needs runs of the same checkpoint and questions with --method none" in said
    write(tmp_path, "gqa", 40.0, "none", "all", asked=part)
    lines, said = shown(tmp_path, published="none")
    assert {line["method"]: line["average"] for line in lines}["adav [subset of 500, seed 0]"] == "75.0" and not said
    assert "no average" in table.show_runs([folder], folder)
    text = table.show_runs([folder], tmp_path)
    assert "75.00 (1/7)" in text and text.count("none [subset of 500, seed 0]") == 1 and "60.00" not in text


def test_runs_that_differ_make_rows_of_their_own(tmp_path):
    write(tmp_path, "gqa", 60.0, "none", "all")
    write(tmp_path, "gqa", 30.0)
    write(tmp_path, "gqa", 33.0, options={"compat": "public"})
    write(tmp_path, "gqa", 36.0, checkpoint="another")
    write(tmp_path, "vqav2", 70.0)
    write(tmp_path, "mmbench", 70.0, split="test")
    write(tmp_path, "mmvet", None, score={"upload": "x"})
    unfinished = write(tmp_path, "pope", None, score=None)
    text, said = shown(tmp_path, style="markdown", published="none")
    assert text.split("\n\n")[0] == "another" and "adav (compat=public)" in text and "70.00" not in text
    assert f"{unfinished}: is not finished" in said and "has no score, only a file to upload" in said
    judged = {"headline": 0.3, "judge": "some-model", "partial": "9 of 10 questions"}
    write(tmp_path, "mmvet", 30.0, method="cls", score=judged)
    _, said = shown(tmp_path)
    assert "MM-Vet graded by some-model" in said and "scored on 9 of 10 questions" in said


def test_bad_input(tmp_path, capsys):
    def refused(*argv):
        with pytest.raises(SystemExit) as stopped:
            table.main(list(map(str, argv)))
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
        return said

    assert "holds no run" in refused(tmp_path / "nowhere")
    write(tmp_path, "vqav2", 70.0)
    said = refused(tmp_path)
    assert "no finished run of the published table's benchmarks, which are gqa, sqa" in said and "eval.report" in said
    write(tmp_path, "gqa", 30.0)
    write(tmp_path, "gqa", 31.0)
    assert "are runs of gqa under the same configuration; name one" in refused(tmp_path)
    assert "--published" in refused(tmp_path, "--published", "somebody")


def test_the_command_writes_what_it_prints(runs, capsys):
    table.main([str(runs), "--format", "csv", "--output", str(runs / "t.csv")])
    printed = capsys.readouterr()
    assert (runs / "t.csv").read_text() == printed.out and printed.err.count("README of JiayiV/AdaV") == 1
    assert printed.out.splitlines()[0].split(",")[4:11] == list(COLUMNS.values()) and len(TABLE) == 7
