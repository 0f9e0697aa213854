"""SEED-Bench (arXiv 2307.16125), image questions: accuracy of the option's letter, overall and by question type.

Files in seed_bench/: LLaVA's questions (llava-seed-bench.jsonl), the official SEED-Bench.json, and the images
(SEED-Bench-image). LLaVA's file also has questions about videos, which are left out. Answers are joined by question_id.
"""

from __future__ import annotations

from pathlib import Path

from llava.eval.benchmarks.base import Benchmark
from llava.eval.benchmarks.questions import Sample, refuse_repeated_ids
from llava.eval.scoring.annotations import read_part, told_when_malformed
from llava.eval.scoring.match_answers import join, mean
from llava.eval.scoring.multiple_choice import option_letter
from llava.eval.scoring.verdicts import Verdict, mean_by_kind

IMAGES = "SEED-Bench-image"


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

    def score(self, samples: list[Sample], rows: list[dict], folder: Path) -> dict:
        return score(_answers(samples, rows), self.labels, ("image",), bool(self.partial))

    def verdicts(self, samples: list[Sample], rows: list[dict], folder: Path) -> list[Verdict]:
        return judge(_answers(samples, rows), self.labels, ("image",), bool(self.partial))


def _answers(samples: list[Sample], rows: list[dict]) -> list[tuple]:
    return [(str(sample.question_id), row["text"]) for sample, row in zip(samples, rows, strict=True)]


def judge(answers: list[tuple], source: Path, kinds: tuple[str, ...], partial: bool = False) -> list[Verdict]:
    """Return the verdicts of (question_id, answer) pairs.

    source: SEED-Bench.json. kinds: which of its questions count ("image", "video"). Raises UserError as `join` does.
    """
    questions, types = read_part(source, "questions"), read_part(source, "question_type")
    with told_when_malformed(source):
        names = {number: name for name, number in types.items()}
        labels = [
            (str(entry["question_id"]), (entry["answer"], entry, names[entry["question_type_id"]]))
            for entry in questions
            if entry["data_type"] in kinds
        ]
    return [
        Verdict.plain(option_letter(text, "ABCD") == answer, _option(answer, entry), [kind])
        for [text], [(answer, entry, kind)] in join(answers, labels, source, partial).values()
    ]


def _option(letter: str, entry: dict) -> str:
    """Return an option as the prompt prints it: "B. red"."""
    return f"{letter}. {entry.get(f'choice_{letter.lower()}', '')}".rstrip(". ")


def score(answers: list[tuple], source: Path, kinds: tuple[str, ...], partial: bool = False) -> dict:
    """Return the accuracy of (question_id, answer) pairs, overall and per question type. Arguments as for `judge`."""
    verdicts = judge(answers, source, kinds, partial)
    return {
        "accuracy": mean(verdict.value for verdict in verdicts),
        "questions": len(verdicts),
        "per_type": mean_by_kind(verdicts),
    }
