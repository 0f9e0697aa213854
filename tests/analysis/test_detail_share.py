"""The analysis of options.detail_share: its figures worked by hand, and the command on a few pictures."""

import csv
import math

import numpy as np
import pytest
import torch

from llava.analysis import detail_share
from llava.config import AdaVConfig
from llava.methods.before_llm import Selection
from llava.mm_utils import TilePlan
from llava.shapes.questions import Question


def kept(*places):
    tile, row, column = torch.tensor(places).T
    return Selection(tile, torch.zeros(len(places), 1), tile, row, column)


def test_visible_strokes_by_hand():
    strokes = np.zeros((8, 8), dtype=bool)
    strokes[1, 2:6] = True  # two pixels in each of the upper patches
    plan = TilePlan((8, 8), 8, None, (8, 8), (8, 8), (0, 0))
    assert detail_share.visible_share(strokes, plan, 2, kept((0, 0, 0), (0, 1, 1))) == 0.5
    assert detail_share.visible_share(strokes, plan, 2, kept((0, 0, 0), (0, 0, 1), (-1, -1, -1))) == 1
    assert math.isnan(detail_share.visible_share(np.zeros((8, 8), dtype=bool), plan, 2, kept((0, 0, 0))))
    # Two crops of 8 pixels; the picture is drawn twice as large, with two pixels of padding above it.
    wide = TilePlan((8, 4), 8, (2, 1), (16, 12), (16, 8), (0, 2), "spatial")
    strokes = np.zeros((4, 8), dtype=bool)
    strokes[0, :] = True  # rows 2 and 3 of the canvas, so the first row of patches
    assert detail_share.visible_share(strokes, wide, 2, kept((0, 0, 0), (2, 0, 0))) == 0.25, "tile 0 does not count"


def test_which_questions_are_about_text():
    about = [detail_share.about_text(Question(text, "", "")) for text in (
        "What color is the 7?", "Is there an orange h?", "What letter is in the top left?",
        "What color is the star?", "What shape is in the top left?", "How many stars are there?",
    )]  # fmt: skip
    assert about == [True, True, True, False, False, False]


def test_rows_by_hand():
    questions = [Question("What color is the 7?", "red", "color"), Question("How many stars are there?", "1", "count")]
    plain = detail_share.Setting(10.0, AdaVConfig(method="cls", options={"detail_share": 0}))
    guarded = detail_share.Setting(10.0, AdaVConfig(method="cls", options={"detail_share": 0.5}))
    plain.right, plain.visible = [True, False, False, False], [0.5, 0.5, math.nan, math.nan]
    guarded.right, guarded.visible = [True, True, True, False], [1.0, 0.5, math.nan, math.nan]
    first, second = detail_share.rows_of([plain, guarded], questions * 2, [0, 0, 1, 1])
    assert (first["strokes"], first["text"], first["other"]) == (0.5, 0.5, 0)
    assert (second["strokes"], second["text"], second["other"]) == (0.75, 1, 0.5)
    assert (second["strokes_difference"], second["text_difference"], second["other_difference"]) == (0.25, 0.5, 0.5)
    assert second["text_difference_low"] == 0 and second["text_difference_high"] == 1
    assert (second["pictures"], second["text_questions"], second["other_questions"]) == (2, 2, 2)


def test_the_command(tmp_path, capsys):
    detail_share.main(
        ["v1.5", "--pictures", "3", "--methods", "cls", "--budgets", "10", "--shares", "1", "--out", str(tmp_path)]
    )
    rows = list(csv.DictReader((tmp_path / "detail_share-v1.5.csv").open()))
    assert [(row["method"], row["tokens"], row["detail_share"]) for row in rows] == [
        ("none", "all", "0"), ("cls", "14", "0.0"), ("cls", "14", "1.0")
    ]  # fmt: skip
    assert float(rows[0]["strokes"]) == 1 and float(rows[0]["text"]) > 0.5
    assert "| cls " in capsys.readouterr().out


@pytest.mark.parametrize("flags, said", [
    (["--methods", "fastv"], '"fastv" chooses no tokens before the LLM'),
    (["--shares", "0.5,2"], "different numbers from 0 to 1"),
])  # fmt: skip
def test_bad_flags_are_one_sentence(flags, said, capsys):
    with pytest.raises(SystemExit) as stop:
        detail_share.main(["v1.5", *flags])
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and said in shown and shown.count("\n") == 1
