"""The comparison: bootstrap against full enumeration, cells, a whole comparison on a tiny checkpoint and its resume."""

import csv
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_checkpoints import build_reference, save_clip_tower, save_original

from llava.eval import compare
from llava.eval.benchmarks.shapes import Shapes
from llava.eval.results.compare_rows import Cell, _Line, _split
from llava.eval.results.compare_table import markdown, read_rows, summary
from llava.eval.scoring.bootstrap import cluster_intervals

pytestmark = pytest.mark.usefixtures("warm")


# ---------------------------------------------------------------------------------------------------- bootstrap
def test_intervals_equal_the_enumeration_of_all_resamples():
    # Three pictures with 2, 1 and 3 questions: 27 equally likely resamples, of 10 compositions. Their means, weighted by
    # questions: AAA 1, BBB 0, CCC 1/3, AAB 4/5, ABB 1/2, AAC 5/7, ACC 1/2, BBC 1/5, BCC 2/7, ABC 1/2.
    pictures = ["A", "A", "B", "C", "C", "C"]
    right = np.array([1, 1, 0, 1, 0, 0], dtype=float)
    groups = {name: [r for r, p in zip(right, pictures, strict=True) if p == name] for name in "ABC"}
    means = sorted(
        np.mean([value for name in draw for value in groups[name]]) for draw in itertools.product("ABC", repeat=3)
    )
    assert means[0] == 0 and means[-1] == 1 and means.count(0.5) == 12
    # One resample in 27 is 3.7 %, more than the 2.5 % of either tail: the extremes are the interval.
    mean, low, high = cluster_intervals(right[:, None], pictures)
    assert (mean[0], low[0], high[0]) == (0.5, 0, 1)
    # 80 %: a tenth of 27 is 2.7. From either end one resample (BBB, AAA) is followed by three alike: BBC 1/5, AAB 4/5.
    assert means[1:4] == [0.2] * 3 and means[-4:-1] == [0.8] * 3
    _, low, high = cluster_intervals(right[:, None], pictures, level=0.8)
    assert (low[0], high[0]) == (pytest.approx(0.2), pytest.approx(0.8))


def test_intervals_are_paired_seeded_and_by_picture():
    draws = np.random.default_rng(1)
    easy = np.repeat(draws.random(60) < 0.6, 4).astype(float)  # four questions of a picture: all right or all wrong
    other = easy.copy()
    other[:24] = 1 - other[:24]
    columns = np.stack([easy, other, other - easy, easy - easy], axis=1)
    mean, low, high = cluster_intervals(columns, np.repeat(np.arange(60), 4))
    assert mean == pytest.approx(columns.mean(axis=0)) and (low <= mean).all() and (mean <= high).all()
    assert low[3] == high[3] == 0
    again = cluster_intervals(columns[:, 2:], np.repeat(np.arange(60), 4))
    assert again[1][0] == low[2] and again[2][0] == high[2], "the draws do not depend on the columns"
    alone = cluster_intervals(columns[:, :1], range(240))
    # Four equal answers are worth one: the interval is twice as wide as for as many independent questions.
    assert 1.6 < (high[0] - low[0]) / (alone[2][0] - alone[1][0]) < 2.4


# -------------------------------------------------------------------------------------------------------- cells
def test_cells():
    found = compare.cells(["none", "no_image", "random", "adav", "adav-public"], [25, 10, 5], 3, 540.0)
    assert found[0] == Cell("no_image", "no_image") and len(found) == 1 + 9 + 3 + 3, "none was measured before"
    assert [cell.tokens for cell in found if cell.name == "adav"] == [135, 54, 27]
    assert [cell.options for cell in found if cell.percent == 10 and cell.name == "random"] == [
        {"seed": 0},
        {"seed": 1},
        {"seed": 2},
    ]
    assert found[-1] == Cell("adav-public", "adav", 5, 27) and found[-1].options == {"compat": "public"}
    assert compare.cells(["adav"], [29], 1, 100.0)[0].tokens == 29  # 0.29 * 100 is 28.999999999999996
    assert compare.cells(["adav"], [0.1], 1, 16.0)[0].tokens == 1


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A comparison of two methods on a tiny checkpoint: (place, arguments, printed)."""
    place = tmp_path_factory.mktemp("compare")
    model = build_reference("llava")
    checkpoint = save_original(model, place / "tiny-v1.5", save_clip_tower(model, place / "tower"))
    flags = {
        "checkpoints": checkpoint,
        "methods": "random,no_image,downsample,adav-public",
        "budgets": "50,25",
        "seeds": 2,
    }
    flags |= {"limit": 12, "shards": 1, "output": place / "runs", "out": place / "out"}
    arguments = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "DATA_ROOT", place / "data")
        patch.setattr(Shapes, "questions", 24)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        compare.main(arguments)
        yield place, arguments


def test_split_by_hand():
    # Four questions about four pictures. Down-sampling answers the first two at 25 %. adav is right on the first and the
    # third: one of two in either group. At 10 % nothing was down-sampled; method none has no budget.
    def line(method, percent, *right):
        return _Line({"method": method}, np.array(right, dtype=float), percent)

    lines = [
        line("none", None, 1, 1, 1, 1),
        line("downsample", 25, 1, 1, 0, 0),
        line("adav", 25, 1, 0, 1, 0),
        line("random", 25, 0.5, 1, 0.5, 1),
        line("adav", 10, 1, 1, 0, 0),
    ]
    rows = [{} for _ in lines]
    _split(lines, rows, list("abcd"))
    assert rows[0] == rows[4] == {}
    for group, shares in (("right", (1, 0.5, 0.75)), ("wrong", (0, 0.5, 0.75))):
        name = f"downsample_{group}"
        assert [row[f"{name}_accuracy"] for row in rows[1:4]] == pytest.approx(shares)
        assert all(row[f"{name}_questions"] == 2 and row[f"{name}_low"] <= row[f"{name}_high"] for row in rows[1:4])
    assert rows[1]["downsample_right_low"] == 0, "a draw without any question of the group"
    # Everything is answered by it: the other group has no accuracy.
    lines, rows = [line("downsample", 25, 1, 1), line("adav", 25, 0, 1)], [{}, {}]
    _split(lines, rows, list("ab"))
    assert rows[1]["downsample_wrong_questions"] == 0 and "downsample_wrong_accuracy" not in rows[1]


def test_the_split_adds_up_and_is_in_the_table(done):
    place, _ = done
    rows = read_rows(place / "out" / "compare.csv")
    for row in rows:
        counts = [row[f"downsample_{group}_questions"] for group in ("right", "wrong")]
        assert (counts == [None, None]) == (row["budget_percent"] is None)
        if row["budget_percent"]:
            parts = [row[f"downsample_{group}_accuracy"] or 0 for group in ("right", "wrong")]
            assert sum(counts) == 12
            assert sum(n * part for n, part in zip(counts, parts, strict=True)) == pytest.approx(
                12 * row["accuracy"], abs=1e-4
            )
    text = (place / "out" / "compare.md").read_text()
    assert "split by the answers of `downsample` at the same budget" in text and "downsample right [95 %]" in text
    old = [{name: value for name, value in row.items() if not name.startswith("downsample_")} for row in rows]
    assert "split by" not in markdown(old), "a file of an earlier version"


def test_rows_are_complete(done):
    place, _ = done
    rows = read_rows(place / "out" / "compare.csv")
    place_of = [(row["method"], row["budget_percent"], row["budget_tokens"], row["seed"]) for row in rows]
    assert place_of == [
        ("none", None, None, None),
        ("no_image", None, None, None),
        *(("random", p, t, seed) for p, t in ((50, 8), (25, 4)) for seed in ("0", "1", "mean")),
        *(("downsample", p, t, None) for p, t in ((50, 8), (25, 4))),
        *(("adav", p, t, None) for p, t in ((50, 8), (25, 4))),
    ], "adav is there though it was not named, its public twin is not: this checkpoint has one tile"
    by_place = dict(zip(place_of, rows, strict=True))
    for row in rows:
        assert (row["questions"], row["pictures"], row["checkpoint"]) == (12, 3, "tiny-v1.5")
        assert 0 <= row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"] <= 1
        assert {"accuracy_color", "accuracy_count"} <= row.keys() and row["torch"] and row["commit"] and row["code"]
        assert row["prefill_flops"] > 0 and row["kv_bytes"] > 0
        assert row["tokens_before"] == (0 if row["method"] == "no_image" else 16)
        # The largest square grid of at most 8 patches is 2 x 2.
        kept = 4 if row["method"] == "downsample" else row["budget_tokens"] or row["tokens_before"]
        assert row["layer_mean"] == row["tokens_after"] == kept
        if row["budget_percent"] is None:
            assert row["difference"] is None
        else:
            against = by_place["adav", row["budget_percent"], row["budget_tokens"], None]
            assert row["difference"] == pytest.approx(row["accuracy"] - against["accuracy"], abs=2e-6)
            assert row["difference_low"] <= row["difference"] <= row["difference_high"]
        if row["seed"] != "mean":
            report = json.loads(next((place / "runs").rglob(f"{row['run']}/run.json")).read_text())
            assert row["accuracy"] == pytest.approx(report["score"]["accuracy"], abs=1e-6)
            assert row["configuration"] == report["configuration_digest"]
    for percent, tokens in ((50, 8), (25, 4)):
        seeds = [by_place["random", percent, tokens, seed]["accuracy"] for seed in ("0", "1")]
        mean = by_place["random", percent, tokens, "mean"]
        assert mean["accuracy"] == pytest.approx(np.mean(seeds), abs=1e-6)
        assert (mean["accuracy_worst_seed"], mean["accuracy_best_seed"]) == (min(seeds), max(seeds))


def test_table_and_plot_come_from_the_csv(done, capsys):
    place, arguments = done
    folder = place / "out"
    rows, text = read_rows(folder / "compare.csv"), (folder / "compare.md").read_text()
    assert [row["seed"] for row in summary(rows)] == [None, None, "mean", "mean", *[None] * 4]
    table = markdown(rows)
    assert table in text and "does not show which method is better" in " ".join(text.split())
    lines, split = (part.splitlines() for part in table.split("\n\n")[1::2])
    assert len(lines) == 2 + 8 and len(set(map(len, lines))) == 1
    assert len(split) == 2 + 6 and len(set(map(len, split))) == 1
    assert "12 questions about 3 pictures" in table and "random, mean of seeds" in table
    picture = Image.open(folder / "compare.png")
    assert picture.width == 1200
    (folder / "compare.md").unlink()
    (folder / "compare.png").unlink()
    compare.main([*arguments, "--plot-only"])
    assert (folder / "compare.md").read_text() == text and Image.open(folder / "compare.png").size == picture.size
    assert table in capsys.readouterr().out


def test_an_interrupted_comparison_goes_on(done):
    place, arguments = done
    before = (place / "out" / "compare.csv").read_text()
    (torn,) = (place / "runs").rglob("adav-4-*/shards/shard-0.jsonl")
    torn.write_text("".join(line + "\n" for line in torn.read_text().splitlines()[:7]))
    (place / "out" / "compare.csv").unlink()
    compare.main(arguments)
    assert (place / "out" / "compare.csv").read_text() == before
    answered = {
        path.parent.name.rsplit("-", 1)[0]: json.loads(path.read_text())["sessions"][-1]["answered"]
        for path in (place / "runs").rglob("run.json")
    }
    others = [f"{method}-{tokens}" for method in ("random", "downsample", "adav") for tokens in (8, 4)]
    assert answered == {"none-all": 0, "no_image-0": 0} | dict.fromkeys(others, 0) | {"adav-4": 5}


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--methods", "adav,nothing"], '"nothing" is no method, allowed are none, '),
        (["--methods", "adav,adav"], "each once"),
        (["--budgets", "25,0"], "above 0 and below 100"),
        (["--budgets", "100"], "above 0 and below 100"),
        (["--budgets", "ten"], "above 0 and below 100"),
        (["--limit", "0"], "at least 1"),
        (["--seeds", "-1"], "at least 1"),
        (["--checkpoints", "playground/no-such"], "no such checkpoint folder"),
        (
            ["--checkpoints", "playground/llava-shapes-v1.5,playground/../playground/llava-shapes-v1.5"],
            "allowed is each",
        ),
        (["--frobnicate"], "--help lists all arguments"),
    ],
)
def test_bad_flags_are_one_sentence(flags, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        compare.main([*flags, "--out", str(tmp_path), "--output", str(tmp_path)])
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and shown.count("\n") == 1 and shown.startswith("error: ") and said in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [None, "a,b\n1,2\n", "checkpoint,method,accuracy\nx,adav,high\n", ""])
def test_plot_only_needs_a_comparison(content, tmp_path, capsys):
    path: Path = tmp_path / "compare.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as stop:
        compare.main(["--plot-only", "--out", str(tmp_path)])
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and str(path) in shown and shown.count("\n") == 1


def test_the_csv_is_plain(done):
    with open(done[0] / "out" / "compare.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0][:4] == ["checkpoint", "method", "budget_percent", "budget_tokens"]
    assert {len(row) for row in rows} == {len(rows[0])}
