"""Malformed files on the evaluation path: one sentence and exit code 2 each, before any model is loaded.

Every case spoils one file of a small benchmark, a configuration, a checkpoint, an answer file or a run, and calls the
command in this process.
"""

import io
import json

import pytest
from benchmark_data import make_benchmark
from eval_data import make_place
from PIL import Image
from report_runs import Bench

from llava.eval import compare, launch, score, table
from llava.eval.report.__main__ import main as report
from llava.eval.runs.image_reader import UnreadableImage, read_image

QUESTION = {"question_id": "20000000", "image": "n0.jpg", "text": "What?"}
DEEP = "[" * 100_000


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A checkpoint, a configuration and a place for data, which is the current folder."""
    make_place(tmp_path, monkeypatch)
    return tmp_path


def refused(main, argv, capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([str(part) for part in argv])
    said = capsys.readouterr().err
    assert stopped.value.code == 2, said
    assert said.startswith("error: ") and said.count("\n") == 1, said
    return said


def evaluation(benchmark="gqa"):
    return [benchmark, "--plan", "--checkpoint", "llava", "--data-root", "data", "--config", "config.json"]


def spoil(path, content):
    """Write text, bytes or a JSON value (one line); None puts a folder there."""
    if content is None:
        path.unlink()
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content) + "\n", encoding="utf-8")


# What is wrong with any file of JSON: its content, and what is said.
NO_JSON = {
    "empty": (b"", ""),
    "binary": (b"\xff\xfe\x00\x01", ""),
    "torn": ('{"a": [1, 2', ""),
    "too deep": (DEEP, ""),
    "a folder": (None, ""),
    "a number": ("3", "found int"),
    "null": ("null", "found NoneType"),
    "a list": ("[1]", "found list"),
}

# ------------------------------------------------------------------------------------------------------ question files
QUESTIONS = {
    "nothing": ("", "holds no question"),
    "blank lines": ("\n \n\n", "holds no question"),
    **{f"no JSON: {name}": (content, says) for name, (content, says) in NO_JSON.items() if name != "empty"},
    "two objects on a line": ('{"question_id": 1, "text": "x"} {"question_id": 2, "text": "y"}', "line 1: is no JSON"),
    "no id": ({"text": "What?"}, 'has no "question_id"'),
    "an id that is null": ({**QUESTION, "question_id": None}, '"question_id" is null'),
    "an id that is a fraction": ({**QUESTION, "question_id": 1.5}, '"question_id" is 1.5'),
    "an id that is a truth value": ({**QUESTION, "question_id": True}, '"question_id" is true'),
    "an id that is a list": ({**QUESTION, "question_id": [1]}, '"question_id" is [1]'),
    "an id that is NaN": ('{"question_id": NaN, "text": "x"}', '"question_id" is NaN'),
    "no text": ({"question_id": 1}, 'has no "text"'),
    "a text that is a number": ({**QUESTION, "text": 3}, '"text" is 3'),
    "a text with a placeholder": ({**QUESTION, "text": "<image>\nWhat?"}, '"text" holds <image>'),
    "half a character": ('{"question_id": 1, "text": "\\ud83d"}', "half a character"),
    "a NUL in the image": ({**QUESTION, "image": "a\0.jpg"}, 'line 1: "image" is'),
    "an image that is a list": ({**QUESTION, "image": ["n0.jpg"]}, '"image" is ["n0.jpg"]'),
    "an image that is empty": ({**QUESTION, "image": ""}, '"image" is ""'),
    "an image elsewhere": ({**QUESTION, "image": "/etc/hostname"}, "leaves the image folder"),
    "an image above": ({**QUESTION, "image": "../images/n0.jpg/../../x"}, "leaves the image folder"),
    "an image that is the folder": ({**QUESTION, "image": "."}, "leaves the image folder"),
    "an image that is not there": ({**QUESTION, "image": "n7.jpg"}, 'image "n7.jpg" is not in'),
    "a name without end": ({**QUESTION, "image": "x" * 5000}, "is not in"),
}


@pytest.mark.parametrize("case", QUESTIONS)
def test_question_files(place, capsys, case):
    make_benchmark("gqa", place / "data", 1)
    content, says = QUESTIONS[case]
    spoil(place / "data" / "gqa" / "llava_gqa_testdev_balanced.jsonl", content)
    said = refused(launch.main, evaluation(), capsys)
    assert says in said and "llava_gqa_testdev_balanced.jsonl" in said


# --------------------------------------------------------------------------------------------------------- label files
ANSWERS = [{"answer": "red"}] * 10
LABELS = {  # benchmark, file, content, what is said
    **{
        f"gqa, {name}": ("gqa", "gqa/data/testdev_balanced_questions.json", content, "testdev_balanced_questions.json")
        for name, (content, _) in NO_JSON.items()
    },
    "gqa, no answer": ("gqa", "gqa/data/testdev_balanced_questions.json", {"20000000": {}}, "an entry has no 'answer'"),
    "gqa, an answer that is a list": (
        *("gqa", "gqa/data/testdev_balanced_questions.json", {"20000000": {"answer": ["red"]}}),
        '"answer" of question 20000000 is',
    ),
    "gqa, a type that is a list": (
        *("gqa", "gqa/data/testdev_balanced_questions.json"),
        *({"20000000": {"answer": "red", "types": {"structural": [1]}}}, "its type is [1]"),
    ),
    "sqa, no split": ("sqa", "scienceqa/pid_splits.json", {"val": []}, "an entry has no 'test'"),
    "sqa, problems in a list": ("sqa", "scienceqa/problems.json", [1], "problems.json"),
    "sqa, a negative answer": (
        *("sqa", "scienceqa/problems.json", {"10": {"answer": -1, "choices": ["a", "b"]}}),
        'problem 10: "answer" is -1',
    ),
    "sqa, an answer as a letter": (
        *("sqa", "scienceqa/problems.json", {"10": {"answer": "A", "choices": ["a", "b"]}}),
        "problem 10: \"answer\" is 'A'",
    ),
    "sqa, a conversation without turns": (
        *("sqa", "scienceqa/llava_test_CQM-A.json", [{"id": "10", "conversations": []}]),
        "llava_test_CQM-A.json: an entry",
    ),
    "textvqa, no data": ("textvqa", "textvqa/TextVQA_0.5.1_val.json", {"questions": []}, 'has no "data"'),
    "textvqa, one answer": (
        *("textvqa", "textvqa/TextVQA_0.5.1_val.json"),
        *({"data": [{"image_id": f"{0:016x}", "question": "What colour is the shape?", "answers": ["red"]}]},),
        'its reference answers are ["red"]',
    ),
    "textvqa, an image that is a list": (
        *("textvqa", "textvqa/TextVQA_0.5.1_val.json"),
        *({"data": [{"image_id": [1], "question": "What?", "answers": ["a", "b"]}]}, "is known by [1]"),
    ),
    "vqav2, no annotations": ("vqav2", "vqav2/v2_mscoco_val2014_annotations.json", {}, 'has no "annotations"'),
    "vqav2, an id that is an object": (
        *("vqav2", "vqav2/v2_mscoco_val2014_annotations.json"),
        *({"annotations": [{"question_id": {}, "answers": ANSWERS}]}, "is known by {}"),
    ),
    "vqav2, a type that is a number": (
        *("vqav2", "vqav2/v2_mscoco_val2014_annotations.json"),
        *({"annotations": [{"question_id": 2000, "answers": ANSWERS, "answer_type": 3}]}, "its type is 3"),
    ),
    "vizwiz, an answer that is a number": (
        *("vizwiz", "vizwiz/val.json"),
        [{"image": "VizWiz_val_00000000.jpg", "question": "What?", "answers": [{"answer": 1}] * 10}],
        "its reference answers are",
    ),
    "pope, no label": (
        *("pope", "pope/coco/coco_pope_random.json", {"image": "a.jpg", "text": "Is there?"}),
        "an entry has no 'label'",
    ),
    "pope, an image that is a list": (
        *("pope", "pope/coco/coco_pope_random.json", {"image": [1], "text": "Is there?", "label": "yes"}),
        "is known by [1]",
    ),
    "mme, neither yes nor no": (
        *("mme", "MME/MME_Benchmark_release_version/existence/0000.txt", "Is there?\tmaybe\n"),
        "line 1: found",
    ),
    "mme, no text": ("mme", "MME/MME_Benchmark_release_version/existence/0000.txt", b"\xff\xfe\n", "0000.txt"),
    "seed, no types": ("seed", "seed_bench/SEED-Bench.json", {"questions": []}, 'has no "question_type"'),
    "seed, an unknown type": (
        *("seed", "seed_bench/SEED-Bench.json"),
        {
            "questions": [{"question_id": "101000", "answer": "A", "data_type": "image", "question_type_id": 7}],
            "question_type": {},
        },
        "SEED-Bench.json: an entry has no 7",
    ),
    "mmbench, nothing": ("mmbench", "mmbench/mmbench_dev_20230712.tsv", "", "holds no question"),
    "mmbench, a head alone": ("mmbench", "mmbench/mmbench_dev_20230712.tsv", "index\tquestion\n", "holds no question"),
    "mmbench, commas": (
        "mmbench",
        "mmbench/mmbench_dev_20230712.tsv",
        "index,question\n1,x\n",
        "row 1 of 1: lacks index",
    ),
    "mmbench, an image that is no base64": (
        *("mmbench", "mmbench/mmbench_dev_20230712.tsv", "index\tquestion\tA\timage\n1\tx\ty\t???\n"),
        "index 1: its image is not base64",
    ),
    "mmbench, an index that is none": (
        *("mmbench", "mmbench/mmbench_dev_20230712.tsv", "index\tquestion\tA\timage\n²\tx\ty\tAAAA\n"),
        "row 1 of 1: is not a row of the table",
    ),
}


@pytest.mark.parametrize("case", LABELS)
def test_label_files(place, capsys, case):
    name, file, content, says = LABELS[case]
    make_benchmark(name, place / "data", 1)
    spoil(place / "data" / file, content)
    split = ["--split", "val"] if name in ("vqav2", "vizwiz") else []
    assert says in refused(launch.main, [*evaluation(name), *split], capsys)


# ------------------------------------------------------------------------------------ configurations and checkpoints
CONFIGURATIONS = {
    **{name: (content, "config.json") for name, (content, _) in NO_JSON.items()},
    "a comment": ('{"method": "adav"} // mine', "line 1, column 20"),
    "a key twice": ('{"method": "adav", "method": "cls"}', 'key "method" is there twice'),
    "NaN": ('{"text_pruning_rate": NaN}', "found NaN, which JSON does not have"),
    "a number without end": ('{"text_pruning_rate": 1e999}', '"text_pruning_rate" is Infinity'),
    "tokens as a text": ({"overall_tokens": "144"}, '"overall_tokens" is "144"'),
    "tokens as a fraction": ({"overall_tokens": 1e3}, '"overall_tokens" is 1000.0'),
    "tokens as a truth value": ({"overall_tokens": True}, '"overall_tokens" is true'),
    "no tokens": ({"overall_tokens": 0}, '"overall_tokens" is 0'),
    "a method that is a number": ({"method": 3}, '"method" is 3'),
    "options in a list": ({"options": []}, '"options" is []'),
    "an option out of range": ({"options": {"min_share": 2}}, '"options.min_share" is 2'),
    "a rule that is none": ({"text_rule": "oldest"}, '"text_rule" is "oldest"'),
    "half of a pair": ({"h2o_heavy_share": 0.2}, "go together"),
    "a table that is not there": ({"options": {"table": "nowhere.json"}}, "nowhere.json"),
}


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_configurations(place, capsys, case):
    make_benchmark("gqa", place / "data", 1)
    content, says = CONFIGURATIONS[case]
    spoil(place / "config.json", content)
    assert says in refused(launch.main, evaluation(), capsys)


@pytest.mark.parametrize("case", NO_JSON)
def test_checkpoints(place, capsys, case):
    make_benchmark("gqa", place / "data", 1)
    content, says = NO_JSON[case]
    spoil(place / "llava" / "config.json", content)
    said = refused(launch.main, evaluation(), capsys)
    assert "llava" in said and says in said


# ------------------------------------------------------------------------------------------------------------ pictures
def png(mode, size):
    file = io.BytesIO()
    Image.new(mode, size).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no picture",
        png("RGB", (40, 30))[:60],
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"<svg/>",
        b"\xff\xd8\xff\xe0" * 9,
    ],
)
def test_pictures(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UnreadableImage) as error:
        read_image(tmp_path / "a.png")
    assert "\n" not in str(error.value) and str(error.value)


# ----------------------------------------------------------------------------------------------------- files of answers
ROW = {"question_id": "20000000", "text": "red"}
ANSWER_FILES = {
    **{name: (content, "answers.jsonl") for name, (content, _) in NO_JSON.items()},
    "no text": ({"question_id": "20000000"}, 'has no "question_id" and "text"'),
    "a text that is null": ({**ROW, "text": None}, 'has no "question_id" and "text"'),
    "an id that is a list": ({**ROW, "question_id": []}, 'has no "question_id" and "text"'),
    "a stranger": ({**ROW, "question_id": "7"}, "1 of 1 answers are to none of these 1 questions"),
    "an answer twice": (
        f"{json.dumps(ROW)}\n{json.dumps(ROW)}\n",
        "1 answers are to questions that are answered already",
    ),
}


@pytest.mark.parametrize("case", ANSWER_FILES)
def test_files_of_answers(place, capsys, case):
    make_benchmark("gqa", place / "data", 1)
    content, says = ANSWER_FILES[case]
    (place / "answers.jsonl").write_text(json.dumps(ROW))
    spoil(place / "answers.jsonl", content)
    assert says in refused(score.main, ["gqa", "answers.jsonl", "--data-root", "data"], capsys)


def test_half_a_character_in_an_answer_does_not_cost_the_upload(tmp_path, capsys):
    """JSON can hold it, UTF-8 and XML cannot; neither can XML hold control characters."""
    openpyxl = pytest.importorskip("openpyxl", reason="MMBench's upload is an .xlsx file")
    make_benchmark("vizwiz", tmp_path, 1)
    make_benchmark("mmbench", tmp_path, 2)
    path = tmp_path / "answers.jsonl"
    spoil(path, {"question_id": "VizWiz_test_00000000.jpg", "text": "a \ud83d"})
    score.main(["vizwiz", str(path), "--data-root", str(tmp_path)])
    assert json.loads((tmp_path / "vizwiz-test-upload.json").read_text())[0]["answer"] == "?"
    path.write_text("".join(json.dumps({"question_id": i, "text": "A\x00\x0b\ud83d."}) + "\n" for i in (241, 1000241)))
    score.main(["mmbench", str(path), "--data-root", str(tmp_path)])
    rows = list(openpyxl.load_workbook(tmp_path / "mmbench-dev-upload.xlsx").active.values)
    assert [row[4] for row in rows] == ["prediction", "A.", "A."]


# ------------------------------------------------------------------------------------------------------------ run folders
RECORDS = {
    **{f"no JSON: {name}": content for name, (content, _) in NO_JSON.items()},
    "tokens": {"tokens": "many"},
    "tokens, a number": {"tokens": 3},
    "configuration": {"configuration": []},
    "configuration, options": {"configuration": {"method": "adav", "options": None}},
    "checkpoint": {"checkpoint": None},
    "checkpoint, name": {"checkpoint": {"name": 3, "content": "x"}},
    "asked": {"asked": {}},
    "asked, limit": {"asked": {"limit": "3", "subset": None, "seed": None}},
    "generation": {"generation": []},
    "score": {"score": [1]},
    "score, partial": {"score": {"partial": 3}},
    "score without one": {"score": None},
    "published": {"published": "61.9"},
}


@pytest.mark.parametrize("case", RECORDS)
def test_records_of_runs(tmp_path, capsys, case):
    path = Bench(tmp_path).run(questions=4) / "run.json"
    whole, content = json.loads(path.read_text()), RECORDS[case]
    spoil(path, whole | content if isinstance(content, dict) else content)
    where = str(tmp_path / "runs")
    for main, argv in ((table.main, [where]), (report, [where, "-o", tmp_path / "report.html"])):
        assert "run.json" in refused(main, argv, capsys)


MORE_RECORDS = {
    "benchmark": {"benchmark": None},
    "split": {"split": 1},
    "question_file": {"question_file": None},
    "environment": {"environment": []},
    "sessions": {"sessions": [1]},
    "sessions, command": {"sessions": [{}]},
    "answered": {"answered": "4"},
    "seconds_per_stage": {"seconds_per_stage": {"prefill": "1"}},
    "prefill_spread": {"prefill_spread": "much"},
}


@pytest.mark.parametrize("case", MORE_RECORDS)
def test_records_of_runs_in_a_report(tmp_path, capsys, case):
    path = Bench(tmp_path).run(questions=4) / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | MORE_RECORDS[case]))
    said = refused(report, [tmp_path / "runs", "-o", tmp_path / "report.html"], capsys)
    assert "run.json" in said and f'"{case.partition(",")[0]}' in said


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", "checkpoint,method\nx,y\n", b"\xff\xfe", "null", None])
def test_files_of_a_comparison(tmp_path, capsys, content):
    (tmp_path / "compare.csv").touch()
    spoil(tmp_path / "compare.csv", content)
    assert "compare.csv" in refused(compare.main, ["--plot-only", "--out", tmp_path], capsys)
