"""SEED-Bench (arXiv 2307.16125), image questions: accuracy of the option's letter, overall and by question type.

Files below seed_bench/: LLaVA's questions (llava-seed-bench.jsonl), the official SEED-Bench.json, and the images
(SEED-Bench-image). Questions about videos, which LLaVA's file holds too, are left out. Joined by question_id.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from llava.eval.annotations import read_part, told_when_malformed
from llava.eval.benchmarks.base import Benchmark
from llava.eval.joining import join, mean
from llava.eval.letters import option_letter
from llava.eval.samples import Sample, refuse_repeated_ids

IMAGES = "SEED-Bench-image"


class SEED(Benchmark):
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
        return [*super().needed_files(), self.folder / IMAGES]

    def read(self) -> list[Sample]:
        samples = [sample for sample in super().read() if (sample.image or "").startswith(f"{IMAGES}/")]
        refuse_repeated_ids(samples, self.question_file)
        return samples

    def score(self, samples: list[Sample], rows: list[dict], folder: Path) -> dict:
        answers = [(str(sample.question_id), row["text"]) for sample, row in zip(samples, rows, strict=True)]
        return score(answers, self.labels, ("image",), bool(self.partial))


def score(answers: list[tuple], source: Path, kinds: tuple[str, ...], partial: bool = False) -> dict:
    """Accuracy of (question_id, answer) pairs on the questions of SEED-Bench.json about `kinds` (image, video)."""
    questions, types = read_part(source, "questions"), read_part(source, "question_type")
    with told_when_malformed(source):
        names = {number: name for name, number in types.items()}
        labels = [
            (str(entry["question_id"]), (entry["answer"], names[entry["question_type_id"]]))
            for entry in questions
            if entry["data_type"] in kinds
        ]
    per_type = defaultdict(list)
    for [text], [(answer, kind)] in join(answers, labels, source, partial).values():
        per_type[kind].append(option_letter(text, "ABCD") == answer)
    values = [value for group in per_type.values() for value in group]
    return {
        "accuracy": mean(values),
        "questions": len(values),
        "per_type": {kind: mean(group) for kind, group in sorted(per_type.items())},
    }
