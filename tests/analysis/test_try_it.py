"""`python -m llava.analysis.try_it`: the whole command on a tiny checkpoint, its recommendation, and bad input."""

import json

import pytest
import tiny_checkpoints as tiny
import transformers
from PIL import Image

from llava.analysis import try_it
from llava.analysis.try_it import Trial, recommendation
from llava.config import AdaVConfig


@pytest.fixture(autouse=True)
def quiet_again():
    """main() silences transformers; other tests read its warnings."""
    before = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(before)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    for n, name in enumerate(("a.png", "b.jpg")):
        Image.effect_noise((40 + n, 30), 90).convert("RGB").save(tmp_path / "pictures" / name)
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    (tmp_path / "pictures" / "c.png").write_bytes(b"torn")
    return tmp_path


def test_the_whole_command(folder, capsys):
    model = tiny.build_reference("llava")
    checkpoint = tiny.save_original(model, folder / "tiny", tiny.save_clip_tower(model, folder / "tower"))
    (folder / "q.txt").write_text("What?\n\nWho is it?\n")
    flags = {"model-path": checkpoint, "images": folder / "pictures", "questions": folder / "q.txt", "device": "cpu"}
    flags |= {"methods": "cls,fastv", "budgets": "50,25", "max-new-tokens": 4, "output": folder / "out.json"}
    assert try_it.main([str(part) for name, value in flags.items() for part in (f"--{name}", value)]) == 0
    text, found = capsys.readouterr().out, json.loads((folder / "out.json").read_text())
    assert "2 pictures x 2 questions" in text and found["recommendation"] in text and "Agreement is no accuracy" in text
    assert [(one["method"], one["overall_tokens"]) for one in found["trials"]] == [
        ("none", None),
        *(("cls", tokens) for tokens in (8, 4)),
        *(("fastv", tokens) for tokens in (8, 4)),
    ]
    whole, *others = found["trials"]
    assert whole["agreement"] == 1 and all(len(one["answers"]) == 4 for one in found["trials"])
    for one in others:
        same = sum(a == b for a, b in zip(one["answers"], whole["answers"], strict=True))
        assert one["agreement"] >= same / 4
        assert 0 < one["predicted_flops"] < whole["predicted_flops"] and one["kv_bytes"] < whole["kv_bytes"]
    assert [one["name"] for one in found["pictures"]] == ["a.png", "b.jpg"] and found["questions"] == [
        "What?",
        "Who is it?",
    ]
    assert found["kernel"]["backend"] == "reference" and found["kernel"]["passed"] and found["dtype"] == "float32"
    assert (
        found["environment"]["packages"]["torch"]
        and found["model"]["layers"] == model.config.text_config.num_hidden_layers
    )


def test_a_wrong_kernel_is_found(folder, monkeypatch):
    model = tiny.build_reference("llava")
    checkpoint = tiny.save_original(model, folder / "tiny", tiny.save_clip_tower(model, folder / "tower"))
    flags = ["--model-path", str(checkpoint), "--images", str(folder), "--device", "cpu"]
    out = try_it.TryOut(try_it.parse(flags), "cpu")
    assert out.kernel()["passed"]
    right = try_it.decode_attention

    def wrong(q, *operands, backend=None):
        found = right(q, *operands, backend=backend)
        return found if backend else found._replace(out=found.out + 1e-3)

    monkeypatch.setattr(try_it, "decode_attention", wrong)
    assert not out.kernel()["passed"]


def trial(method, percent, answers, seconds):
    return Trial(method, percent, AdaVConfig(method=method, overall_tokens=9), answers, [seconds] * len(answers))


def test_the_recommendation():
    answers = [f"word {n}" for n in range(10)]
    whole, nine = trial("none", None, answers, 1.0), [*answers[:9], "other"]
    slow = trial("adav", 50, answers, 1.2)
    good, better = trial("cls", 50, nine, 0.5), trial("t2i", 25, [one.upper() + "." for one in answers], 0.25)
    fast_but_wrong = trial("random", 10, ["other"] * 10, 0.1)
    said = recommendation([whole, slow, good, better, fast_but_wrong])
    assert (
        said.startswith("Recommended: --method t2i --overall-tokens 9:")
        and "100 % of 10" in said
        and "4.0 times" in said
    )
    assert "--method cls" in recommendation([whole, slow, good, fast_but_wrong])
    assert "no method gave the first token sooner" in recommendation([whole, slow])
    assert "the nearest: random at 10 %, 0 %" in recommendation([whole, slow, fast_but_wrong])


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--images", "none"], "there is no folder none"),
        (["--images", "."], "has no picture that can be read"),
        (["--images", "pictures", "--questions", "empty.txt"], "holds no question"),
        (["--images", "pictures", "--methods", "none"], '"none" is no method with a budget'),
        (["--images", "pictures", "--budgets", "200"], "below 100"),
    ],
)
def test_bad_input_is_one_sentence(flags, said, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (folder / "empty.txt").write_text("\n")
    with pytest.raises(SystemExit) as stop:
        try_it.main(["--model-path", "nowhere", *flags])
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and shown.count("\n") == 1 and said in shown
