"""ScienceQA-IMG (arXiv 2209.09513): multiple choice; accuracy on the test questions that have an image.

Files below scienceqa/: LLaVA's questions (llava_test_CQM-A.json), the official problems.json and pid_splits.json, and the
images (images/test/<id>/image.png). The questions without image are asked too, as text alone. Joined by problem id.
Answers are read by the rule of LLaVA's eval_science_qa; a more lenient reading stands beside it.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from llava.common.errors import UserError
from llava.common.files import read_json
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.eval.benchmarks.base import Benchmark
from llava.eval.benchmarks.questions import Sample, make_samples, refuse_repeated_ids
from llava.eval.scoring.annotations import OPTION_LETTER, kind_of, told_when_malformed
from llava.eval.scoring.match_answers import join, mean
from llava.eval.scoring.multiple_choice import lenient_letter
from llava.eval.scoring.verdicts import Verdict

LETTERS = "ABCDE"


class ScienceQA(Benchmark):
    """ScienceQA. The headline is the accuracy on questions with an image."""

    name = "sqa"
    headline = "image_accuracy"
    max_new_tokens = 1024  # LLaVA's model_vqa_science
    download_page = "https://github.com/haotian-liu/LLaVA/blob/main/docs/Evaluation.md#scienceqa"

    @property
    def folder(self) -> Path:
        return self.data_root / "scienceqa"

    @property
    def question_file(self) -> Path:
        return self.folder / "llava_test_CQM-A.json"

    @property
    def image_folder(self) -> Path:
        return self.folder / "images" / "test"

    def annotation_files(self) -> list[Path]:
        return [self.folder / "problems.json", self.folder / "pid_splits.json"]

    def prompt(self, row: dict) -> str:
        return row["text"] + OPTION_LETTER

    def read(self) -> list[Sample]:
        """Return the samples of LLaVA's file, which is a list of conversations."""
        # The first turn has context, question and options. The second turn, which is not read, has the answer.
        with told_when_malformed(self.question_file):
            rows = []
            for entry in read_json(self.question_file):
                value = entry["conversations"][0]["value"].replace(DEFAULT_IMAGE_TOKEN, "").strip()
                image = {"image": entry["image"]} if entry.get("image") else {}
                rows.append({"question_id": entry["id"], "text": value, **image})
        samples = make_samples(list(enumerate(rows, 1)), self.question_file, self.prompt, unit="entry")
        refuse_repeated_ids(samples, self.question_file)
        return samples

    def annotations(self) -> tuple[Path, list[tuple]]:
        return self.folder / "problems.json", list(read_problems(self.folder, self.split).items())

    def key(self, sample: Sample) -> str:
        return str(sample.question_id)

    def score(self, samples: list[Sample], rows: list[dict], folder: Path) -> dict:
        return score(_answers(samples, rows), self.folder, self.split, bool(self.partial))

    def verdicts(self, samples: list[Sample], rows: list[dict], folder: Path) -> list[Verdict]:
        return judge(_answers(samples, rows), self.folder, self.split, bool(self.partial))


def _answers(samples: list[Sample], rows: list[dict]) -> list[tuple]:
    return [
        (str(sample.question_id), (row["text"], sample.image is not None))
        for sample, row in zip(samples, rows, strict=True)
    ]


def chosen(text: str, choices: int) -> int:
    """Return the index of the option that an answer picks by the rule of LLaVA's eval_science_qa; -1 for none.

    choices: the number of options. An answer picks an option if it is the letter alone, if it starts with the letter and
    ". ", or if it has exactly one "The answer is X" with any character but a line break behind it.
    """
    if text in tuple(LETTERS):
        letter = text
    elif text[:1] in tuple(LETTERS) and text[1:3] == ". ":
        letter = text[0]
    else:
        found = re.findall(r"The answer is ([A-Z]).", text)
        letter = found[0] if len(found) == 1 else ""
    return _index(letter, choices)


def _index(letter: str | None, choices: int) -> int:
    """Number of an option by its letter, -1 where it is none of `choices`."""
    return LETTERS[:choices].index(letter) if letter and letter in LETTERS[:choices] else -1


def picked(text: str, choices: int) -> int:
    """Return the option of `chosen`, or that of `lenient_letter` if `chosen` finds none."""
    option = chosen(text, choices)
    return option if option >= 0 else _index(lenient_letter(text, LETTERS), choices)


def read_problems(folder: Path, split: str) -> dict[str, dict]:
    """id -> problem, of those of one split that problems.json has."""
    source = folder / "problems.json"
    problems, splits = read_json(source), read_json(folder / "pid_splits.json")
    with told_when_malformed(folder / "pid_splits.json"):
        ids = [str(key) for key in splits[split]]
    with told_when_malformed(source):
        found = {key: problems[key] for key in ids if key in problems}
        for key, problem in found.items():
            _check(problem, f"{source}, problem {key}")
    return found


def _check(problem: dict, where: str) -> None:
    """UserError where no answer to the problem could be right."""
    answer, choices = problem["answer"], problem["choices"]
    kind_of(problem.get("subject"), where)
    if type(answer) is not int or not isinstance(choices, list) or not 0 <= answer < min(len(choices), len(LETTERS)):
        raise UserError(f'{where}: "answer" is {answer!r}, allowed is the number of one of its "choices", from 0 on')


def _joined(answers: list[tuple], folder: Path, split: str, partial: bool) -> list[tuple]:
    """(answer, asked with an image, problem) of (id, (answer, asked with an image)) pairs."""
    joined = join(answers, read_problems(folder, split).items(), folder / "problems.json", partial)
    return [(text, image, problem) for [(text, image)], [problem] in joined.values()]


def judge(answers: list[tuple], folder: Path, split: str = "test", partial: bool = False) -> list[Verdict]:
    """(id, (answer, asked with an image)) pairs against problems.json; only those with an image make the headline."""
    verdicts = []
    for text, image, problem in _joined(answers, folder, split, partial):
        choices, answer = problem["choices"], problem["answer"]
        kinds = [problem.get("subject"), "with image" if image else "without image"]
        verdict = Verdict.plain(chosen(text, len(choices)) == answer, f"{LETTERS[answer]}. {choices[answer]}", kinds)
        verdicts.append(verdict if image else replace(verdict, terms=()))
    return verdicts


def score(answers: list[tuple], folder: Path, split: str = "test", partial: bool = False) -> dict:
    """Accuracy of (id, (answer, asked with an image)) pairs against problems.json: with an image, and over all.

    "lenient": by the reading of `picked`, which published numbers do not use.
    """
    joined = _joined(answers, folder, split, partial)
    accuracies = {}
    for name, asked in (("image_", [entry for entry in joined if entry[1]]), ("", joined)):
        for rule, read in (("", chosen), ("lenient_", picked)):
            right = [read(text, len(problem["choices"])) == problem["answer"] for text, _, problem in asked]
            if right:
                accuracies[f"{rule}{name}accuracy"] = mean(right)
    return {**accuracies, "questions": len(joined), "questions_with_image": sum(image for _, image, _ in joined)}
