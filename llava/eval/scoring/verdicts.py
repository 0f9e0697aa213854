"""Verdicts: the value of each single answer, its expected answer, its kind of question, and its part in the score.

The headline of every benchmark is a sum of ratios of sums over questions. A plain mean is one ratio, POPE's mean F1 has
three, MME's points have two per sub-task. `terms` says what a question adds to each ratio, so one bootstrap works for
all benchmarks.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llava.eval.scoring.match_answers import mean

# (name of the ratio, what the question adds to its numerator, what it adds to its denominator)
Term = tuple[str, float, float]
MEAN = "mean"
# A soft accuracy of at least this counts as right: the answer of two of ten people has 0.6, that of one has 0.3.
RIGHT = 0.5


@dataclass(frozen=True)
class Verdict:
    """One judged answer.

    value:    0 (wrong) to 1 (right)
    expected: the right answer, or the answer of most people
    kinds:    the benchmark's own categories of the question; () if the annotations have none
    terms:    what the question adds to the headline; () if it does not count (ScienceQA's questions without image)
    """

    value: float
    expected: str
    kinds: tuple[str, ...]
    terms: tuple[Term, ...]

    @classmethod
    def plain(cls, value: float, expected: str, kinds: Iterable[str | None] = ()) -> Verdict:
        """Return a verdict for a benchmark whose headline is the mean of all values. A kind of None is left out."""
        return cls(float(value), expected, tuple(k for k in kinds if k is not None), ((MEAN, float(value), 1.0),))

    @property
    def right(self) -> bool:
        """Whether the answer counts as right on a page that shows only right or wrong."""
        return self.value >= RIGHT


def mean_by_kind(verdicts: Iterable[Verdict]) -> dict[str, float]:
    """Return kind -> mean value, sorted by kind."""
    groups = defaultdict(list)
    for verdict in verdicts:
        for kind in verdict.kinds:
            groups[kind].append(verdict.value)
    return {kind: mean(values) for kind, values in sorted(groups.items())}


def headline(verdicts: Sequence[Verdict]) -> float:
    """Return the headline of a score from the terms of its verdicts. A ratio with a denominator of 0 adds nothing."""
    above, below = defaultdict(list), defaultdict(list)
    for verdict in verdicts:
        for name, numerator, denominator in verdict.terms:
            above[name].append(numerator)
            below[name].append(denominator)
    return sum(sum(above[name]) / total for name in above if (total := sum(below[name])))


def most_said(people: Sequence[str]) -> str:
    """Return the most frequent answer; of several, the one that comes first."""
    return Counter(people).most_common(1)[0][0]
