"""The demo benchmark: questions about coloured shapes, digits and letters, drawn by the project's own generator.

The score is the share of answers whose first word is right, overall and per kind of question. The words after the first
do not count. `ended_after_one_word` is the share of answers of one word: with few vision tokens, the demo models often
do not stop.
"""

from __future__ import annotations

from pathlib import Path

from llava.eval.benchmarks.drawn import Drawn
from llava.eval.benchmarks.questions import Sample
from llava.eval.scoring.match_answers import mean
from llava.eval.scoring.verdicts import Verdict, mean_by_kind


class Shapes(Drawn):
    """Accuracy on the test split of the demo task."""

    name = "shapes"
    questions = 4000
    headline = "accuracy"
    duration = f"all {questions:,} of one tile with 14 tokens take one to two minutes on two free cores"
    max_new_tokens = 2  # answers are one word, which is one token, and the token that ends them

    def categories(self, samples: list[Sample]) -> list[str]:
        """Return the kind of question of each sample."""
        return [label["category"] for label in self.labels_of(samples)]

    def right(self, samples: list[Sample], rows: list[dict]) -> list[bool]:
        """Return for each sample whether the first word of its answer is the label. rows: rows of merge.jsonl."""
        answers = [label["answer"].lower() for label in self.labels_of(samples)]
        return [row["text"].lower().split()[:1] == [answer] for row, answer in zip(rows, answers, strict=True)]

    def score(self, samples: list[Sample], rows: list[dict], folder: Path) -> dict:
        verdicts = self.verdicts(samples, rows, folder)
        return {
            "accuracy": mean(verdict.value for verdict in verdicts),
            "questions": len(verdicts),
            "ended_after_one_word": sum(len(row["text"].split()) <= 1 for row in rows) / len(verdicts),
            "per_category": mean_by_kind(verdicts),
        }

    def verdicts(self, samples: list[Sample], rows: list[dict], folder: Path) -> list[Verdict]:
        labels = self.labels_of(samples)
        return [
            Verdict.plain(value, label["answer"], [label["category"]])
            for value, label in zip(self.right(samples, rows), labels, strict=True)
        ]
