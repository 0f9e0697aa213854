"""What the shipped one-tile checkpoint must show, through the code that every checkpoint goes through.

Only wide margins are asserted. The demo flatters text guidance and says nothing about real data (model card).
"""

from pathlib import Path

import pytest

from llava.shapes.dataset import write_dataset
from llava.shapes.training.figures import Exam, agreement

CHECKPOINT = Path(__file__).resolve().parents[2] / "playground" / "llava-shapes-v1.5"
TOKENS = 14  # 10 % of 144


@pytest.fixture(scope="module")
def exam(tmp_path_factory):
    folder = write_dataset("v1.5", "test", 500, tmp_path_factory.mktemp("shapes"))
    exam = Exam(CHECKPOINT, folder)
    exam.folder = folder
    return exam


@pytest.fixture(scope="module")
def words(exam):
    """Its answers from all tokens."""
    return exam.answer()


def test_all_tokens(exam, words):
    assert exam.score(words)["all"] >= 0.90


def test_both_signals_beat_chance(exam):
    scores = [exam.score(exam.answer("random", TOKENS, seed=seed))["all"] for seed in range(3)]
    chance = sum(scores) / len(scores)
    assert exam.score(exam.answer("cls", TOKENS))["all"] - chance >= 0.15
    assert exam.score(exam.answer("t2i", TOKENS))["all"] - chance >= 0.25


def test_the_right_question_beats_a_wrong_one(exam):
    """What text guidance adds: the same selector reading another picture's question, the LLM always the right one."""
    assert all(mine != other for mine, other in zip(exam.names, exam.names[5:], strict=False))
    questions = (None, exam.other_questions())
    right, wrong = (exam.score(exam.answer("t2i", TOKENS, "original", texts=texts))["all"] for texts in questions)
    assert right - wrong >= 0.08


def test_generate_gives_these_answers(exam, words):
    """The shortened path above (one forward pass, pictures encoded once) answers as model.generate does."""
    assert agreement(exam, exam.folder / "images", words, 100) == 1.0
