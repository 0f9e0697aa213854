"""Comparison of runs that differ only in their configuration: question by question, with one of them as reference.

Intervals are 95 % bootstrap over images (llava.eval.scoring.bootstrap) of the benchmark's own score: an accuracy,
POPE's mean F1, MME's points. Differences are paired: all runs are scored on the same draws.
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
    """A number and the ends of its interval."""

    value: float
    low: float
    high: float

    @property
    def beyond_chance(self) -> bool:
        """Return whether the interval of a difference excludes zero."""
        return self.low > 0 or self.high < 0


@dataclass
class Kind:
    """A kind of question, or the questions that a run of method `downsample` answers right or wrong. shares, differences (to the reference): one entry per judged run, in percent."""

    name: str
    questions: int
    shares: list[Interval] = field(default_factory=list)
    differences: list[Interval | None] = field(default_factory=list)


@dataclass
class Flip:
    """A question that the reference gets right and another run gets wrong. answers: one per run, or None."""

    reference: Answer
    answers: list[Answer | None]

    @property
    def wrong(self) -> int:
        """Number of runs that get the question wrong."""
        return sum(answer is not None and not answer.verdict.right for answer in self.answers)


@dataclass
class Comparison:
    """Runs of one checkpoint, benchmark, split and part, with the same generation settings.

    runs: in the order of the page, with method none first.
    scores, differences: one entry per run; differences are to the reference. An entry is None if the answers of the run
    are not judged here. A difference is also None if the run was scored on other questions.
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
        """Name and unit of the benchmark's headline."""
        name = self.first.name
        headline = (BENCHMARKS[name].headline or "score") if name in BENCHMARKS else "score"
        return f"{headline.replace('_', ' ')} ({'points' if self.first.points else '%'})"

    @cached_property
    def judged(self) -> list[int]:
        """Indices of the runs whose answers are judged one by one."""
        return [n for n, run in enumerate(self.runs) if run.answers]

    @cached_property
    def reference(self) -> int | None:
        """Index of the run that the others are compared with: method none, or else the most vision tokens."""
        return min(self.judged, key=lambda n: (self.runs[n].method != "none", -self.runs[n].size), default=None)

    @cached_property
    def questions(self) -> dict[tuple, Answer]:
        """Key -> answer of one run, for every question that is judged in any run."""
        # Which run's answer it is does not matter: only its sample and kinds are used, which are the same in all runs.
        found: dict[tuple, Answer] = {}
        for n in self.judged:
            found = {**self.runs[n].answers, **found}
        return found

    @property
    def pictures(self) -> int:
        """Number of images in all judged questions."""
        return len({answer.sample.image for answer in self.questions.values() if answer.sample.image is not None})

    def _measure(self) -> None:
        """Compute everything that has an interval with one bootstrap, so that all numbers use the same draws."""
        # 1. The ratios: per run, those of the headline, and the share of right answers for each kind of question.
        ratios = _Ratios(self.questions)
        unit = 1 if self.first.points else 100
        kinds = self._groups_of_questions()
        whole: dict[int, list[int]] = {}
        of_kind: dict[tuple[str, int], list[int]] = {}
        for n in self.judged:
            answers = self.runs[n].answers
            names = dict.fromkeys(name for answer in answers.values() for name, _, _ in answer.verdict.terms)
            whole[n] = [ratios.add(answers, lambda a, name=name: _term(a, name, unit)) for name in names]
            for kind, keys in kinds.items():
                inside = {key: answer for key, answer in answers.items() if key in keys}
                of_kind[kind, n] = [ratios.add(inside, lambda a: (100 * a.verdict.value, 1.0))]
        # 2. The quantities, (ratios to add, ratios to subtract): scores, differences, shares, differences of shares.
        wanted = [(whole[n], []) for n in self.judged]
        wanted += [(whole[n], whole[self.reference]) for n in self.judged]
        wanted += [(of_kind[kind, n], []) for kind in kinds for n in self.judged]
        wanted += [(of_kind[kind, n], of_kind[kind, self.reference]) for kind in kinds for n in self.judged]
        found = iter(ratios.intervals(wanted, [answer.cluster for answer in self.questions.values()]))
        # 3. The intervals, taken in the order of `wanted`.
        for n in self.judged:
            self.scores[n] = next(found)
        for n in self.judged:
            self.differences[n] = self._if_comparable(n, next(found))
        self.kinds = [Kind(kind, ratios.counted(of_kind[kind, self.reference][0])) for kind in kinds]
        for kind in self.kinds:
            kind.shares = [next(found) for _ in self.judged]
        for kind in self.kinds:
            kind.differences = [self._if_comparable(n, next(found)) for n in self.judged]

    def _groups_of_questions(self) -> dict[str, set[tuple]]:
        """Return name -> keys: the benchmark's kinds of questions, then the two groups of each run of `downsample`.

        Down-sampling tells apart questions that need no detail and questions that do (arXiv 2510.07143). A group with no
        question is left out.
        """
        groups: dict[str, set[tuple]] = {}
        for kind in sorted({kind for answer in self.questions.values() for kind in answer.verdict.kinds}):
            groups[kind] = {key for key, answer in self.questions.items() if kind in answer.verdict.kinds}
        for run in (self.runs[n] for n in self.judged):
            if run.method == "downsample":
                right = {key for key, answer in run.answers.items() if answer.verdict.right}
                groups[f"{run.title}: right"], groups[f"{run.title}: wrong"] = right, run.answers.keys() - right
        return {name: keys for name, keys in groups.items() if keys}

    def _if_comparable(self, n: int, difference: Interval) -> Interval | None:
        """Return the difference, or None for the reference itself and for a run that was scored on other questions."""
        same = self.runs[n].answers.keys() == self.runs[self.reference].answers.keys()
        return difference if same and n != self.reference else None

    @cached_property
    def flips(self) -> list[Flip]:
        """Questions that the reference gets right and another run gets wrong, in question order."""
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
        """Return (number of questions right in the reference and wrong in run n, number of the opposite case).

        Only questions that both answered count. None if run n is not compared.
        """
        if n == self.reference or n not in self.judged:
            return None
        reference, here = self.runs[self.reference].answers, self.runs[n].answers
        pairs = [(reference[key].verdict.right, here[key].verdict.right) for key in here if key in reference]
        return sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)

    def worst(self, limit: int) -> list[Flip]:
        """Return at most `limit` flips: from each run in turn its next worst, sorted by the number of runs in common.

        Flip a is worse than b if its value drops more, then if more runs get it wrong, then if it comes earlier.
        """
        # 1. The flips of each run, worst first.
        order = {id(flip): place for place, flip in enumerate(self.flips)}
        queues = []
        for n in self.judged:
            mine = [f for f in self.flips if f.answers[n] is not None and not f.answers[n].verdict.right]
            drop = {id(f): f.answers[n].verdict.value - f.reference.verdict.value for f in mine}
            queues.append(iter(sorted(mine, key=lambda f: (drop[id(f)], -f.wrong, order[id(f)]))))  # noqa: B023
        # 2. In turn, so that a run with many flips does not fill the list alone.
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
    """Return what an answer adds to (numerator, denominator) of one ratio of the headline."""
    added = [(above, below) for term, above, below in answer.verdict.terms if term == name]
    return unit * sum(above for above, _ in added), sum(below for _, below in added)


class _Ratios:
    """Ratios of sums over questions. Each ratio is one column [Q, 2]: numerator and denominator per question."""

    def __init__(self, questions: dict[tuple, Answer]):
        self._row = {key: row for row, key in enumerate(questions)}
        self._columns: list[np.ndarray] = []

    def add(self, answers: dict[tuple, Answer], part) -> int:
        """Add a ratio; return its index. part: Answer -> what it adds to (numerator, denominator)."""
        # A question that a run has not answered stays (0, 0), so it adds nothing.
        column = np.zeros((len(self._row), 2))
        for key, answer in answers.items():
            column[self._row[key]] = part(answer)
        self._columns.append(column)
        return len(self._columns) - 1

    def counted(self, number: int) -> int:
        """Return the denominator of a ratio: its number of questions."""
        return round(self._columns[number][:, 1].sum())

    def intervals(self, wanted: list[tuple[list[int], list[int]]], clusters: list) -> list[Interval]:
        """Return one interval per entry (plus, minus) of `wanted`: the sum of ratios `plus` less the sum of `minus`."""
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
