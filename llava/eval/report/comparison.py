"""Runs that differ in nothing but their configuration, compared question by question with one of them.

Intervals are 95 % bootstrap over pictures (llava.eval.scoring.bootstrap), of the score itself: of POPE's mean F1 or MME's points
just as of an accuracy. Differences are paired: every run is scored on the same draws.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from llava.common.progress import progress_bar
from llava.eval.benchmarks import BENCHMARKS
from llava.eval.report.runs import Answer, RecordedRun
from llava.eval.scoring.bootstrap import ratio_intervals


@dataclass(frozen=True)
class Interval:
    """A figure with the ends of its interval."""

    value: float
    low: float
    high: float

    @property
    def beyond_chance(self) -> bool:
        """Of a difference: whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


@dataclass
class Kind:
    """A kind of question, by run: share of right answers in percent, and its difference to the reference."""

    name: str
    questions: int
    shares: list[Interval] = field(default_factory=list)
    differences: list[Interval | None] = field(default_factory=list)


@dataclass
class Flip:
    """A question that the reference answers rightly and some other run does not. answers: by run, None where it has none."""

    reference: Answer
    answers: list[Answer | None]

    @property
    def wrong(self) -> int:
        return sum(answer is not None and not answer.verdict.right for answer in self.answers)


@dataclass
class Comparison:
    """Runs of one checkpoint, benchmark, split and part, with the same generation settings.

    runs: the reference first, where there is one. scores and differences (to the reference) are by run, None where its
    answers are not judged here, differences also where it was scored on other questions.
    """

    runs: list[RecordedRun]
    scores: list[Interval | None] = field(default_factory=list)
    differences: list[Interval | None] = field(default_factory=list)
    kinds: list[Kind] = field(default_factory=list)

    def __post_init__(self):
        self.scores = [None] * len(self.runs)
        self.differences = [None] * len(self.runs)
        if self.judged:
            self._measure()

    @property
    def first(self) -> RecordedRun:
        return self.runs[0]

    @property
    def score_name(self) -> str:
        """What the benchmark's headline is."""
        name = self.first.name
        headline = (BENCHMARKS[name].headline or "score") if name in BENCHMARKS else "score"
        return f"{headline.replace('_', ' ')} ({'points' if self.first.points else '%'})"

    @cached_property
    def judged(self) -> list[int]:
        """Numbers of the runs whose answers are judged one by one."""
        return [n for n, run in enumerate(self.runs) if run.answers]

    @cached_property
    def reference(self) -> int | None:
        """Number of the run that the others are compared with: method none, else most vision tokens."""
        return min(self.judged, key=lambda n: (self.runs[n].method != "none", -self.runs[n].size), default=None)

    @cached_property
    def questions(self) -> dict[tuple, Answer]:
        """Key -> some run's answer to it, of every question that is judged in any run."""
        found: dict[tuple, Answer] = {}
        for n in self.judged:
            found = {**self.runs[n].answers, **found}
        return found

    @property
    def pictures(self) -> int:
        return len({answer.sample.image for answer in self.questions.values() if answer.sample.image is not None})

    def _measure(self) -> None:
        """Everything that has an interval, from one bootstrap."""
        ratios = _Ratios(self.questions)
        unit = 1 if self.first.points else 100
        kinds = sorted({kind for answer in self.questions.values() for kind in answer.verdict.kinds})
        whole: dict[int, list[int]] = {}
        of_kind: dict[tuple[str, int], list[int]] = {}
        for n in self.judged:
            answers = self.runs[n].answers
            names = dict.fromkeys(name for answer in answers.values() for name, _, _ in answer.verdict.terms)
            whole[n] = [ratios.add(answers, lambda a, name=name: _term(a, name, unit)) for name in names]
            for kind in kinds:
                of_kind[kind, n] = [ratios.add(answers, lambda a, kind=kind: _share(a, kind))]
        wanted = [(whole[n], []) for n in self.judged]
        wanted += [(whole[n], whole[self.reference]) for n in self.judged]
        wanted += [(of_kind[kind, n], []) for kind in kinds for n in self.judged]
        wanted += [(of_kind[kind, n], of_kind[kind, self.reference]) for kind in kinds for n in self.judged]
        found = iter(ratios.intervals(wanted, [answer.cluster for answer in self.questions.values()]))
        for n in self.judged:
            self.scores[n] = next(found)
        for n in self.judged:
            self.differences[n] = self._if_comparable(n, next(found))
        self.kinds = [Kind(kind, ratios.counted(of_kind[kind, self.reference][0])) for kind in kinds]
        for kind in self.kinds:
            kind.shares = [next(found) for _ in self.judged]
        for kind in self.kinds:
            kind.differences = [self._if_comparable(n, next(found)) for n in self.judged]

    def _if_comparable(self, n: int, difference: Interval) -> Interval | None:
        """None for the reference itself and for a run that was scored on other questions."""
        same = self.runs[n].answers.keys() == self.runs[self.reference].answers.keys()
        return difference if same and n != self.reference else None

    @cached_property
    def flips(self) -> list[Flip]:
        """Questions that the reference answers rightly and another run wrongly, in question order."""
        if self.reference is None:
            return []
        found = []
        for key, reference in self.runs[self.reference].answers.items():
            if reference.verdict.right:
                flip = Flip(reference, [run.answers.get(key) for run in self.runs])
                if flip.wrong:
                    found.append(flip)
        return found

    def flipped(self, n: int) -> tuple[int, int] | None:
        """(right with the reference and wrong here, the other way round) on the questions of both; None: not compared."""
        if n == self.reference or n not in self.judged:
            return None
        reference, here = self.runs[self.reference].answers, self.runs[n].answers
        pairs = [(reference[key].verdict.right, here[key].verdict.right) for key in here if key in reference]
        return sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)

    def worst(self, limit: int) -> list[Flip]:
        """At most `limit` flips: of each run in turn the next of its worst, those that most runs share first of all.

        Worse is a larger drop, then a question that more runs get wrong, then an earlier one.
        """
        order = {id(flip): place for place, flip in enumerate(self.flips)}
        queues = []
        for n in self.judged:
            mine = [f for f in self.flips if f.answers[n] is not None and not f.answers[n].verdict.right]
            drop = {id(f): f.answers[n].verdict.value - f.reference.verdict.value for f in mine}
            queues.append(iter(sorted(mine, key=lambda f: (drop[id(f)], -f.wrong, order[id(f)]))))  # noqa: B023
        chosen: dict[int, Flip] = {}
        while queues and len(chosen) < limit:
            for queue in list(queues):
                flip = next((f for f in queue if id(f) not in chosen), None)
                if flip is None:
                    queues.remove(queue)
                elif len(chosen) < limit:
                    chosen[id(flip)] = flip
        return sorted(chosen.values(), key=lambda f: (-f.wrong, order[id(f)]))


def compare(runs: list[RecordedRun]) -> list[Comparison]:
    """The comparisons that runs make: those with method none first, else in the order of the runs.

    A group whose runs are all unfinished is one too.
    """
    groups = defaultdict(list)
    for run in runs:
        groups[run.group].append(run)
    ordered = sorted(groups.values(), key=lambda group: all(run.method != "none" for run in group))
    return [Comparison(group) for group in progress_bar("comparing", ordered, unit=" groups")]


def _term(answer: Answer, name: str, unit: int) -> tuple[float, float]:
    """What an answer adds to one ratio of the headline."""
    added = [(above, below) for term, above, below in answer.verdict.terms if term == name]
    return unit * sum(above for above, _ in added), sum(below for _, below in added)


def _share(answer: Answer, kind: str) -> tuple[float, float]:
    """What an answer adds to the share of right answers to its kind of question."""
    return (100 * answer.verdict.value, 1.0) if kind in answer.verdict.kinds else (0.0, 0.0)


class _Ratios:
    """Ratios of sums over questions, column by column."""

    def __init__(self, questions: dict[tuple, Answer]):
        self._row = {key: row for row, key in enumerate(questions)}
        self._columns: list[np.ndarray] = []

    def add(self, answers: dict[tuple, Answer], part) -> int:
        """A ratio, by what each answer adds above and below; returns its number."""
        column = np.zeros((len(self._row), 2))
        for key, answer in answers.items():
            column[self._row[key]] = part(answer)
        self._columns.append(column)
        return len(self._columns) - 1

    def counted(self, number: int) -> int:
        return round(self._columns[number][:, 1].sum())

    def intervals(self, wanted: list[tuple[list[int], list[int]]], clusters: list) -> list[Interval]:
        """Per entry of `wanted`, the sum of some ratios less the sum of others."""
        combine = np.zeros((len(self._columns), len(wanted)))
        for m, (plus, minus) in enumerate(wanted):
            for r in plus:
                combine[r, m] += 1
            for r in minus:
                combine[r, m] -= 1
        above, below = np.stack(self._columns, axis=2).transpose(1, 0, 2)
        return [
            Interval(*map(float, ends)) for ends in zip(*ratio_intervals(above, below, combine, clusters), strict=True)
        ]
