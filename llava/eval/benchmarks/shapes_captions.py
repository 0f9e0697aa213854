"""Captions of the demo's pictures: answers of 43 to 79 tokens, so most of the work of an answer is decoding.

The reference caption names every object with its colour and quadrant, in a fixed order, and ends with a tally
(llava.shapes.captions). An object is right if its quadrant, its colour and its kind are; each object of the picture
counts once. The order of the sentences does not matter.

f1         mean over pictures of the F1 of the objects: twice the right ones by the stated ones and those of the picture
precision  mean over pictures of the share of stated objects that are right; 0 where none is stated
recall     mean over pictures of the share of the picture's objects that are stated
exact      share of answers that are the reference word for word
tally      share of answers whose four numbers are right
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from llava.eval.benchmarks.drawn import Drawn
from llava.eval.benchmarks.questions import Sample
from llava.eval.scoring.match_answers import mean
from llava.eval.scoring.verdicts import Verdict, mean_by_kind
from llava.shapes.captions import MAX_TOKENS, read_facts, read_tally

MEASURES = ("f1", "precision", "recall", "exact", "tally")


@dataclass(frozen=True)
class Judged:
    """One caption: numbers of objects that it states, that the picture has, and that are right; and what else is right."""

    stated: int
    shown: int
    right: int
    exact: bool
    tally: bool

    @property
    def precision(self) -> float:
        return self.right / self.stated if self.stated else 0.0

    @property
    def recall(self) -> float:
        return self.right / self.shown

    @property
    def f1(self) -> float:
        return 2 * self.right / (self.stated + self.shown)


def judge(answer: str, reference: str) -> Judged:
    """What is right in a caption. reference: the caption of the picture, with at least one object."""
    stated, shown = Counter(read_facts(answer)), Counter(read_facts(reference))
    return Judged(
        stated.total(),
        shown.total(),
        (stated & shown).total(),
        exact=_words(answer) == _words(reference),
        tally=read_tally(answer) == read_tally(reference),
    )


def _words(text: str) -> list[str]:
    # The tokenizer's decoder puts a space in front of every mark.
    for mark in ".,:":
        text = text.replace(mark, f" {mark} ")
    return text.lower().split()


class ShapesCaptions(Drawn):
    """F1 of the objects that captions state, on the test split of the demo's pictures."""

    name = "shapes_captions"
    questions = 1000
    captions = True
    headline = "f1"
    max_new_tokens = MAX_TOKENS + 1  # and the token that ends an answer

    def judged(self, samples: list[Sample], rows: list[dict]) -> list[Judged]:
        """Return what is right in each answer. rows: rows of merge.jsonl."""
        labels = self.labels_of(samples)
        return [judge(row["text"], label["answer"]) for row, label in zip(rows, labels, strict=True)]

    def score(self, samples: list[Sample], rows: list[dict], folder: Path) -> dict:
        judged = self.judged(samples, rows)
        return {
            **{name: mean(getattr(one, name) for one in judged) for name in MEASURES},
            "questions": len(judged),
            "per_category": mean_by_kind(self.verdicts(samples, rows, folder)),
        }

    def verdicts(self, samples: list[Sample], rows: list[dict], folder: Path) -> list[Verdict]:
        labels = self.labels_of(samples)
        return [
            Verdict.plain(one.f1, label["answer"], [f"{one.shown} objects"])
            for one, label in zip(self.judged(samples, rows), labels, strict=True)
        ]
