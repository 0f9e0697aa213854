"""Every benchmark on made data in its real layout: prompts, keys, scores worked out by hand, upload files."""

import csv
import json
import random
import re
from pathlib import Path

import pytest
from benchmark_data import MAKERS, WORDS, make_benchmark, write_json, write_rows, yes_no

from llava.common.errors import UserError
from llava.common.find_checkpoint import EvalCheckpoint
from llava.eval.benchmarks import BENCHMARKS, mmbench, mme, pope, sqa, textvqa
from llava.eval.benchmarks.answer_file import score_file
from llava.eval.scoring.multiple_choice import option_letter

SPLITS = [(name, split) for name in MAKERS for split in BENCHMARKS[name].splits]
SCORED = [
    ("vqav2", "val"),
    ("gqa", "testdev-balanced"),
    ("vizwiz", "val"),
    ("sqa", "test"),
    ("textvqa", "val"),
    ("pope", "test"),
    ("mme", "test"),
    ("mmbench", "dev"),
    ("mmbench_cn", "dev"),
    ("seed", "image"),
]


def right_answer(name: str, i: int) -> str:
    """The right answer to question i (in the order of the file) of tests/support/benchmark_data.py."""
    if name in ("sqa", "seed"):
        return "AB"[i % 2]
    if name.startswith("mmbench"):
        return "AB"[(i // 2 + i) % 2]
    return yes_no(i) if name in ("pope", "mme") else WORDS[i % len(WORDS)]


@pytest.fixture
def made(tmp_path):
    """made(name, split) -> benchmark, samples, and the rows of a run in which every answer is right."""

    def make(name, split=None, questions=8):
        if not (tmp_path / "data").exists():
            make_benchmark(name, tmp_path / "data", questions)
        benchmark = BENCHMARKS[name](tmp_path / "data", None, split)
        samples = benchmark.load()
        rows = [
            {"question_id": sample.question_id, "prompt": sample.prompt, "text": right_answer(name, i)}
            for i, sample in enumerate(samples)
        ]
        return benchmark, samples, rows

    return make


def answered(rows, **texts):
    """The rows with other answers: answered(rows, _3="no") changes row 3."""
    return [{**row, "text": texts.get(f"_{i}", row["text"])} for i, row in enumerate(rows)]


def without_paths(score):
    return {name: value for name, value in score.items() if name not in ("upload", "answers")}


# ------------------------------------------------------------------------------------------------- what is asked
def test_every_benchmark_has_a_miniature():
    assert set(MAKERS) == set(BENCHMARKS) - {"shapes", "shapes_captions"}


@pytest.mark.parametrize("name, split", SPLITS)
def test_what_is_asked(made, name, split):
    benchmark, samples, _ = made(name, split)
    assert len(samples) == 8 and len({sample.key for sample in samples}) == 8
    assert benchmark.download_page.startswith("https://")
    assert benchmark.max_new_tokens == (1024 if name in ("sqa", "mmvet") or "mmbench" in name else 128)
    endings = {"sqa": "directly.", "seed": "directly.", "mmbench": "directly.", "mmbench_cn": "请直接回答选项字母。"}
    if name != "mmvet":
        ending = endings.get(name, "Answer the question using a single word or phrase.")
        assert all(sample.prompt.endswith("\n" + ending if ending[0] == "A" else ending) for sample in samples)
    assert benchmark.partial is None


def test_prompts_word_for_word(made):
    _, samples, _ = made("sqa")
    letter = "\nAnswer with the option's letter from the given choices directly."
    assert samples[1].prompt == "Context: Look closely.\nHow many shapes are there?\nA. red\nB. blue" + letter
    assert samples[2].image is None and samples[1].image == "11/image.png"


def test_prompts_of_mmbench(made):
    _, samples, _ = made("mmbench")
    asked = 'A "hint".\nOf two lines.\nHow many shapes are there?\nA. blue\nB. red'
    assert samples[3].text == asked and samples[3].question_id == 1000242
    assert samples[3].prompt == asked + "\nAnswer with the option's letter from the given choices directly."
    assert samples[2].image == samples[3].image, "rotations share one image"


def test_prompts_of_vizwiz_val_are_those_of_the_test_file(tmp_path, made):
    asked = [{sample.text for sample in made("vizwiz", split)[1]} for split in ("test", "val")]
    assert asked[0] == asked[1]


def test_seed_asks_about_images_alone(made):
    _, samples, _ = made("seed")
    assert all(sample.image.startswith("SEED-Bench-image/") for sample in samples)


# ------------------------------------------------------------------------------------- scores worked out by hand
@pytest.mark.parametrize("name, split", SCORED)
def test_all_right_and_all_wrong(made, tmp_path, name, split):
    benchmark, samples, rows = made(name, split)
    best = {"mme": 600}.get(name, 100)  # three perception sub-tasks at 200
    assert benchmark.published(benchmark.finish(samples, rows, tmp_path)) == pytest.approx(best)
    silly = [{**row, "text": "E"} for row in rows]
    worst = benchmark.published(benchmark.finish(samples, silly, tmp_path))
    assert worst == pytest.approx({"pope": 100 * (0.8 + 0.5 + 2 / 3) / 3}.get(name, 0))  # "E" is no no: all yes


def test_gqa(made, tmp_path):
    benchmark, samples, rows = made("gqa")
    rows = answered(rows, _0="Red.", _1="2..", _2="yes it is", _3="LEFT SIDE", _4="the red")
    score = benchmark.finish(samples, rows, tmp_path)
    assert score == {"accuracy": 6 / 8, "questions": 8, "per_kind": {"binary": 1.0, "open": 0.5}}


def test_vqav2_and_vizwiz_val(tmp_path):
    """Seven of ten say the word, three "unanswerable": 1 and 0.9, and 0 for anything else."""
    for name in ("vqav2", "vizwiz"):
        make_benchmark(name, tmp_path, 4)
        benchmark = BENCHMARKS[name](tmp_path, None, "val")
        samples = benchmark.load()
        rows = [{"text": text} for text in ("A red!", "unanswerable", "no", "Left  side")]
        score = benchmark.finish(samples, rows, tmp_path)
        assert score["accuracy"] == pytest.approx((1 + 0.9 + 0 + 1) / 4)
    assert "per_answer_type" not in score


def test_textvqa_joins_by_image_and_question(made, tmp_path):
    benchmark, samples, rows = made("textvqa")
    rows = answered(rows, _0="The Red", _1="two", _2="unanswerable", _3="right side")
    assert benchmark.finish(samples, rows, tmp_path)["accuracy"] == pytest.approx((1 + 1 + 0.9 + 0 + 4) / 8)


def test_textvqa_a_question_annotated_twice_counts_the_mean():
    data = [
        {"image_id": "a", "question": "What?", "answers": ["x"] * 10},
        {"image_id": "a", "question": "what?", "answers": ["y"] * 10},
        {"image_id": "b", "question": "what?", "answers": ["x"] * 10},
    ]
    key = ("a", "what?")
    answers = [(key, "x"), (key, "y"), (("b", "what?"), "x")]
    assert textvqa.score(answers, data, Path("F"))["accuracy"] == pytest.approx((0.5 + 0.5 + 1) / 3)
    with pytest.raises(UserError, match="1 of its 2 questions have no answer"):
        textvqa.score(answers[1:], data, Path("F"))
    assert textvqa.score(answers[1:], data, Path("F"), partial=True)["questions"] == 2


@pytest.mark.parametrize(
    "prompt, question",
    [
        ("What IS it?\nReference OCR token: A, b\nAnswer the question.", "what is it?"),
        ("Reference OCR token: A, b\nWhat?\nAnswer the question.", "what?"),
        ("What?\nAnswer the question.", "what?"),
    ],
)
def test_textvqa_question(prompt, question):
    assert textvqa.question(prompt, Path("F")) == question


def test_textvqa_question_of_another_shape():
    for prompt in ("What?", "What?\nIs\nthat?", "a\nReference OCR token: b\nc\nd"):
        with pytest.raises(UserError, match="F: a prompt has"):
            textvqa.question(prompt, Path("F"))


@pytest.mark.parametrize(
    "text, yes",
    [
        ("Yes", True), ("yes, there is", True), ("No", False), ("no", False), ("No, there is a cat", False),
        ("There is not", False), ("There is no dog. Yes", False), ("Yes. No.", True), ("Nothing", True),
        ("There isn't", True), ("NO", True), ("", True), ("I do not, no", False),
    ],
)  # fmt: skip
def test_pope_reads_an_answer(text, yes):
    assert pope.says_yes(text) is yes


def test_pope_f1_by_category(made, tmp_path):
    """All say yes; the labels are yes, no, yes | no, yes, no | yes, no."""
    benchmark, samples, rows = made("pope")
    score = benchmark.finish(samples, [{**row, "text": "Yes"} for row in rows], tmp_path)
    assert score["adversarial"] == pytest.approx({"f1": 0.8, "precision": 2 / 3, "recall": 1, "questions": 3})
    assert score["popular"]["f1"] == pytest.approx(0.5) and score["random"]["f1"] == pytest.approx(2 / 3)
    assert score["f1"] == pytest.approx((0.8 + 0.5 + 2 / 3) / 3)
    assert score["yes_ratio"] == 1.0 and score["accuracy"] == 0.5


def test_pope_knows_both_spellings_and_no_third(made, tmp_path):
    benchmark, samples, rows = made("pope")
    assert any("imange" in sample.text for sample in samples)
    path = benchmark.folder / "coco" / "coco_pope_popular.json"
    path.write_text(path.read_text().replace("in the image", "in the imange"))
    assert benchmark.finish(samples, rows, tmp_path)["f1"] == 1.0
    path.write_text(path.read_text().replace("in the imange", "in this image"))
    with pytest.raises(UserError, match="3 of 8 answered questions are not in it.* and 3 of its 8 questions have no"):
        benchmark.finish(samples, rows, tmp_path)


def test_a_question_that_is_asked_and_labelled_twice_counts_twice(tmp_path):
    row = {"image": "a.jpg", "text": "Is there a dog in the image?", "label": "yes"}
    for category in pope.CATEGORIES:
        write_rows(pope.label_file(tmp_path, category), [row | {"question_id": i} for i in range(2)])
    keys = [(category, "a.jpg", row["text"]) for category in pope.CATEGORIES for _ in range(2)]
    score = pope.score([(key, ("yes", "no")[i % 2]) for i, key in enumerate(keys)], tmp_path)
    assert score["f1"] == pytest.approx(2 / 3) and score["questions"] == 6
    with pytest.raises(UserError, match="1 of 3 answered questions are not in it, or less often"):
        pope.score([(key, "yes") for key in [*keys, keys[0]]], tmp_path)
    write_rows(pope.label_file(tmp_path, "random"), [row, row | {"label": "no"}])
    with pytest.raises(UserError, match=r"has different labels for one question \(random, a.jpg, Is there"):
        pope.score([(key, "yes") for key in keys], tmp_path)


def test_pope_trusts_no_order(made, tmp_path):
    benchmark, samples, rows = made("pope")
    for path in (benchmark.folder / "coco").iterdir():
        path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    assert benchmark.finish(samples, rows, tmp_path)["f1"] == 1.0


@pytest.mark.parametrize(
    "text, said",
    [("Yes", "yes"), ("yes.", "yes"), ("No", "no"), ("Not", "no"), ("I think yes", "other"), ("", "other"), ("y", "other")],
)  # fmt: skip
def test_mme_reads_an_answer(text, said):
    assert mme.said(text) == said


def test_mme_points(made, tmp_path):
    """One image of existence with one of two right: 50 + 0; code_reasoning none: 0; artwork and posters 200 each."""
    benchmark, samples, rows = made("mme")
    score = benchmark.finish(samples, answered(rows, _1="Yes", _4="no", _5="yes"), tmp_path)
    assert score["per_task"] == {"existence": 50.0, "posters": 200.0, "artwork": 200.0, "code_reasoning": 0.0}
    assert score["perception"] == 450.0 and score["cognition"] == 0.0
    assert benchmark.published(score) == 450.0


def test_mme_two_images_of_one_task(tmp_path):
    """Image 0 both right, image 1 one of two: 100 x 3/4 + 100 x 1/2."""
    release = [(("count", image, q), (q, label)) for image in "01" for q, label in (("a", "Yes"), ("b", "No"))]
    answers = [(("count", "0", "a"), "yes"), (("count", "0", "b"), "no"), (("count", "1", "a"), "no")]
    full = mme.score([*answers, (("count", "1", "b"), "no")], release, Path("F"))
    assert full["perception"] == 125.0
    part = mme.score(answers, release, Path("F"), partial=True)
    assert part["perception"] == pytest.approx(100 * 2 / 3 + 100), "half an image counts for its answers alone"


def test_mme_writes_what_the_official_tool_reads(made, tmp_path):
    benchmark, samples, rows = made("mme")
    score = benchmark.finish(samples, answered(rows, _4="Yes\nor\tno"), tmp_path)
    lines = (Path(score["answers"]) / "code_reasoning.txt").read_text().splitlines()
    assert lines[0].split("\t") == [
        "0002.txt", "Is there a shape?  Please answer yes or no.", "Yes", "Yes or no",
    ]  # fmt: skip
    assert {path.stem for path in Path(score["answers"]).iterdir()} == set(score["per_task"])


@pytest.mark.parametrize(
    "text, index, lenient",
    [
        # The letter and nothing else.
        ("B", 1, 1), (" B ", -1, 1), ("b", -1, -1), ("C", -1, -1), ("E", -1, -1), ("", -1, -1), ("AB", -1, -1),
        # Letter, period, blank at the start; a line break is no blank.
        ("B. blue", 1, 1), ("B. ", 1, 1), ("B.", -1, 1), ("B.\nblue", -1, 1), ("C. red", -1, -1), (" B. blue", -1, 1),
        ("A\nbecause", -1, -1), ("B) blue", -1, 1), ("(B)", -1, 1), ("A dog", -1, -1),
        # Exactly one "The answer is X", with any character behind.
        ("The answer is B.", 1, 1), ("The answer is B", -1, 1), ("The answer is B, since A is red", 1, 1),
        ("The answer is B because", 1, 1), ("The answer is Blue", 1, 1), ("The answer is B\n", -1, 1),
        ("The answer is B. The answer is A.", -1, 1), ("The answer is B. The answer is A", 1, 1),
        ("The answer is C.", -1, -1), ("The answer is C. The answer is B.", -1, -1), ("the answer is B.", -1, -1),
        ("Blue", -1, -1), ("A. red. The answer is B.", 0, 0),
    ],
)  # fmt: skip
def test_sqa_reads_an_answer(text, index, lenient):
    """Two choices. The rule is that of LLaVA's eval_science_qa.py; the lenient one is where that finds nothing."""
    assert sqa.chosen(text, 2) == index
    assert sqa.picked(text, 2) == lenient


def test_sqa_counts_the_image_questions(made, tmp_path):
    benchmark, samples, rows = made("sqa")
    score = benchmark.finish(samples, answered(rows, _0="B", _2="A. red", _3="B.", _5="no idea"), tmp_path)
    assert score == {
        "image_accuracy": 4 / 6,
        "lenient_image_accuracy": 5 / 6,
        "accuracy": 5 / 8,
        "lenient_accuracy": 6 / 8,
        "questions": 8,
        "questions_with_image": 6,
    }
    assert benchmark.published(score) == pytest.approx(100 * 4 / 6)


@pytest.mark.parametrize(
    "text, letter",
    [
        ("B", "B"), (" b", None), ("B.", "B"), ("(B)", "B"), ("B) red", "B"), ("B: red", "B"), ("A dog", None),
        ("Both", None), ("E", None), ("", None), ("The answer is B", None), ("B,", "B"),
    ],
)  # fmt: skip
def test_option_letter(text, letter):
    assert option_letter(text, "ABCD") == letter


def test_mmbench_wants_every_rotation_right(made, tmp_path):
    benchmark, samples, rows = made("mmbench")
    score = benchmark.finish(samples, answered(rows, _3="E"), tmp_path)
    assert score["accuracy"] == 3 / 4 and score["single_pass_accuracy"] == 7 / 8
    assert score["per_category"] == {"colour": 1.0, "place": 0.5} and score["questions"] == 4


def test_mmbench_groups_by_index_modulo_a_million():
    table = [{"index": i, "answer": "A"} for i in (5, 1000005, 2000005, 6)]
    answers = [(6, "A"), (2000005, "B"), (5, "A"), (1000005, "A")]
    assert mmbench.score(answers, table, Path("F"))["accuracy"] == 0.5


def test_mmbench_reads_images_that_are_another_rows_index(made, tmp_path):
    benchmark, samples, _ = made("mmbench")
    rows = mmbench.read_table(benchmark.question_file)
    text = benchmark.question_file.read_text().replace(rows[0]["image"], "241")
    benchmark.question_file.write_text(text.replace("241", rows[0]["image"], 2).replace(rows[0]["image"], "241", 1))
    assert [sample.image for sample in benchmark.read()] == [sample.image for sample in samples]


def rewritten(path, change, prefix=""):
    """Change the rows of an MMBench table with change(row), and write `prefix` before it."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    for row in rows:
        change(row)
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(prefix)
        table = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        table.writeheader()
        table.writerows(rows)


@pytest.mark.parametrize("name, split", [("mmbench", "dev"), ("mmbench_cn", "test")])
def test_mmbench_reads_a_table_with_a_byte_order_mark(made, name, split):
    benchmark, samples, _ = made(name, split)
    rewritten(benchmark.question_file, lambda row: None, prefix="\ufeff")
    assert benchmark.load() == samples


@pytest.mark.parametrize("cell", ["None", "none", "nan", "N/A", "null"])
def test_mmbench_asks_a_question_that_is_a_word_for_missing(made, cell):
    benchmark, _, _ = made("mmbench")
    rewritten(benchmark.question_file, lambda row: row.update(question=cell, hint=""))
    assert [sample.text.split("\n")[0] for sample in benchmark.load()] == [cell] * 8


@pytest.mark.parametrize(
    "cell, missing",
    [
        ("", True), ("nan", True), ("NaN", True), ("NAN", True), ("None", True), ("none", True), ("N/A", True),
        ("n/a", True), ("NA", True), ("null", True), ("NULL", True), ("#N/A", True), ("<NA>", True), ("-nan", True),
        ("Null", False), ("n/A", False), ("na", False), ("N/A.", False), ("None of these", False), ("0", False),
    ],
)  # fmt: skip
def test_mmbench_cells_are_missing_as_pandas_and_llava_have_them(made, cell, missing):
    benchmark, _, _ = made("mmbench")
    rewritten(benchmark.question_file, lambda row: row.update(hint=cell, C=cell, D="more", category=cell))
    (first, *_) = benchmark.load()
    lines = first.text.split("\n")
    options = ["A. red", "B. blue"] + ([] if missing else [f"C. {cell}", "D. more"])
    assert lines == ([] if missing else [cell]) + ["What colour is the shape?", *options]
    assert ("category" in first.row) is not missing


@pytest.mark.parametrize("cell", ["null", "N/A", "None", "77"])
def test_mmbench_without_an_image_is_one_sentence(made, cell):
    benchmark, _, _ = made("mmbench")
    rewritten(benchmark.question_file, lambda row: row.update(image=cell))
    with pytest.raises(
        UserError, match="row 1 of 8: lacks image|index 241: its image is that of index 77, which is not"
    ):
        benchmark.load()


def test_seed(made, tmp_path):
    benchmark, samples, rows = made("seed")
    texts = {"_0": "B", "_1": "B.", "_2": "red", "_3": "B. blue", "_4": "The answer is A", "_5": "b"}
    score = benchmark.finish(samples, answered(rows, **texts), tmp_path)
    assert score["accuracy"] == 2 / 8, "LLaVA compares the whole answer with the letter"
    assert score["lenient_accuracy"] == 5 / 8
    assert score["per_type"] == {"Scene Understanding": 1 / 4, "Instance Identity": 1 / 4}


# ------------------------------------------------------------------------------------------------- upload files
CHECKPOINT = EvalCheckpoint("some/llava-x", Path("nowhere"), {})


@pytest.mark.parametrize(
    "name, split, upload, content",
    [
        ("vizwiz", "test", "vizwiz/answers_upload/llava-x/RUN.json", {"image": "VizWiz_test_00000001.jpg", "answer": "2"}),
        ("mmvet", "test", "mm-vet/results/llava-x/RUN.json", None),
    ],
)  # fmt: skip
def test_upload_files(made, tmp_path, name, split, upload, content):
    _, samples, rows = made(name, split)
    benchmark = BENCHMARKS[name](tmp_path / "data", CHECKPOINT, split)
    score = benchmark.finish(samples, answered(rows, _1="Two."), tmp_path / "RUN")
    assert Path(score["upload"]) == tmp_path / "data" / upload and benchmark.published(score) is None
    written = json.loads(Path(score["upload"]).read_text())
    if content:
        assert written[1] == content and len(written) == 8
    else:
        assert written["v1_1"] == "Two." and len(written) == 8, "MM-Vet's answers stay as they are"


@pytest.mark.parametrize("name, split", [("mmbench", "dev"), ("mmbench", "test"), ("mmbench_cn", "test")])
def test_mmbench_upload(made, tmp_path, name, split):
    openpyxl = pytest.importorskip("openpyxl", reason="MMBench's upload is an .xlsx file")
    _, samples, rows = made(name, split)
    benchmark = BENCHMARKS[name](tmp_path / "data", CHECKPOINT, split)
    score = benchmark.finish(samples, rows, tmp_path / "RUN")
    assert Path(score["upload"]).parent.parent.name == benchmark.question_file.stem
    table = list(openpyxl.load_workbook(score["upload"]).active.values)
    head = ("index", "question", "A", "B", "prediction", "answer", "split")
    assert table[0] == (head if split == "dev" else tuple(name for name in head if name != "answer"))
    assert len(table) == 9 and table[4][:5] == (1000242, "How many shapes are there?", "blue", "red", "A")


# ------------------------------------------------------------------------------------------- keys, never the order
@pytest.mark.parametrize("name, split", SCORED)
def test_order_does_not_matter(made, tmp_path, name, split):
    benchmark, samples, rows = made(name, split)
    rows = answered(rows, _1="yes", _4="no", _6="B")
    score = benchmark.finish(samples, rows, tmp_path)
    for seed in range(5):
        order = random.Random(seed).sample(range(len(rows)), len(rows))
        again = benchmark.finish([samples[i] for i in order], [rows[i] for i in order], tmp_path)
        assert again == score


@pytest.mark.parametrize("name, split", SCORED)
def test_a_gap_is_an_error_unless_the_run_is_a_part(made, tmp_path, name, split):
    benchmark, samples, rows = made(name, split)
    if not name.startswith("mmbench"):  # its questions and annotations are one file
        with pytest.raises(UserError, match=r"2 of its \d questions have no answer"):
            benchmark.finish(samples[2:], rows[2:], tmp_path)
    benchmark.partial = "6 of 8"
    score = benchmark.finish(samples[2:], rows[2:], tmp_path)
    assert score["partial"] == "6 of 8"
    best = {"mme": 400}.get(name, 100)
    assert benchmark.published(score) == pytest.approx(best), "scored on its own keys"


@pytest.mark.parametrize("name, split", SCORED)
def test_a_duplicate_is_an_error(made, tmp_path, name, split):
    benchmark, samples, rows = made(name, split)
    with pytest.raises(UserError, match="1 (questions have several|of 8 answered questions)"):
        benchmark.finish([*samples, samples[0]], [*rows, rows[0]], tmp_path)


def test_the_first_few_questions_are_a_part(made, tmp_path):
    benchmark, _, rows = made("gqa")
    samples = benchmark.load(limit=3)
    assert benchmark.finish(samples, rows[:3], tmp_path)["partial"] == "the first 3 of 8 questions"
    benchmark.load(limit=8)


@pytest.mark.parametrize("name, split", SPLITS)
def test_groups(made, name, split):
    benchmark, samples, _ = made(name, split)
    paired = name == "mme" or name.startswith("mmbench")
    assert len({benchmark.group(sample) for sample in samples}) == (4 if paired else 8)


# --------------------------------------------------------------------------- labels that do not match the questions
def edited(path, change):
    """Replace the content of a JSON or .jsonl file by change(content); a .jsonl file is a list of rows."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl" or path.parent.name == "coco":
        write_rows(path, change([json.loads(line) for line in text.splitlines()]))
    else:
        write_json(path, change(json.loads(text)))


def without(key, place=None):
    """For `edited`: the content without entry `key` (of the list under `place`)."""

    def change(content):
        entries = content if place is None else content[place]
        del entries[key]
        return content

    return change


def drop_label(name, data):
    """Take away the label of question 1 of the question file."""
    path = data / ANNOTATIONS[name]
    if name == "pope":  # the first of the popular ones
        edited(path.with_name("coco_pope_popular.json"), without(0))
    elif name == "mme":
        path.write_text(path.read_text().splitlines(keepends=True)[0])
    elif name.startswith("mmbench"):
        rewritten(path, lambda row: row.update(answer="" if row["index"] == "1000241" else row["answer"]))
    elif name == "vizwiz":
        edited(path, lambda rows: [rows[0], {k: v for k, v in rows[1].items() if k != "answers"}, *rows[2:]])
    else:
        place = {"vqav2": "annotations", "textvqa": "data", "seed": "questions"}.get(name)
        edited(path, without({"gqa": "20000001", "sqa": "11"}.get(name, 1), place))


@pytest.mark.parametrize("name, split", SCORED)
def test_questions_without_a_label_are_found_before_the_first_question(made, tmp_path, name, split):
    benchmark, _, rows = made(name, split)
    drop_label(name, tmp_path / "data")
    with pytest.raises(UserError, match="has no label for 1 of 8 questions .*; --partial scores"):
        benchmark.load()
    samples = benchmark.load(partial=True)
    assert len(samples) == 8 and benchmark.partial is None, "all are asked"
    scored = benchmark.scorable(samples, partial=True)
    kept = [row for sample, row in zip(samples, rows, strict=True) if sample in scored]
    score = benchmark.finish(scored, kept, tmp_path)
    left = 6 if name.startswith("mm") else 7  # whole groups: rotations, pairs
    assert len(scored) == left and score["partial"] == f"{left} questions with a label, out of 8 questions"
    assert benchmark.published(score) == pytest.approx({"mme": 400}.get(name, 100))


@pytest.mark.parametrize(
    "name, split", [entry for entry in SCORED if entry[0] not in ("vizwiz", "mmbench", "mmbench_cn")]
)
def test_labels_without_a_question_are_found_before_the_first_question(made, tmp_path, name, split):
    """The others have questions and labels in one file."""
    benchmark, _, rows = made(name, split)
    edited(benchmark.question_file, without(1, "questions" if name == "vqav2" else None))
    with pytest.raises(UserError, match="has 1 labels of questions that are not asked .*; --partial scores"):
        benchmark.load()
    scored = benchmark.scorable(benchmark.load(partial=True), partial=True)
    score = benchmark.finish(scored, [rows[0], *rows[2:]], tmp_path)
    assert score["partial"] == "7 of the 8 questions that have a label" and score["questions"] == 7
    benchmark = BENCHMARKS[name](tmp_path / "data", None, split)
    assert len(benchmark.load(limit=3)) == 3, "a part of the questions needs no part of the labels"


@pytest.mark.parametrize("name, split", SCORED)
def test_labels_of_another_data_set_are_refused_also_in_part(made, tmp_path, name, split):
    benchmark, _, _ = made(name, split)
    benchmark.annotations = lambda: (tmp_path / "labels", [(("nobody", "asks"), "yes")])
    for partial in (False, True):
        with pytest.raises(UserError, match="8 of 8 questions|none of the 8 questions"):
            benchmark.load(partial=partial)


UNUSABLE = {  # what no answer could be judged by: a label, and what is said about it
    "vqav2": (
        lambda d: d["annotations"][1].update(answers=[{"answer": "red"}]),
        "question 2001: its reference answers are",
    ),
    "gqa": (lambda d: d["20000001"].update(answer=2), '"answer" of question 20000001 is 2, allowed is a string'),
    "vizwiz": (lambda d: d[1].update(answers=[{"answer": 1}] * 10), "00000001.jpg: its reference answers are"),
    "sqa": (
        lambda d: d["11"].update(answer=2),
        'problem 11: "answer" is 2, allowed is the number of one of its "choices"',
    ),
    "textvqa": (lambda d: d["data"][1].update(answers="red"), "its reference answers are"),
    "pope": (lambda d: d[1].update(label="maybe"), "line 2: \"label\" is 'maybe', allowed are yes and no"),
    "seed": (
        lambda d: d["questions"][1].update(answer="E"),
        "\"answer\" of question 101001 is 'E', allowed are A, B, C, D",
    ),
}


@pytest.mark.parametrize("name, split", [entry for entry in SCORED if entry[0] in UNUSABLE])
def test_a_label_that_no_answer_can_be_judged_by_is_found_before_the_first_question(made, tmp_path, name, split):
    benchmark, _, _ = made(name, split)
    change, says = UNUSABLE[name]
    edited(tmp_path / "data" / ANNOTATIONS[name], lambda content: change(content) or content)
    for partial in (False, True):
        with pytest.raises(UserError, match=re.escape(says)):
            benchmark.load(partial=partial)


def test_an_answer_of_mmbench_that_is_none_of_its_options_is_found_before_the_first_question(made):
    benchmark, _, _ = made("mmbench")
    rewritten(benchmark.question_file, lambda row: row.update(answer="C"))
    with pytest.raises(UserError, match="index 241: \"answer\" is 'C', allowed is one of its options"):
        benchmark.load()


def test_labels_that_contradict_each_other_are_found_before_the_first_question(made):
    benchmark, samples, _ = made("pope")
    path = benchmark.folder / "coco" / "coco_pope_random.json"
    edited(path, lambda rows: [*rows, {**rows[0], "label": "no" if rows[0]["label"] == "yes" else "yes"}])
    edited(benchmark.question_file, lambda rows: [*rows, {**rows[2], "question_id": 99}])
    with pytest.raises(UserError, match="has different labels for one question"):
        benchmark.load()


# ------------------------------------------------------------------------------------------------------ bad files
ANNOTATIONS = {
    "vqav2": "vqav2/v2_mscoco_val2014_annotations.json",
    "gqa": "gqa/data/testdev_balanced_questions.json",
    "vizwiz": "vizwiz/val.json",
    "sqa": "scienceqa/problems.json",
    "textvqa": "textvqa/TextVQA_0.5.1_val.json",
    "pope": "pope/coco/coco_pope_random.json",
    "mme": "MME/MME_Benchmark_release_version/existence/0000.txt",
    "mmbench": "mmbench/mmbench_dev_20230712.tsv",
    "mmbench_cn": "mmbench/mmbench_dev_cn_20231003.tsv",
    "seed": "seed_bench/SEED-Bench.json",
}


@pytest.mark.parametrize("name, split", SCORED)
def test_a_truncated_annotation_is_one_sentence(made, tmp_path, name, split):
    benchmark, samples, rows = made(name, split)
    path = tmp_path / "data" / ANNOTATIONS[name]
    whole = path.read_bytes()
    for keep in (0.5, 0.9):
        path.write_bytes(whole[: int(len(whole) * keep)])
        with pytest.raises(UserError) as error:
            benchmark.finish(benchmark.read(), rows, tmp_path)
        assert path.stem in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name, split", [entry for entry in SCORED if "mm" not in entry[0]])
def test_an_annotation_file_of_something_else_is_one_sentence(made, tmp_path, name, split):
    benchmark, samples, rows = made(name, split)
    path = tmp_path / "data" / ANNOTATIONS[name]
    for content in ({"a": [1]}, [{"a": 1}], [3], {"data": [{}], "questions": [{}], "annotations": [{}]}):
        write_json(path, content)
        with pytest.raises(UserError) as error:
            benchmark.finish(samples, rows, tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, split", SPLITS)
def test_missing_files_come_with_the_download_page(tmp_path, name, split):
    make_benchmark(name, tmp_path)
    benchmark = BENCHMARKS[name](tmp_path, None, split)
    for path in {benchmark.question_file, *benchmark.annotation_files()}:
        aside = path.rename(path.with_name("aside"))
        with pytest.raises(UserError) as error:
            benchmark.load()
        assert str(path) in str(error.value) and benchmark.download_page in str(error.value)
        aside.rename(path)
    benchmark.load()


@pytest.mark.parametrize("name, split", [entry for entry in SPLITS if "mmbench" not in entry[0]])
def test_a_wrong_image_root_is_one_sentence(tmp_path, name, split):
    make_benchmark(name, tmp_path)
    benchmark = BENCHMARKS[name](tmp_path, None, split)
    folder = benchmark.image_folder / ("SEED-Bench-image" if name == "seed" else "")
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix != ".txt":
            path.unlink()
    with pytest.raises(UserError, match=r"image \".*\" is not in "):
        benchmark.load()


def test_unknown_split(tmp_path):
    with pytest.raises(UserError, match='benchmark vizwiz has no split "dev", allowed are test, val'):
        BENCHMARKS["vizwiz"](tmp_path, None, "dev")


def test_a_category_that_pope_does_not_have(made):
    benchmark, samples, _ = made("pope")
    write_rows(benchmark.question_file, [{**sample.row, "category": "easy"} for sample in samples])
    with pytest.raises(UserError, match="line 1: \"category\" is 'easy', allowed are adversarial, popular, random"):
        benchmark.read()


def test_mmbench_test_has_no_local_score(made, tmp_path):
    benchmark, samples, rows = made("mmbench", "test")
    assert set(benchmark.finish(samples, rows, tmp_path)) == {"upload", "answered"}
    with pytest.raises(UserError, match="8 of 8 rows have no answer, so this split is the server's"):
        mmbench.score([(1, "A")], [sample.row for sample in samples], Path("F"))


# ---------------------------------------------------------------------------------------------- files of answers
@pytest.fixture
def file_of(made, tmp_path):
    def write(name, split=None):
        benchmark, samples, rows = made(name, split)
        path = tmp_path / "answers.jsonl"
        write_rows(path, rows)
        return benchmark, rows, path

    return write


@pytest.mark.parametrize("name, split", SCORED)
def test_a_file_of_answers_scores_like_its_run(file_of, tmp_path, name, split):
    benchmark, rows, path = file_of(name, split)
    whole = score_file(benchmark, path)
    assert without_paths(whole) == without_paths(benchmark.finish(benchmark.read(), rows, tmp_path))
    write_rows(path, rows[::-1])
    assert score_file(benchmark, path) == whole, "order"
    write_rows(path, [*rows, rows[2]])
    with pytest.raises(UserError, match="answers.jsonl: 1 answers are to questions that are answered already"):
        score_file(benchmark, path)
    write_rows(path, rows[:6])
    with pytest.raises(UserError, match=r"2 of 8 questions have no answer \(--partial scores the others\)"):
        score_file(benchmark, path)
    assert score_file(benchmark, path, partial=True)["partial"] == "6 of 8 questions"


def test_an_answer_file_is_scored_in_part_where_questions_and_labels_differ(file_of):
    benchmark, rows, path = file_of("gqa")
    edited(benchmark.labels, without("20000003"))
    edited(benchmark.question_file, without(5))
    write_rows(path, [*rows[:5], *rows[6:]])
    with pytest.raises(
        UserError, match="has no label for 1 of 7 questions .* and has 1 labels of questions that are not"
    ):
        score_file(benchmark, path)
    score = score_file(benchmark, path, partial=True)
    assert score["partial"] == "6 questions with a label, out of 7 questions" and score["questions"] == 6
    edited(benchmark.labels, lambda labels: {"20000003": labels["20000002"], **labels})
    benchmark = BENCHMARKS["gqa"](benchmark.data_root, None)
    score = score_file(benchmark, path, partial=True)
    assert score["partial"] == "7 of the 8 questions that have a label" and score["questions"] == 7


@pytest.mark.parametrize("name, split", SCORED)
def test_an_answer_file_of_another_run_is_told(file_of, name, split):
    benchmark, rows, path = file_of(name, split)
    write_rows(path, [{**row, "prompt": "Something else?"} for row in rows])
    with pytest.raises(UserError, match="8 of 8 answers are to none of these 8 questions"):
        score_file(benchmark, path, partial=True)
    write_rows(path, [{**row, "question_id": f"x{row['question_id']}"} for row in rows[:3]] + rows[3:])
    with pytest.raises(UserError, match="3 of 8 answers are to none of these 8 questions"):
        score_file(benchmark, path)


def test_answer_files_of_llavas_scripts(file_of, tmp_path):
    """Some of them keep <image> in the prompt, or leave the instruction out."""
    benchmark, rows, path = file_of("sqa")
    texts = [sample.text for sample in benchmark.read()]
    write_rows(path, [{**row, "prompt": f"<image>\n{text}"} for row, text in zip(rows, texts, strict=True)])
    assert score_file(benchmark, path)["accuracy"] == 1.0
    path.write_text(path.read_text()[:-5])
    with pytest.raises(UserError, match="answers.jsonl, line 8: is no JSON"):
        score_file(benchmark, path)
    write_rows(path, [{"question_id": 1}])
    with pytest.raises(UserError, match='line 1: has no "question_id" and "text"'):
        score_file(benchmark, path)
