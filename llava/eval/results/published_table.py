"""Finished runs as the published table: seven benchmarks, and the mean of ratios to the unpruned row.

Imports no torch.
"""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from llava.common.errors import UserError
from llava.common.files import digest_of
from llava.common.text_table import markdown_table
from llava.config import AdaVConfig
from llava.eval.benchmarks import BENCHMARKS
from llava.eval.results.published import COLUMNS, TABLE, PublishedRow, average, published_models, published_rows
from llava.eval.results.run_record import read_record

_NEEDED = (
    *("benchmark", "split", "asked", "tokens", "checkpoint", "configuration", "configuration_digest", "generation"),
    *("score", "published"),
)
HEAD = ("method", "tokens", *(column.replace("_", "-") for column in COLUMNS.values()), "average")


@dataclass
class Row:
    """Runs that belong together. part: which questions, in words, "" for all of them; base: a digest of whatever a run
    must share with the unpruned one that it is compared with."""

    checkpoint: str
    method: str
    tokens: str
    label: str
    part: str
    base: str
    folders: dict[str, Path] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def unpruned(self) -> bool:
        return self.method == "none"

    @property
    def size(self) -> float:
        return {"all": float("inf"), "0": -1.0}.get(self.tokens) or float(self.tokens)


@dataclass
class Line:
    """One printed line; kind is "ours", "published" or "difference". None where there is no number."""

    checkpoint: str
    kind: str
    label: str
    tokens: str
    scores: dict[str, float]
    average: tuple[float, int] | None


def collect(folders: Iterable[Path]) -> tuple[list[Row], list[str]]:
    """The rows that the runs in and below `folders` make, unpruned first, and what is to be said about them.

    Raises UserError for a folder without a run, and for two runs that would fill one cell.
    """
    rows: dict[str, Row] = {}
    notes: list[str] = []
    for folder in dict.fromkeys(Path(folder) for folder in folders):
        reports = sorted(folder.rglob("run.json"))
        if not reports:
            raise UserError(
                f"{folder}: holds no run (a folder with run.json); allowed are run folders and those above them"
            )
        for path in reports:
            _add(read_record(path, _NEEDED), path.parent, rows, notes)
    ordered = sorted(rows.values(), key=lambda row: (row.checkpoint, row.part, row.base, -row.size, row.label))
    return ordered, list(dict.fromkeys(notes))


def _add(report: dict, folder: Path, rows: dict[str, Row], notes: list[str]) -> None:
    name = report["benchmark"]
    if name not in TABLE or report["split"] != BENCHMARKS[name].splits[0]:
        return
    if report["score"] is None:
        notes.append(f"{folder}: is not finished, so it is left out")
        return
    if report["published"] is None:
        notes.append(f"{folder}: has no score, only a file to upload, so it is left out")
        return
    configuration, generation = report["configuration"], dict(report["generation"])
    generation.pop("max_new_tokens")  # the benchmark's own
    base = digest_of([report["checkpoint"]["content"], generation, report["asked"]])
    key = digest_of([base, report["configuration_digest"]])
    label = label_of(configuration)
    asked = report["asked"]
    part = f"subset of {asked['subset']}, seed {asked['seed']}" if asked["subset"] else ""
    part = f"first {asked['limit']}" if asked["limit"] else part
    label += f" [{part}]" if part else ""
    row = rows.setdefault(
        key, Row(report["checkpoint"]["name"], configuration["method"], report["tokens"], label, part, base)
    )
    if row.folders.setdefault(name, folder).resolve() != folder.resolve():
        raise UserError(f"{folder} and {row.folders[name]} are runs of {name} under the same configuration; name one")
    row.scores[name] = report["published"]
    if report["score"].get("partial") and not part:
        notes.append(f"{folder}: scored on {report['score']['partial']}")
    if report["score"].get("judge"):
        notes.append(f"MM-Vet graded by {report['score']['judge']}; the published numbers are graded by GPT-4")


def label_of(configuration: dict) -> str:
    """A configuration's method, with its options and whatever else is not as it is by default, but the budget."""
    usual = AdaVConfig().to_dict()
    said = {name: value for name, value in configuration.items() if name in usual and value != usual[name]}
    said = {name: value for name, value in said.items() if name not in ("method", "overall_tokens", "options")}
    said |= configuration["options"]
    named = ", ".join(f"{name}={json.dumps(value) if value is True else value}" for name, value in said.items())
    return configuration["method"] + (f" ({named})" if named else "")


def lines_of(rows: list[Row], model: str | None) -> tuple[list[Line], list[str]]:
    """Rows of one checkpoint, with those published for `model` beside them, and notes."""
    notes, lines = [], []
    unpruned = {row.base: row for row in rows if row.unpruned}
    published = [row for row in published_rows() if row.model == model]
    whole = next((row for row in published if row.unpruned), None)
    printed = set()
    for row in rows:
        plain = unpruned.get(row.base)
        if plain is None:
            notes.append(
                f"{row.label}: no average, which needs runs of the same checkpoint and questions with --method none"
            )
        ours = Line(
            row.checkpoint, "ours", row.label, row.tokens, row.scores, plain and average(row.scores, plain.scores)
        )
        lines.append(ours)
        for other in published:
            if other.method.lower() == row.method and (row.unpruned or str(other.tokens) == row.tokens):
                printed.add(other.method + str(other.tokens))
                theirs = _published(row.checkpoint, other, whole)
                lines += [theirs, _difference(ours, theirs)]
    rest = [other for other in published if other.method + str(other.tokens) not in printed]
    return lines + [_published(rows[0].checkpoint, other, whole) for other in rest], list(dict.fromkeys(notes))


def _published(checkpoint: str, row: PublishedRow, whole: PublishedRow) -> Line:
    tokens = "all" if row.unpruned else str(row.tokens)
    return Line(checkpoint, "published", row.method, tokens, row.scores, average(row.scores, whole.scores))


def _difference(ours: Line, theirs: Line) -> Line:
    scores = {name: value - theirs.scores[name] for name, value in ours.scores.items()}
    # Of averages over different columns there is no difference.
    same = ours.average and ours.average[1] == theirs.average[1]
    gap = (ours.average[0] - theirs.average[0], ours.average[1]) if same else None
    return Line(ours.checkpoint, "difference", ours.label, ours.tokens, scores, gap)


def cells(line: Line) -> list[str]:
    """The cells of a line as text; differences carry their sign."""
    number = "{:+.2f}".format if line.kind == "difference" else "{:.2f}".format
    label = {"ours": line.label, "published": f"{line.label}, published", "difference": "difference"}[line.kind]
    mean = "-"
    if line.average:
        value, columns = line.average
        mean = number(value) + ("" if columns == len(TABLE) else f" ({columns}/{len(TABLE)})")
    scores = [number(line.scores[name]) if name in line.scores else "-" for name in TABLE]
    return [label, line.tokens, *scores, mean]


def as_markdown(tables: dict[str, list[Line]]) -> str:
    return "\n\n".join(
        f"{name}\n\n{markdown_table([HEAD, *map(cells, lines)], left=1)}" for name, lines in tables.items()
    )


def as_latex(tables: dict[str, list[Line]]) -> str:
    parts = []
    for name, lines in tables.items():
        body = [HEAD, *map(cells, lines)]
        text = [" & ".join(map(_escaped, row)) + r" \\" for row in body]
        rules = [r"\hline", text[0], r"\hline", *text[1:], r"\hline"]
        columns = "l" + "r" * (len(HEAD) - 1)
        parts.append("\n".join([f"% {name}", rf"\begin{{tabular}}{{{columns}}}", *rules, r"\end{tabular}"]))
    return "\n\n".join(parts)


def _escaped(text: str) -> str:
    return "".join("\\" + letter if letter in "&%$#_{}" else letter for letter in text)


def as_csv(tables: dict[str, list[Line]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["checkpoint", "row", "method", "tokens", *COLUMNS.values(), "average", "average_columns"])
    for lines in tables.values():
        for line in lines:
            scores = [round(line.scores[name], 4) if name in line.scores else None for name in TABLE]
            mean = [round(line.average[0], 4), line.average[1]] if line.average else [None, None]
            writer.writerow([line.checkpoint, line.kind, line.label, line.tokens, *scores, *mean])
    return text.getvalue().rstrip("\n")


FORMATS = {"markdown": as_markdown, "csv": as_csv, "latex": as_latex}


def render(rows: list[Row], notes: list[str], style: str = "markdown", published: str | None = None) -> tuple[str, str]:
    """(the tables, one per checkpoint; what is to be said below them), as text."""
    tables, notes = by_checkpoint(rows, notes, published)
    return FORMATS[style](tables), "\n".join(notes)


def by_checkpoint(
    rows: list[Row], notes: list[str], published: str | None = None
) -> tuple[dict[str, list[Line]], list[str]]:
    """(checkpoint -> its lines, notes).

    published: whose published rows stand beside; None takes those of a checkpoint of the same name, "none" none.
    """
    groups = defaultdict(list)
    for row in rows:
        groups[row.checkpoint].append(row)
    tables, notes = {}, list(notes)
    for name, group in groups.items():
        model = published or (name if name in published_models() else None)
        tables[name], more = lines_of(group, model)
        notes += more
        if model in published_models():
            notes.append(f"published: README of JiayiV/AdaV, {model}; differences are ours less published")
    return tables, notes


def show_runs(folders: list[Path], output: Path) -> str:
    """The table of some runs, with the unpruned rows that lie in `output` beside them."""
    mine, notes = collect(folders)
    keys = {(row.base, row.label, row.tokens) for row in mine}
    bases = {row.base for row in mine}
    every, _ = collect([output])
    rows = [r for r in every if (r.base, r.label, r.tokens) in keys or (r.unpruned and r.base in bases)]
    table, said = render(rows, notes)
    return f"\n{table}\n{said}".rstrip()
