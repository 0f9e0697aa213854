"""SEED-Bench (arXiv 2307.16125), image questions: accuracy of the option's letter, overall and by question type.

Files below seed_bench/: LLaVA's questions (llava-seed-bench.jsonl), the official SEED-Bench.json, and the images
(SEED-Bench-image). Questions about videos, which LLaVA's file holds too, are left out. Joined by question_id. As in
LLaVA, an answer is right where it is the letter and nothing else; a more lenient reading stands beside it.
"""

from __future__ import annotations

from pathlib import Path

from llava.common.errors import UserError
from llava.eval.benchmarks.base import Benchmark
from llava.eval.benchmarks.questions import Sample, refuse_repeated_ids
from llava.eval.scoring.annotations import read_part, told_when_malformed
from llava.eval.scoring.match_answers import join, mean
from llava.eval.scoring.multiple_choice import lenient_letter
from llava.eval.scoring.verdicts import Verdict, mean_by_kind

IMAGES = "SEED-Bench-image"
LETTERS = "ABCD"


class SEED(Benchmark):
    """SEED-Bench, image questions."""

    name = "seed"
    splits = ("image",)
    headline = "accuracy"
    download_page = "https://github.com/haotian-liu/LLaVA/blob/main/docs/Evaluation.md#seed-bench"

    @property
    def folder(self) -> Path:
        return self.data_root / "seed_bench"

    @property
    def question_file(self) -> Path:
        return self.folder / "llava-seed-bench.jsonl"

    @property
    def labels(self) -> Path:
        return self.folder / "SEED-Bench.json"

    @property
    def image_folder(self) -> Path:
        return self.folder

    def annotation_files(self) -> list[Path]:
        return [self.labels]

    def needed_files(self) -> list[Path]:
        # The image folder is seed_bench/ itself, because LLaVA's file names images as SEED-Bench-image/<name>.
        return [*super().needed_files(), self.folder / IMAGES]

    def read(self) -> list[Sample]:
        samples = [sample for sample in super().read() if (sample.image or "").startswith(f"{IMAGES}/")]
        refuse_repeated_ids(samples, self.question_file)
        return samples

    def annotations(self) -> tuple[Path, list[tuple]]:
        return self.labels, read_labels(self.labels, ("image",))

    def key(self, sample: Sample) -> str:
        return str(sample.question_id)

    def score(self, samples: list[Sample], rows: list[dict], folder: Path) -> dict:
        return score(_answers(samples, rows), self.labels, ("image",), bool(self.partial))

    def verdicts(self, samples: list[Sample], rows: list[dict], folder: Path) -> list[Verdict]:
        return judge(_answers(samples, rows), self.labels, ("image",), bool(self.partial))


def _answers(samples: list[Sample], rows: list[dict]) -> list[tuple]:
    return [(str(sample.question_id), row["text"]) for sample, row in zip(samples, rows, strict=True)]


def read_labels(source: Path, kinds: tuple[str, ...]) -> list[tuple[str, tuple]]:
    """(question_id, (letter, entry, question type)) of the questions of SEED-Bench.json about `kinds`."""
    questions, types = read_part(source, "questions"), read_part(source, "question_type")
    with told_when_malformed(source):
        names = {number: name for name, number in types.items()}
        chosen = [entry for entry in questions if entry["data_type"] in kinds]
        for entry in chosen:
            if entry["answer"] not in tuple(LETTERS):
                raise UserError(
                    f'{source}: "answer" of question {entry["question_id"]} is {entry["answer"]!r}, '
                    f"allowed are {', '.join(LETTERS)}"
                )
        return [
            (str(entry["question_id"]), (entry["answer"], entry, names[entry["question_type_id"]])) for entry in chosen
        ]


def _joined(answers: list[tuple], source: Path, kinds: tuple[str, ...], partial: bool) -> list[tuple]:
    """(answer, letter, entry, question type) of (question_id, answer) pairs."""
    joined = join(answers, read_labels(source, kinds), source, partial)
    return [(text, *label) for [text], [label] in joined.values()]


def judge(answers: list[tuple], source: Path, kinds: tuple[str, ...], partial: bool = False) -> list[Verdict]:
    """(question_id, answer) pairs against the questions of SEED-Bench.json about `kinds` (image, video)."""
    return [
        Verdict.plain(text == letter, _option(letter, entry), [kind])
        for text, letter, entry, kind in _joined(answers, source, kinds, partial)
    ]


def _option(letter: str, entry: dict) -> str:
    """Return an option as the prompt prints it: "B. red"."""
    return f"{letter}. {entry.get(f'choice_{letter.lower()}', '')}".rstrip(". ")


def score(answers: list[tuple], source: Path, kinds: tuple[str, ...], partial: bool = False) -> dict:
    """Accuracy of (question_id, answer) pairs on the questions of SEED-Bench.json about `kinds` (image, video).

    "lenient_accuracy": by the reading of `lenient_letter`, which published numbers do not use.
    """
    verdicts = judge(answers, source, kinds, partial)
    lenient = [
        lenient_letter(text, LETTERS) == letter for text, letter, _, _ in _joined(answers, source, kinds, partial)
    ]
    return {
        "accuracy": mean(verdict.value for verdict in verdicts),
        "lenient_accuracy": mean(lenient),
        "questions": len(verdicts),
        "per_type": mean_by_kind(verdicts),
    }
