"""The demo task: determinism, disjoint splits, true answers, the question file, no torch on import."""

import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from llava.common.errors import UserError
from llava.shapes.dataset import main as dataset_main
from llava.shapes.dataset import scene_questions, write_dataset
from llava.shapes.questions import ask_some
from llava.shapes.scenes import FAMILIES, SPLITS, draw_scene, scene_rng
from llava.shapes.tokenizer import build_tokenizer, save_tokenizer, vocabulary
from llava.shapes.vocabulary import (
    COLOR_NAMES,
    PLURALS,
    PRACTICE_TYPES,
    QUESTION_TYPES,
    SHORT_ANSWER,
    SYSTEM,
    category_of,
)

SINGULAR = {plural: kind for kind, plural in PLURALS.items()}


def test_importing_the_generator_imports_no_torch():
    code = "import sys, llava.shapes.dataset, llava.shapes.tokenizer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_key_gives_the_same_picture_and_questions(family):
    first, questions = scene_questions(family, "test", 7, 1)
    again, same = scene_questions(family, "test", 7, 1)
    assert np.array_equal(first.pixels, again.pixels) and first.objects == again.objects
    assert questions == same


def test_splits_and_sets_share_no_scene():
    keys = [(f, s, n) for f in FAMILIES for s in SPLITS for n in range(3)]
    states = [
        tuple(scene_rng(f, s, index, n, stream).integers(0, 2**62, 4))
        for f, s, n in keys
        for index in range(60)
        for stream in (0, 1)
    ]
    assert len(set(states)) == len(states)


def answer_by_hand(scene, text):
    """The answer from the list of objects, read off the question's words."""
    words = text.lower().rstrip("?").split()
    if text.startswith("What color"):
        colors = [p.color for p in scene.objects if p.kind == words[-1]]
        assert len(colors) == 1
        return colors[0]
    if text.startswith("Is there"):
        return "yes" if any((p.color, p.kind) == tuple(words[-2:]) for p in scene.objects) else "no"
    if text.startswith("How many"):
        return str(sum(p.kind == SINGULAR[words[2]] for p in scene.objects))
    found = []
    for p in scene.objects:
        x, y = p.left + p.size / 2, p.top + p.size / 2
        place = ["top" if y < scene.size[1] / 2 else "bottom", "left" if x < scene.size[0] / 2 else "right"]
        if place == words[-2:] and category_of(p.kind) == words[1]:
            found.append(p.kind)
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_follow_from_the_objects(family):
    counts, existence = Counter(), Counter()
    for index in range(80):
        scene = draw_scene(family, "train", index)
        assert 3 <= len(scene.objects) <= 6
        assert all(
            p.left >= 0 and p.left + p.size <= scene.size[0] and p.top >= 0 and p.top + p.size <= scene.size[1]
            for p in scene.objects
        )
        for question in ask_some(scene, scene_rng(family, "train", index, stream=1), 8):
            assert question.answer == answer_by_hand(scene, question.text), question
            counts[question.category] += 1
            if question.category == "exists":
                existence[question.answer] += 1
    assert set(counts) == set(QUESTION_TYPES)
    assert 0.35 < existence["yes"] / sum(existence.values()) < 0.65


def practice_by_hand(scene, question):
    """The same for the questions that are asked in training alone."""
    words = question.text.lower().rstrip("?").split()
    if question.category == "named":
        found = [p.kind for p in scene.objects if category_of(p.kind) == words[1] and p.color == words[3]]
        assert len(found) == 1
        return found[0]
    if question.category == "some":
        return "yes" if any((p.color, category_of(p.kind)) == tuple(words[-2:]) for p in scene.objects) else "no"
    if question.category == "tally":
        return str(sum(p.color == words[2] for p in scene.objects))
    kind = SINGULAR.get(words[3], words[3])
    return str(sum((p.color, p.kind) == (words[2], kind) for p in scene.objects))


def test_practice_answers_follow_from_the_objects_and_use_known_words():
    seen, tokenizer = Counter(), build_tokenizer()
    for index in range(60):
        scene = draw_scene("v1.5", "train", index)
        weights = (0, 0, 0, 0, 1, 1, 1, 1)
        for question in ask_some(scene, scene_rng("v1.5", "train", index, stream=1), 8, weights):
            if question.category in PRACTICE_TYPES:
                assert question.answer == practice_by_hand(scene, question), question
                assert tokenizer.token_to_id("<unk>") not in tokenizer.encode(question.text).ids
                seen[question.category, question.answer] += 1
    assert {category for category, _ in seen} == set(PRACTICE_TYPES)
    assert seen["pairs", "0"] and seen["pairs", "1"] and seen["some", "yes"] and seen["some", "no"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_object_is_drawn_where_it_is_said_to_be(family):
    for index in range(20):
        scene = draw_scene(family, "test", index)
        for number, placed in enumerate(scene.objects):
            rows, columns = np.nonzero(scene.owner == number)
            assert len(rows) >= 0.12 * placed.size**2  # a 1 is thin
            assert placed.top <= rows.min() and rows.max() < placed.top + placed.size
            assert placed.left <= columns.min() and columns.max() < placed.left + placed.size


def test_pictures_of_v16_need_every_grid():
    shapes = [draw_scene("v1.6", "test", index).size for index in range(60)]
    assert all(max(size) <= 288 and min(size) >= 82 for size in shapes)
    assert len({(w > 1.5 * h, h > 1.5 * w, max(w, h) > 200) for w, h in shapes}) == 5


def test_tokenizer_knows_every_word_and_gives_them_back(tmp_path):
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(f"{SYSTEM} USER: ").input_ids
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    text = tokenizer(f"\nWhat color is the 3?\n{SHORT_ANSWER} ASSISTANT: orange</s>").input_ids
    assert tokenizer.unk_token_id not in ids + text
    assert text[1] == vocabulary()["\n"] and text[-1] == tokenizer.eos_token_id
    for word in (*COLOR_NAMES, "yes", "no", "7", "k", "triangle"):
        assert tokenizer.decode([vocabulary()[word]], skip_special_tokens=True) == word
    for family in FAMILIES:
        for index in range(40):
            for question in scene_questions(family, "test", index)[1]:
                assert build_tokenizer().token_to_id("<unk>") not in tokenizer(question.text).input_ids
                assert question.answer in vocabulary()


def test_question_files_have_llavas_layout_and_are_written_once(tmp_path):
    out = write_dataset("v1.6", "test", 10, tmp_path / "a")
    questions = [json.loads(line) for line in (out / "questions.jsonl").read_text().splitlines()]
    labels = [json.loads(line) for line in (out / "labels.jsonl").read_text().splitlines()]
    assert [q["question_id"] for q in questions] == [label["question_id"] for label in labels] == list(range(1, 11))
    assert all(set(q) == {"question_id", "image", "text", "category"} for q in questions)
    assert all(set(label) == {"question_id", "answer", "category"} for label in labels)
    scene = draw_scene("v1.6", "test", 2)
    assert np.array_equal(np.asarray(Image.open(out / "images" / questions[9]["image"])), scene.pixels)
    assert answer_by_hand(scene, questions[9]["text"]) == labels[9]["answer"]
    before = (out / "images" / "000001.png").stat().st_mtime_ns
    write_dataset("v1.6", "test", 10, out)
    assert (out / "images" / "000001.png").stat().st_mtime_ns == before
    # Another number of questions replaces what is there, and nothing of the old set stays.
    write_dataset("v1.6", "test", 4, out)
    assert len(list((out / "images").iterdir())) == 1


def test_many_scenes_are_written_the_same_way_as_few(tmp_path):
    many = write_dataset("v1.5", "validation", 260, tmp_path / "many")
    few = write_dataset("v1.5", "validation", 20, tmp_path / "few")
    many_lines = (many / "questions.jsonl").read_text().splitlines()
    assert many_lines[:20] == (few / "questions.jsonl").read_text().splitlines()
    assert len(many_lines) == 260


@pytest.mark.parametrize(
    "wrong", [{"family": "v2"}, {"split": "dev"}, {"questions": 0}, {"questions": "x"}, {"seed_set": 3}]
)
def test_bad_arguments_are_refused(tmp_path, wrong):
    arguments = {"family": "v1.5", "split": "test", "questions": 4, "out": tmp_path / "x", "seed_set": 0, **wrong}
    with pytest.raises(UserError, match="allowed"):
        write_dataset(**arguments)


def test_the_command_ends_with_a_sentence_and_code_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        dataset_main(["--questions", "abc", "--out", str(tmp_path / "x")])
    assert stopped.value.code == 2
    assert "whole number" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stopped:
        dataset_main(["--questions", "4", "--out", str(tmp_path / "file")])
    assert stopped.value.code == 2
