"""ScienceQA-IMG (arXiv 2209.09513): multiple choice; accuracy on the test questions that have an image.

Files in scienceqa/: LLaVA's questions (llava_test_CQM-A.json), the official problems.json and pid_splits.json, and the
images (images/test/<id>/image.png). Questions without image are asked too, as text only. Answers are joined by problem
id.
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
from llava.eval.scoring.annotations import OPTION_LETTER, told_when_malformed
from llava.eval.scoring.match_answers import join, mean
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
    """Return the number of the option that an answer picks, or -1.

    choices: number of options. The rules are those of LLaVA's eval_science_qa: the letter alone, "B. ..." at the start,
    or "The answer is B".
    """
    # A line break ends a sentence, so that "B\nbecause ..." is read as "B. because ...".
    text = text.replace("\n", ". ")
    if text.strip() and text.strip() in LETTERS and len(text.strip()) == 1:
        letter = text.strip()
    elif re.match(rf"[{LETTERS}]\. ", text):
        letter = text[0]
    else:
        found = re.search(rf"The answer is ([{LETTERS}])\.", text) or re.search(rf"The answer is ([{LETTERS}])", text)
        if not found:
            return -1
        letter = found[1]
    index = LETTERS.index(letter)
    return index if index < choices else -1


def read_problems(folder: Path, split: str) -> dict[str, dict]:
    """Return id -> problem for one split. Raises UserError if problems.json lacks one."""
    problems, splits = (read_json(folder / name) for name in ("problems.json", "pid_splits.json"))
    with told_when_malformed(folder / "pid_splits.json"):
        ids = [str(key) for key in splits[split]]
        missing = [key for key in ids if key not in problems]
    if missing:
        raise UserError(
            f"{folder / 'problems.json'}: lacks {len(missing)} of the {len(ids)} problems of split {split} "
            f"(the first: {missing[0]})"
        )
    return {key: problems[key] for key in ids}


def judge(answers: list[tuple], folder: Path, split: str = "test", partial: bool = False) -> list[Verdict]:
    """Return the verdicts of (id, (answer, asked with an image)) pairs. Only those with an image have terms.

    folder: has problems.json and pid_splits.json. Raises UserError as `join` does.
    """
    source = folder / "problems.json"
    joined = join(answers, read_problems(folder, split).items(), source, partial)
    verdicts = []
    with told_when_malformed(source):
        for [(text, image)], [problem] in joined.values():
            choices, answer = problem["choices"], problem["answer"]
            value, expected = chosen(text, len(choices)) == answer, f"{LETTERS[answer]}. {choices[answer]}"
            kinds = [problem.get("subject"), "with image" if image else "without image"]
            verdict = Verdict.plain(value, expected, kinds)
            verdicts.append(verdict if image else replace(verdict, terms=()))
    return verdicts


def score(answers: list[tuple], folder: Path, split: str = "test", partial: bool = False) -> dict:
    """Return the accuracy of (id, (answer, asked with an image)) pairs: on those with an image, and on all."""
    verdicts = judge(answers, folder, split, partial)
    every = [verdict.value for verdict in verdicts]
    with_image = [verdict.value for verdict in verdicts if verdict.terms]
    images = {"image_accuracy": mean(with_image)} if with_image else {}
    return {**images, "accuracy": mean(every), "questions": len(every), "questions_with_image": len(with_image)}
