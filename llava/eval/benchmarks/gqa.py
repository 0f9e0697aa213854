"""GQA testdev-balanced (arXiv 1902.09506): exact match of one answer.

Files in gqa/: LLaVA's questions (llava_gqa_testdev_balanced.jsonl). Files in gqa/data/: the images (images/) and the
official testdev_balanced_questions.json. The final period is removed and capitals become small letters, as in LLaVA's
converter (convert_gqa_for_eval.py). The comparison is that of the official eval.py. Answers are joined by question_id.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from llava.common.errors import UserError
from llava.common.files import read_json, write_json
from llava.eval.benchmarks.base import Benchmark
from llava.eval.benchmarks.questions import Sample, refuse_repeated_ids
from llava.eval.scoring.annotations import kind_of, told_when_malformed
from llava.eval.scoring.match_answers import join, mean
from llava.eval.scoring.verdicts import Verdict


class GQA(Benchmark):
    """GQA, split testdev-balanced."""

    name = "gqa"
    splits = ("testdev-balanced",)
    headline = "accuracy"
    download_page = "https://github.com/haotian-liu/LLaVA/blob/main/docs/Evaluation.md#gqa"

    @property
    def folder(self) -> Path:
        return self.data_root / "gqa"

    @property
    def question_file(self) -> Path:
        return self.folder / "llava_gqa_testdev_balanced.jsonl"

    @property
    def labels(self) -> Path:
        return self.folder / "data" / "testdev_balanced_questions.json"

    @property
    def image_folder(self) -> Path:
        return self.folder / "data" / "images"

    def annotation_files(self) -> list[Path]:
        return [self.labels]

    def read(self) -> list[Sample]:
        samples = super().read()
        refuse_repeated_ids(samples, self.question_file)
        return samples

    def annotations(self) -> tuple[Path, list[tuple]]:
        return self.labels, read_labels(read_json(self.labels), self.labels)

    def score(self, samples: list[Sample], rows: list[dict], folder: Path) -> dict:
        return score(_answers(samples, rows), read_json(self.labels), self.labels, bool(self.partial))

    def verdicts(self, samples: list[Sample], rows: list[dict], folder: Path) -> list[Verdict]:
        return judge(_answers(samples, rows), read_json(self.labels), self.labels, bool(self.partial))


def _answers(samples: list[Sample], rows: list[dict]) -> list[tuple]:
    return [(sample.question_id, row["text"]) for sample, row in zip(samples, rows, strict=True)]


def prediction(text: str) -> str:
    """Return an answer in the form that the official evaluation receives."""
    return text.rstrip(".").lower()


def read_labels(questions: dict, source: Path) -> list[tuple[str, tuple[str, str | None]]]:
    """(question_id, (answer, structural type)) of {question_id: {answer, types}}."""
    with told_when_malformed(source):
        labels = [
            (key, (entry["answer"], entry.get("types", {}).get("structural"))) for key, entry in questions.items()
        ]
    for key, (answer, structure) in labels:
        kind_of(structure, f"{source}, question {key}")
        if not isinstance(answer, str):
            raise UserError(f'{source}: "answer" of question {key} is {answer!r}, allowed is a string')
    return labels


def judge(answers: list[tuple], questions: dict, source: Path, partial: bool = False) -> list[Verdict]:
    """(question_id, answer) pairs against {question_id: {answer, types}}; their kind is GQA's structural type."""
    return [
        Verdict.plain(prediction(text) == answer, answer, [structure])
        for [text], [(answer, structure)] in join(answers, read_labels(questions, source), source, partial).values()
    ]


def score(answers: list[tuple], questions: dict, source: Path, partial: bool = False) -> dict:
    """Return the accuracy of (question_id, answer) pairs: overall, on open and on binary questions.

    questions: {question_id: {answer, types}}, read from `source`.
    """
    verdicts, groups = judge(answers, questions, source, partial), defaultdict(list)
    # eval.py's division: "query" is open; verify, logical, choose and compare are binary.
    for verdict in verdicts:
        for structure in verdict.kinds:
            groups["open" if structure == "query" else "binary"].append(verdict.value)
    by_kind = {kind: mean(group) for kind, group in sorted(groups.items())}
    accuracy = mean(verdict.value for verdict in verdicts)
    return {"accuracy": accuracy, "questions": len(verdicts), **({"per_kind": by_kind} if by_kind else {})}


def write_predictions(answers: list[tuple], path: Path) -> None:
    """Write the file that the official eval.py reads: [{questionId, prediction}]."""
    write_json(path, [{"questionId": key, "prediction": prediction(text)} for key, text in answers], indent=None)
