"""Comparison of two answer files, of any program: question by question, with bootstrap intervals over images.

With labels, both files get the benchmark's own score, and the difference is paired: both are scored on the same draws.
Without labels, the share of equal answers is all that can be said. Questions that only one file answers are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llava.common.errors import UserError
from llava.common.text_table import markdown_table
from llava.eval.benchmarks.answer_file import match, read_answers
from llava.eval.benchmarks.base import Benchmark
from llava.eval.report.comparison import Interval
from llava.eval.report.runs import Questions, find
from llava.eval.results.compare_table import shown_headline
from llava.eval.scoring.bootstrap import cluster_intervals, ratio_intervals
from llava.eval.scoring.metrics import normal_form
from llava.eval.scoring.verdicts import Verdict


@dataclass(frozen=True)
class Scored:
    """The scores of both files, in percent or points, and how often each is right. asked: which part, or None."""

    name: str
    unit: str
    scores: tuple[Interval, Interval]
    difference: Interval
    right: dict[str, int]
    asked: str | None


@dataclass(frozen=True)
class AnswerComparison:
    """Two files, compared. questions: answered in both. alone: in one file only. same: share of equal answers, in %."""

    files: tuple[Path, Path]
    questions: int
    alone: int
    same: Interval
    scored: Scored | None

    def text(self) -> str:
        """Return the comparison as Markdown."""
        lines = [f"{self.questions:,} questions are answered in both files, {self.alone:,} in one of them alone."]
        if self.scored:
            rows = [("", f"{self.scored.name} ({self.scored.unit})", "95 % interval")]
            named = [*zip("AB", self.scored.scores, strict=True), ("B minus A", self.scored.difference)]
            for name, found in named:
                value = "{:+.2f}" if " " in name else "{:.2f}"
                # + 0.0 makes 0 of -0, which a sum of differences may round to.
                shown = [value.format(round(number, 2) + 0.0) for number in (found.value, found.low, found.high)]
                rows.append((name, shown[0], f"[{shown[1]}, {shown[2]}]"))
            lines += ["", markdown_table(rows), ""]
            lines.append(", ".join(f"{name}: {count:,}" for name, count in self.scored.right.items()))
            if self.scored.asked:
                lines.append(f"Scored: {self.scored.asked}.")
        lines.append(f"Equal answers: {self.same.value:.1f} % [{self.same.low:.1f}, {self.same.high:.1f}]")
        return "\n".join([*lines, *(f"{name}: {file}" for name, file in zip("AB", self.files, strict=True))])


def benchmark_beside(path: Path, data_root: Path | None) -> Benchmark | None:
    """Return the benchmark of the run folder that an answer file is in; None for a file outside of any."""
    if not all((path.parent / name).is_file() for name in ("run.json", "identity.json")):
        return None
    runs, _ = find([path.parent])
    return Questions(data_root).benchmark_of(runs[0])


def compare_answers(files: tuple[Path, Path], benchmark: Benchmark | None) -> AnswerComparison:
    """Compare two answer files. benchmark: knows the labels; None leaves the scores out.

    Raises UserError for damaged files, answers to other questions, and files without a question in common.
    """
    rows = [read_answers(path) for path in files]
    keyed = [_by_question(each, path, rows) for each, path in zip(rows, files, strict=True)]
    both = [key for key in keyed[0] if key in keyed[1]]
    if not both:
        raise UserError(f"{files[0]} and {files[1]}: answer no question in common, so there is nothing to compare")
    a, b = ([each[key] for key in both] for each in keyed)
    equal = [[100.0 * (normal_form(x["text"]) == normal_form(y["text"]))] for x, y in zip(a, b, strict=True)]
    clusters = [(x.get("metadata") or {}).get("image") or key for x, key in zip(a, both, strict=True)]
    same = Interval(*(float(ends[0]) for ends in cluster_intervals(np.array(equal), clusters)))
    alone = len(set(keyed[0]) ^ set(keyed[1]))
    return AnswerComparison(files, len(both), alone, same, benchmark and _scored(benchmark, files, (a, b)))


def _by_question(rows: list[dict], path: Path, files: list[list[dict]]) -> dict[tuple, dict]:
    """Return question -> row. A question is its id as text, and its prompt if all rows of both files have one."""
    prompts = all(isinstance(row.get("prompt"), str) for each in files for row in each)
    found: dict[tuple, dict] = {}
    for row in rows:
        key = (str(row["question_id"]), row["prompt"] if prompts else "")
        if key in found:
            raise UserError(f"{path}: question {key[0]} is answered several times, allowed is once")
        found[key] = row
    return found


def _scored(benchmark: Benchmark, files: tuple[Path, Path], answers: tuple[list[dict], list[dict]]) -> Scored | None:
    """Return the scores of both files on the questions that both answer; None if only a server can judge them."""
    # 1. The questions that both answer and that have a label.
    every = benchmark.load_questions()
    matched = []
    for rows, path in zip(answers, files, strict=True):
        samples, found = match(every, rows, path, partial=True)
        matched.append({sample.key: row for sample, row in zip(samples, found, strict=True)})
    samples = [sample for sample in every if sample.key in matched[0] and sample.key in matched[1]]
    if len(samples) < len(every):
        benchmark.partial = f"{len(samples):,} of {len(every):,} questions"
    samples = benchmark.scorable(samples, partial=True)
    verdicts = [benchmark.verdicts(samples, [rows[s.key] for s in samples], files[0].parent) for rows in matched]
    if None in verdicts:
        return None
    # 2. One bootstrap for both scores and their difference.
    unit = 1 if benchmark.points else 100
    names = list(dict.fromkeys(term[0] for each in verdicts for verdict in each for term in verdict.terms))
    above, below = (np.concatenate([_column(each, names, part) for each in verdicts], axis=1) for part in (1, 2))
    ones, none = np.ones((len(names), 1)), np.zeros((len(names), 1))
    combine = unit * np.block([[ones, none, -ones], [none, ones, ones]])
    clusters = [sample.image or sample.key for sample in samples]
    found = zip(*ratio_intervals(above, below, combine, clusters), strict=True)
    first, second, difference = (Interval(*map(float, ends)) for ends in found)
    # 3. How often which file is right.
    pairs = [(x.right, y.right) for x, y in zip(*verdicts, strict=True)]
    counts = {"both right": (True, True), "only A": (True, False), "only B": (False, True), "neither": (False, False)}
    right = {name: pairs.count(pair) for name, pair in counts.items()}
    headline = shown_headline(benchmark.headline or "score")
    return Scored(
        headline, "points" if benchmark.points else "%", (first, second), difference, right, benchmark.partial
    )


def _column(verdicts: list[Verdict], names: list[str], part: int) -> np.ndarray:
    """Return [Q, R]: what each verdict adds to the numerators (part 1) or denominators (part 2) of the ratios."""
    return np.array([[sum(term[part] for term in v.terms if term[0] == name) for name in names] for v in verdicts])
