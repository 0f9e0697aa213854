"""mydata: reading of files, metrics, scores with intervals, a plugin in a worker process, comparison of answer files."""

import json

import datasets
import pytest
from PIL import Image
from tiny_checkpoints import build_reference, save_clip_tower, save_original

from llava.common.errors import UserError
from llava.eval import compare, launch
from llava.eval.benchmarks.own_data import OwnData
from llava.eval.report.answer_files import compare_answers
from llava.eval.results.compare_table import read_rows
from llava.eval.scoring.metrics import anls, contains, exact

PLUGIN = """
from dataclasses import dataclass
from llava.methods.before_llm import Selector
from llava.methods.before_llm.base import take

@dataclass
class Last(Selector):
    def keep(self, image, text, budget):
        return take(image, image.patches[-budget:])
"""


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pictures(folder, names):
    folder.mkdir(exist_ok=True)
    for n, name in enumerate(names):
        Image.effect_noise((40 + n, 30), 90).convert("RGB").save(folder / name)
    return folder


# --------------------------------------------------------------------------------------------------------- metrics
@pytest.mark.parametrize(
    "metric, answer, references, value",
    [
        (exact, "The red one.", ["blue", "red 1"], 1),
        (exact, "reddish", ["red"], 0),
        (exact, "a.", ["A"], 1),  # EvalAI's rule removes "a", and then all option letters A would equal ""
        (exact, "", ["A"], 0),
        (contains, "It is a red car.", ["red car"], 1),
        (contains, "It is scarred", ["red", "car"], 0),
        (contains, "anything", ["the red", "."], 0),
        (anls, "Hello  World", ["hello world"], 1),
        (anls, "abcd", ["abxd", "zzzz"], 0.75),
        (anls, "ab", ["ax"], 0),  # a distance of exactly 0.5 is too far
        (anls, "sitting", ["kitten"], 4 / 7),  # 3 edits, 7 letters
        (anls, "", ["x"], 0),
    ],
)
def test_metrics(metric, answer, references, value):
    assert metric(answer, references) == pytest.approx(value)


# --------------------------------------------------------------------------------------------------------- reading
def test_integer_and_text_ids_meet_and_formats_agree(tmp_path):
    images = pictures(tmp_path / "images", ["a.png", "b.png"])
    rows = [
        {"question_id": 7, "image": "a.png", "text": "What?"},
        {"question_id": "8", "image": "b.png", "text": "Who?"},
    ]
    questions = lines(tmp_path / "q.jsonl", rows)
    labels = lines(tmp_path / "a.jsonl", [{"question_id": "8", "answers": ["x", "y"]}, {"question_id": 7, "answer": 3}])
    table = tmp_path / "q.csv"
    table.write_text('question_id,image,text,answers,type\n7,a.png,What?,3,\n8,b.png,Who?,"[""x"", ""y""]",k\n')
    answers = [{"text": "Three"}, {"text": "z"}]
    for benchmark in (OwnData(questions, images, labels), OwnData(table, images)):
        samples = benchmark.load()
        assert [(str(s.question_id), s.image, s.prompt) for s in samples] == [
            ("7", "a.png", "What?"),
            ("8", "b.png", "Who?"),
        ]
        score = benchmark.finish(samples, answers, tmp_path)
        assert (score["accuracy"], score["questions"], score["metric"]) == (0.5, 2, "exact")
        # Two images: both wrong, both right, or one of each.
        assert score["interval"] == {"low": 0.0, "high": 1.0}
    assert score["per_type"] == {"k": 0.0}


def test_a_folder_of_the_datasets_library(tmp_path):
    images = pictures(tmp_path / "given", ["a.png", "b.png"])
    columns = {"image": [str(images / "a.png"), None], "text": ["What?", "Who?"], "answer": ["x", "y"]}
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "hf")
    benchmark = OwnData(tmp_path / "hf", tmp_path / "written", split="train")
    samples = benchmark.load()
    assert [(s.question_id, s.images) for s in samples] == [(1, ("000001.png",)), (2, ())]
    assert (tmp_path / "written" / "000001.png").read_bytes() == (images / "a.png").read_bytes()
    with pytest.raises(UserError, match="allowed are train, test"):
        OwnData(tmp_path / "hf", tmp_path / "written").load()
    with pytest.raises(UserError, match="--images says where to write them"):
        OwnData(tmp_path / "hf", split="test").load()


def test_questions_without_answers_are_answered_alone(tmp_path):
    images = pictures(tmp_path, ["a.png"])
    benchmark = OwnData(lines(tmp_path / "q.jsonl", [{"image": "a.png", "text": "What?"}]), images)
    samples = benchmark.load()
    assert benchmark.finish(samples, [{"text": "x"}], tmp_path) == {"questions": 1}
    assert benchmark.verdicts(samples, [{"text": "x"}], tmp_path) is None


ROW = {"question_id": 1, "image": "a.png", "text": "What?", "answer": "x"}


@pytest.mark.parametrize(
    "rows, metric, said",
    [
        ([ROW | {"image": "no.png"}], "exact", 'line 1: image "no.png" is not in'),
        ([ROW | {"image": "../a.png"}], "exact", "leaves the image folder"),
        ([ROW | {"images": ["a.png"]}], "exact", 'has "image" and "images"'),
        ([ROW | {"image": None, "images": ["a.png", 3]}], "exact", "an image is 3"),
        ([ROW, ROW | {"question_id": "1", "text": "Who?"}], "exact", "question_id 1 is already in line 1"),
        ([ROW, {"text": "Who?"}], "exact", 'line 2: has no "question_id"'),
        ([ROW, ROW | {"question_id": 2, "answer": True}], "exact", 'line 2: "answer" holds true'),
        ([ROW | {"answers": ["y"]}], "exact", "has answer and answers"),
        ([ROW], "vqa", "has 1 answers, allowed with metric vqa are 2 or more"),
        ([ROW, {"question_id": 2, "text": "Who?"}], "exact", "has no label for 1 of 2 questions"),
    ],
)
def test_bad_rows_are_one_sentence(tmp_path, rows, metric, said):
    images = pictures(tmp_path / "images", ["a.png"])
    with pytest.raises(UserError) as error:
        OwnData(lines(tmp_path / "q.jsonl", rows), images, metric=metric).load()
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("q.csv", "text,image\nWhat?,a.png,more\n", "line 2: has more cells"),
        ("q.csv", 'text,answers\nWhat?,"[1"\n', "begins like a JSON list and is none"),
        ("q.csv", 'text\n"What?\n', "cannot be read as a table"),
        ("q.xlsx", "", "allowed is a .jsonl, .csv or .tsv file"),
        ("q.csv", "text\n", "holds no question"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as error:
        OwnData(tmp_path / name).load()
    assert said in str(error.value) and str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize(
    "command, flags, said",
    [
        (launch, ["mydata", "--family", "demo"], "mydata needs --questions FILE"),
        (launch, ["shapes", "--family", "demo", "--metric", "anls"], "--metric goes with the benchmark mydata alone"),
        (compare, ["mydata"], "mydata needs --questions FILE"),
        (compare, ["--questions", "q.jsonl"], "--questions goes with the benchmark mydata alone"),
        (compare, ["gqa"], '"gqa" cannot be compared'),
        (compare, ["--answers", "a", "b", "c"], "--answers names 3 files"),
        (compare, ["--plugin", "nothing.py"], "there is no file"),
    ],
)
def test_bad_flags_are_one_sentence(command, flags, said, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(flags)
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and shown.count("\n") == 1 and said in shown


# ------------------------------------------------------------------------------------------------------------ runs
@pytest.fixture(scope="module")
def done(tmp_path_factory, warm):
    """A comparison on own data with a method from a file: its folder and flags."""
    place = tmp_path_factory.mktemp("own")
    model = build_reference("llava")
    checkpoint = save_original(model, place / "mine", save_clip_tower(model, place / "tower"))
    images = pictures(place / "images", ["a.png", "b.png", "c.png"])
    rows = [{"question_id": n, "image": f"{'abc'[n % 3]}.png", "text": f"What {n}?", "answer": "x"} for n in range(5)]
    # Two images in one prompt, and a type whose column would be another's.
    rows.append({"question_id": 5, "images": ["a.png", "b.png"], "text": "Which?", "answer": "x", "type": "low"})
    (place / "last_ones.py").write_text(PLUGIN)
    flags = {"questions": lines(place / "q.jsonl", rows), "images": images, "plugin": place / "last_ones.py"}
    own = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        more = ["--checkpoints", checkpoint, "--methods", "last_ones", "--budgets", "50,25", "--max-new-tokens", 2]
        more += ["--shards", 1, "--output", place / "runs", "--out", place / "out"]
        compare.main(["mydata", *own, *map(str, more)])
        yield place, own, checkpoint


def test_a_comparison_on_own_data(done):
    place, _, _ = done
    rows = read_rows(place / "out" / "compare.csv")
    assert [(row["method"], row["budget_tokens"]) for row in rows] == [
        ("none", None),
        *(("adav", tokens) for tokens in (8, 4)),
        *(("last_ones", tokens) for tokens in (8, 4)),
    ]
    for row in rows:
        assert (row["questions"], row["pictures"], row["benchmark"], row["headline"]) == (6, 3, "mydata", "accuracy")
        assert row["tokens_after"] == (row["budget_tokens"] or 16), "per image, also where a prompt has two"
        assert row["accuracy_of_low"] in (0, 1) and 0 <= row["accuracy_low"] <= row["accuracy_high"] <= 1
    assert "demo" not in (place / "out" / "compare.md").read_text()
    (merged,) = (place / "runs").rglob("last_ones-8-*/merge.jsonl")
    answered = [json.loads(line) for line in merged.read_text().splitlines()]
    assert answered[5]["metadata"] == {
        "vision_tokens": 16,
        "vision_tokens_before": 32,
        "image": "a.png",
        "images": ["a.png", "b.png"],
    }


def test_a_run_is_known_by_its_plugin_and_none_by_no_budget(done, capsys):
    place, own, checkpoint = done

    def folder(*flags):
        common = ["--max-new-tokens", "2", "--checkpoint", str(checkpoint), "--output", str(place / "runs"), "--plan"]
        launch.main(["mydata", *own, *map(str, flags), *common])
        text = capsys.readouterr().out
        return next(line.strip() for line in text.splitlines() if line.startswith(f"  {place / 'runs'}")), text

    mine, text = folder(8, "--method", "last_ones")
    assert "6 answered already, 0 to do" in text
    (place / "last_ones.py").write_text(PLUGIN + "# changed\n")
    changed, text = folder(8, "--method", "last_ones")
    assert changed != mine and "0 answered already, 6 to do" in text
    whole, text = folder(3, "--method", "none")
    assert folder(99, "--method", "none")[0] == whole and "6 answered already" in text


def test_answer_files_beside_their_runs(done, capsys):
    place, _, _ = done
    files = [str(next((place / "runs").rglob(f"{name}/merge.jsonl"))) for name in ("none-all-*", "adav-4-*")]
    compare.main(["--answers", *files])
    text = capsys.readouterr().out
    assert "6 questions are answered in both files, 0 in one of them alone" in text
    assert "accuracy (%)" in text and "B minus A" in text and "both right: " in text


def test_two_answer_files_by_hand(tmp_path):
    rows = [{"question_id": n, "text": f"What {n}?", "answer": "x"} for n in range(4)]
    benchmark = OwnData(lines(tmp_path / "q.jsonl", rows))
    # A is right on 0, 1 and 3. B answers with text ids, is right on 0 and 2, and does not answer 3.
    a = lines(tmp_path / "a.jsonl", [{"question_id": n, "text": t} for n, t in enumerate(["x", "X.", "y", "x"])])
    b = lines(tmp_path / "b.jsonl", [{"question_id": str(n), "text": t} for n, t in enumerate(["x", "z", "x"])])
    found = compare_answers((a, b), benchmark)
    assert (found.questions, found.alone) == (3, 1)
    assert found.same.value == pytest.approx(100 / 3)
    assert [score.value for score in found.scored.scores] == pytest.approx([200 / 3, 200 / 3])
    assert found.scored.difference.value == pytest.approx(0, abs=1e-9)
    assert found.scored.right == {"both right": 1, "only A": 1, "only B": 1, "neither": 0}
    assert found.scored.asked == "3 of 4 questions"
    assert "B minus A" in found.text() and "-0.00 " not in found.text()
    alone = compare_answers((a, b), None)
    assert alone.scored is None and alone.same == found.same
    with pytest.raises(UserError, match="no question in common"):
        compare_answers((a, lines(tmp_path / "c.jsonl", [{"question_id": 9, "text": "x"}])), None)
    with pytest.raises(UserError, match="answered several times"):
        compare_answers((a, lines(tmp_path / "d.jsonl", [{"question_id": 1, "text": "x"}] * 2)), None)
