"""The attention analyses: their figures worked by hand, and both commands on tiny checkpoints of one and several tiles."""

import csv

import numpy as np
import pytest
import torch
from eval_data import SPLIT, make_vqav2
from PIL import Image
from tiny_checkpoints import build_reference, save_clip_tower, save_original

from llava.analysis import attention_dispersion, attention_share
from llava.analysis.prompts import effective_share, top_set, top_share


def test_concentration_by_hand():
    values = np.array([[0.1, 0.4, 0.1, 0.4], [0.25, 0.25, 0.25, 0.25]])
    assert top_share(values, 0.5) == pytest.approx([0.8, 0.5])
    assert top_share(values, 0.05) == pytest.approx([0.4, 0.25]), "at least one token"
    assert top_set(values, 0.5).tolist() == [[False, True, False, True], [True, True, False, False]]
    # Even: as many tokens as there are. Two of four, half each: exp(log 2) = 2 tokens.
    assert effective_share(np.array([[0.25] * 4, [0.5, 0.5, 0, 0], [0, 1, 0, 0]])) == pytest.approx([1, 0.5, 0.25])


def test_positions_by_hand():
    values = np.array([0.5, 0.3, 0.2])
    # Two bins of one and a half tokens: 0.5 + 0.15 and 0.15 + 0.2, twice as much where all are in one half.
    assert attention_dispersion.density(values, 2) == pytest.approx([1.3, 0.7])
    assert attention_dispersion.density(values, 3) == pytest.approx([1.5, 0.9, 0.6])
    assert attention_dispersion.density(np.full((2, 7), 1 / 7), 5) == pytest.approx(np.ones((2, 5)))
    found = attention_dispersion.figures(values)
    assert found["centre"] == pytest.approx((0.5 * 0.5 + 0.3 * 1.5 + 0.2 * 2.5) / 3)
    assert (found["first_quarter"], found["last_quarter"]) == (pytest.approx(0.375), pytest.approx(0.15))
    curve = attention_dispersion.curve(np.array([0.2, 0.8]))
    assert (curve[0], curve[25], curve[50], curve[100]) == pytest.approx((0, 0.4, 0.8, 1))


def test_shares_and_drift_by_hand():
    # One layer; one token before the image of ten, one after it; then a generated one.
    image = np.array([0.3, 0.1, 0.05, 0.05, 0.02, 0.02, 0.02, 0.02, 0.01, 0.01])
    rows = [
        np.concatenate([[0.3], image, [0.1]])[None],
        np.concatenate([[0.2], image[::-1], [0.1], [0.1]])[None],
        np.concatenate([[0.1], image[::-1], [0.1], [0.1], [0.1]])[None],
    ]
    found = attention_share.figures(rows, span=(1, 10), prompt=12)
    assert found["before"][:, 0] == pytest.approx([0.3, 0.2, 0.1])
    assert found["image"][:, 0] == pytest.approx([0.6] * 3)
    assert found["after"][:, 0] == pytest.approx([0.1] * 3)
    assert found["generated"][:, 0] == pytest.approx([0, 0.1, 0.2])
    assert found["image_top_10_percent"][:, 0] == pytest.approx([0.5] * 3)
    # The one top token is the first, then twice the last.
    assert np.isnan(found["overlap_with_prefill"][0, 0]) and found["overlap_with_prefill"][1:, 0].tolist() == [0, 0]
    assert np.isnan(found["overlap_with_last_step"][0, 0]) and found["overlap_with_last_step"][1:, 0].tolist() == [0, 1]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """The commands take a GPU where there is one; what is compared here is float32."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = make_vqav2(tmp_path_factory.mktemp("data"), questions=6, images=2)
    return ["--questions", root / "vqav2" / f"{SPLIT}.jsonl", "--images", root / "vqav2" / "test2015"]


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model = build_reference(request.param)
    return save_original(model, folder / f"tiny-{request.param}", save_clip_tower(model, folder / "tower"))


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def run(command, *arguments):
    command.main([str(argument) for argument in arguments])


def test_dispersion(checkpoint, data, tmp_path, capsys):
    run(attention_dispersion, checkpoint, *data, "--out", tmp_path)
    rows = read(tmp_path / "attention_dispersion.csv")
    sources = [(row["source"], row["layer"]) for row in rows]
    assert sources[:3] == [("cls", ""), ("llm", "mean"), ("llm", "0")] and sources[-1] == ("llm", str(len(rows) - 3))
    for row in rows:
        assert (row["prompts"], row["pictures"]) == ("5", "2"), "the question without an image is left out"
        shares = [float(row[f"top_{name}_percent"]) for name in (5, 10, 25)]
        assert 0 < shares[0] <= shares[1] <= shares[2] < 1 and 0 < float(row["effective_share"]) <= 1
        assert float(row["centre_low"]) <= float(row["centre"]) <= float(row["centre_high"])
        assert (row["share_of_row"] == "") == (row["source"] == "cls")
        assert row["source"] == "cls" or 0 < float(row["share_of_row"]) < 1
    positions = read(tmp_path / "attention_positions.csv")
    for source in sources:
        here = [float(row["attention"]) for row in positions if (row["source"], row["layer"]) == source]
        assert len(here) == attention_dispersion.BINS and np.mean(here) == pytest.approx(1, abs=1e-5)
    assert Image.open(tmp_path / "attention_dispersion.png").width == 1200
    assert str(tmp_path / "attention_dispersion.png") in capsys.readouterr().out


def test_share(checkpoint, data, tmp_path):
    run(attention_share, checkpoint, *data, "--out", tmp_path, "--steps", 5, "--limit", 3)
    rows = read(tmp_path / "attention_share.csv")
    layers = {row["layer"] for row in rows}
    assert len(rows) == 5 * len(layers) and "mean" in layers and {row["prompts"] for row in rows} == {"3"}
    for row in rows:
        assert sum(float(row[kind]) for kind in attention_share.KINDS) == pytest.approx(1, abs=1e-5)
        assert (float(row["generated"]) == 0) == (row["step"] == "0") == (row["overlap_with_prefill"] == "")
        assert row["step"] != "1" or row["overlap_with_prefill"] == row["overlap_with_last_step"]
    for step in range(5):
        *each, mean = [float(row["image"]) for row in rows if row["step"] == str(step)]
        assert mean == pytest.approx(np.mean(each), abs=1e-5)
    assert Image.open(tmp_path / "attention_share.png").width == 1200


@pytest.mark.parametrize("command", [attention_dispersion, attention_share])
def test_bad_input_is_one_sentence(command, data, tmp_path, capsys):
    _, questions, _, images = data
    unreadable = tmp_path / "questions.jsonl"
    unreadable.write_text('{"question_id": 1, "text": "Yes?"}\n')
    for arguments, said in (
        (["nowhere", "--questions", tmp_path / "none.jsonl", "--images", images], "no such file"),
        (["nowhere", "--questions", questions, "--images", tmp_path / "none"], "no such image folder"),
        (["nowhere", "--questions", unreadable, "--images", images], "no question with an image"),
        (["nowhere", "--questions", questions, "--images", images, "--limit", 0], "at least 1"),
        (
            ["nowhere", "--questions", questions, "--images", images, "--conv-mode", "x"],
            "unknown conversation template",
        ),
        (["playground/no-such", "--questions", questions, "--images", images], "playground/no-such"),
        ([], "required"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(command, *arguments, *(["--out", tmp_path / "out"] if arguments else []))
        shown = capsys.readouterr().err
        assert stop.value.code == 2 and shown.count("\n") == 1 and said in shown, shown
