"""What single answers are worth: right or wrong, what was expected, which kind of question, and their part in the score.

A benchmark's headline is a sum of ratios of sums over questions: a plain mean is one ratio, POPE's mean F1 three, MME's
points two per sub-task. `terms` says what a question adds to each, so that one bootstrap serves all benchmarks.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llava.eval.scoring.match_answers import mean

# (name of the ratio, what is added to its numerator, what to its denominator)
Term = tuple[str, float, float]
MEAN = "mean"
RIGHT = 0.5  # soft accuracies count as right from here on: two of ten people said so


@dataclass(frozen=True)
class Verdict:
    """One judged answer.

    value:    0 (wrong) to 1 (right)
    expected: the right answer, or what most people said
    kinds:    the benchmark's own categories of the question; none where its annotations have none
    terms:    its part in the headline; () where it does not count (ScienceQA's questions without image)
    """

    value: float
    expected: str
    kinds: tuple[str, ...]
    terms: tuple[Term, ...]

    @classmethod
    def plain(cls, value: float, expected: str, kinds: Iterable[str | None] = ()) -> Verdict:
        """A verdict of a benchmark whose headline is the mean of all values; kinds that are None are left out."""
        return cls(float(value), expected, tuple(k for k in kinds if k is not None), ((MEAN, float(value), 1.0),))

    @property
    def right(self) -> bool:
        return self.value >= RIGHT


def mean_by_kind(verdicts: Iterable[Verdict]) -> dict[str, float]:
    """kind -> mean value, sorted by name."""
    groups = defaultdict(list)
    for verdict in verdicts:
        for kind in verdict.kinds:
            groups[kind].append(verdict.value)
    return {kind: mean(values) for kind, values in sorted(groups.items())}


def headline(verdicts: Sequence[Verdict]) -> float:
    """The headline of a score, from its terms; a ratio whose denominator is 0 adds nothing."""
    above, below = defaultdict(list), defaultdict(list)
    for verdict in verdicts:
        for name, numerator, denominator in verdict.terms:
            above[name].append(numerator)
            below[name].append(denominator)
    return sum(sum(above[name]) / total for name in above if (total := sum(below[name])))


def most_said(people: Sequence[str]) -> str:
    """What most people answered; of several, who came first."""
    return Counter(people).most_common(1)[0][0]
