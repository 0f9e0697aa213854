"""Rows of a comparison, from its finished runs: accuracy, costs, and paired differences with their intervals.

There is one row per checkpoint, method, budget and seed. With several seeds, one more row has the seed "mean": its
accuracy is the mean over seeds, question by question. Intervals are 95 % percentile bootstrap over images, with 10,000
seeded resamples (llava.eval.scoring.bootstrap). They cover the draw of the questions, not the training of the
checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import numpy as np

from llava.common.errors import UserError
from llava.eval.benchmarks import Benchmark
from llava.eval.benchmarks.questions import read_lines
from llava.eval.results.compare_table import SPLIT, column_of
from llava.eval.runs.run import Run
from llava.eval.scoring.bootstrap import cluster_intervals, ratio_intervals
from llava.eval.scoring.verdicts import Verdict

_PACKAGES = ("torch", "transformers", "numpy")


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    percent, tokens: the budget; None for a method without budget. seed: None for a method that draws nothing at random.
    options: not compared, because name and seed determine them (and a dict has no hash).
    """

    name: str
    method: str
    percent: float | None = None
    tokens: int | None = None
    seed: int | None = None
    options: dict = field(default_factory=dict, compare=False)


def costs(report: dict) -> dict[str, float]:
    """Return the costs of a run per question, from its run.json.

    tokens_before, tokens_after: vision tokens per image, before and after selection. layer_mean: vision tokens that a
    layer of the LLM reads, mean over layers. prefill_flops: FLOPs from pixels to the first token (llava.costs.flops).
    kv_bytes: live bytes of the KV cache at the end of generation.
    Raises UserError if some answers have no FLOPs.
    """
    tokens, flops = report["vision_tokens_per_image"], report["prefill_flops_predicted"]
    if flops["questions"] < report["answered"]:
        raise UserError(
            f"method {report['configuration']['method']}: {report['answered'] - flops['questions']} answers in runs/ are of an "
            "earlier version, which counted no FLOPs; --fresh answers anew"
        )
    return {
        "tokens_before": tokens["before"],
        "tokens_after": tokens["after"],
        "layer_mean": tokens["layer_mean"],
        "prefill_flops": flops["mean"],
        "kv_bytes": report["kv_bytes_live"]["mean"],
    }


@dataclass
class _Line:
    """A row before its intervals are known.

    facts: other columns. right: [Q], 0 (wrong) to 1 (right); a mean over seeds has shares, a soft metric has any value.
    percent: the budget. seeds: accuracy of each seed, for a mean over seeds only.
    """

    facts: dict
    right: np.ndarray
    percent: float | None
    seeds: list[float] = field(default_factory=list)


def rows_of(benchmark: Benchmark, runs: dict[Cell, Run], reports: dict[Cell, dict], reference: str) -> list[dict]:
    """Return the rows of one checkpoint, in the order of `runs`.

    benchmark: one whose headline is the mean over its questions. reference: the method that the others of the same
    budget are compared with, question by question.
    """
    # 1. Right or wrong per question, for each run and for means over seeds.
    samples = next(iter(runs.values())).samples
    pictures = [sample.image or sample.key for sample in samples]
    judged = {cell: _judged(benchmark, run) for cell, run in runs.items()}
    kinds = [verdict.kinds for verdict in next(iter(judged.values()))]
    lines: list[_Line] = []
    for cells in _by_seed(list(runs)):
        several = [_Line(_facts(c, runs[c], reports[c]), _right(judged[c]), c.percent) for c in cells]
        lines += several
        if len(several) > 1:
            lines.append(_mean_line(several))
    # 2. One bootstrap over all accuracies and differences, so that all use the same draws.
    against = {line.percent: line.right for line in lines if line.facts["method"] == reference}
    compared = [line for line in lines if line.percent in against]
    columns = [line.right for line in lines] + [line.right - against[line.percent] for line in compared]
    mean, low, high = cluster_intervals(np.stack(columns, axis=1), pictures)
    # 3. The rows. `difference` is the column of the next difference; these follow the accuracies.
    rows, difference = [], len(lines)
    for n, line in enumerate(lines):
        row = line.facts | {"benchmark": benchmark.name, "headline": benchmark.headline}
        row |= {"questions": len(samples), "pictures": len({name for sample in samples for name in sample.images})}
        row |= {"accuracy": mean[n], "accuracy_low": low[n], "accuracy_high": high[n]}
        if line.seeds:
            row |= {"accuracy_worst_seed": min(line.seeds), "accuracy_best_seed": max(line.seeds)}
        if line.percent in against:
            row |= {"difference": mean[difference]}
            row |= {"difference_low": low[difference], "difference_high": high[difference]}
            difference += 1
        for kind in sorted({kind for several in kinds for kind in several}):
            row[column_of(kind)] = line.right[[kind in several for several in kinds]].mean()
        rows.append(row)
    _split(lines, rows, pictures)
    return rows


def _split(lines: list[_Line], rows: list[dict], pictures: list) -> None:
    """Add to the rows what each method does on questions that method SPLIT answers at its budget, and on the others.

    Columns: SPLIT_right and SPLIT_wrong, with _questions, _accuracy, _low and _high. Nothing is added at a budget at which
    SPLIT was not measured. In a group without questions, only its number of questions is.
    """
    splits = {line.percent: line.right for line in lines if line.facts["method"] == SPLIT}
    wanted = [n for n, line in enumerate(lines) if line.percent in splits]
    if not wanted:
        return
    for name, member in (("right", lambda right: right), ("wrong", lambda right: 1 - right)):
        inside = np.stack([member(splits[lines[n].percent]) for n in wanted], axis=1)
        right = np.stack([lines[n].right for n in wanted], axis=1)
        found = ratio_intervals(right * inside, inside, None, pictures)
        for n, questions, accuracy, low, high in zip(wanted, inside.sum(axis=0), *found, strict=True):
            column = f"{SPLIT}_{name}"
            rows[n][f"{column}_questions"] = int(questions)
            if questions:
                rows[n] |= {f"{column}_accuracy": accuracy, f"{column}_low": low, f"{column}_high": high}


def _by_seed(cells: list[Cell]) -> list[list[Cell]]:
    """Group cells that differ only in the seed."""
    groups: dict[tuple, list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.name, cell.percent), []).append(cell)
    return list(groups.values())


def _judged(benchmark: Benchmark, run: Run) -> list[Verdict]:
    """Return the verdicts of a run, in question order."""
    return benchmark.verdicts(run.samples, [row for _, row in read_lines(run.merged)], run.folder)


def _right(verdicts: list[Verdict]) -> np.ndarray:
    """Return [Q]: the value of each verdict."""
    return np.array([verdict.value for verdict in verdicts], dtype=np.float64)


def _facts(cell: Cell, run: Run, report: dict) -> dict:
    """Return the columns of a row that do not depend on the answers."""
    packages = report["environment"]["packages"]
    answered = [session for session in report["sessions"] if session.get("answered")]
    return {
        "checkpoint": run.checkpoint.short_name,
        "method": cell.name,
        "budget_percent": cell.percent,
        "budget_tokens": cell.tokens,
        "seed": None if cell.seed is None else str(cell.seed),
        **costs(report),
        "options": json.dumps(cell.options) if cell.options else None,
        "configuration": run.config.digest,
        "run": run.folder.name,
        # All sessions that answered questions: some answers may come from an earlier version of the code.
        "commit": " ".join(dict.fromkeys(str(session.get("commit")) for session in answered)),
        "code": " ".join(dict.fromkeys(str(session.get("code")) for session in answered)),
        "python": report["environment"]["python"],
        **{name: packages.get(name) for name in _PACKAGES},
    }


def _mean_line(lines: list[_Line]) -> _Line:
    """Return the line of the mean over seeds, question by question."""
    # These columns belong to one run. A mean has none.
    facts = dict(lines[0].facts, seed="mean", options=None, configuration=None, run=None)
    for name in ("tokens_before", "tokens_after", "layer_mean", "prefill_flops", "kv_bytes"):
        facts[name] = float(np.mean([line.facts[name] for line in lines]))
    seeds = [float(line.right.mean()) for line in lines]
    return _Line(facts, np.mean([line.right for line in lines], axis=0), lines[0].percent, seeds)
