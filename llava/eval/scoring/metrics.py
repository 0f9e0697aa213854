"""Metrics of one answer against its reference answers, for data without rules of its own: each is 0 (wrong) to 1 (right).

exact and contains compare texts in EvalAI's normal form (evalai_normalisation.py): case, punctuation, number words,
articles and contractions make no difference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llava.eval.scoring.evalai_normalisation import normalise, strip_punctuation
from llava.eval.scoring.vqa_accuracy import official_accuracy

# A normalised distance of at least this is no misspelling any more, and the answer counts 0 (arXiv 1905.13648).
_TOO_FAR = 0.5


@dataclass(frozen=True)
class Metric:
    """A metric. value: (answer, references) -> 0 to 1. headline: its key in a score. references: how many it needs."""

    value: Callable[[str, list[str]], float]
    headline: str = "accuracy"
    references: int = 1


def exact(answer: str, references: list[str]) -> float:
    """Return 1 if the answer equals a reference in normal form, else 0."""
    return float(normal_form(answer) in map(normal_form, references))


def contains(answer: str, references: list[str]) -> float:
    """Return 1 if the words of a reference stand in the answer one after another, in normal form, else 0."""
    said = f" {normal_form(answer)} "
    return float(any(f" {form} " in said for form in map(normal_form, references) if form))


def anls(answer: str, references: list[str]) -> float:
    """Return the normalised Levenshtein similarity to the nearest reference; 0 from a distance of 0.5 on.

    The distance is that of the lower-case texts with single spaces, divided by the length of the longer one. The mean
    over questions is ANLS (arXiv 1905.13648).
    """
    said = _spaced(answer)
    distance = min(_distance(said, _spaced(one)) for one in references)
    return 1 - distance if distance < _TOO_FAR else 0.0


METRICS = {
    "exact": Metric(exact),
    "vqa": Metric(official_accuracy, references=2),
    "anls": Metric(anls, headline="anls"),
    "contains": Metric(contains),
}


def normal_form(text: str) -> str:
    """Return EvalAI's normal form. A text of articles alone, as the option letter "A", keeps them."""
    return normalise(text) or " ".join(strip_punctuation(text.lower().strip()).split())


def _spaced(text: str) -> str:
    return " ".join(text.lower().split())


def _distance(a: str, b: str) -> float:
    """Return the Levenshtein distance divided by the length of the longer text; 0 for two empty texts."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        # `diagonal` is the cell above on the left, which the row overwrites one step earlier.
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (letter != other))
    return row[-1] / max(len(a), len(b), 1)
