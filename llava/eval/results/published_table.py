"""Finished runs in the form of the published table: seven benchmarks, and the mean of ratios to the unpruned row.

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
    """The runs of one checkpoint, configuration and part of the questions, which make one row.

    part: the part of the questions in words, "" for all. base: digest of everything that a run must have in common with
    the unpruned run that it is compared with. folders, scores: benchmark -> run folder, score.
    """

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
        """Budget as a number, for sorting."""
        return {"all": float("inf"), "0": -1.0}.get(self.tokens) or float(self.tokens)


@dataclass
class Line:
    """One printed line. kind: "ours", "published" or "difference". average: (value, number of columns), or None."""

    checkpoint: str
    kind: str
    label: str
    tokens: str
    scores: dict[str, float]
    average: tuple[float, int] | None


def collect(folders: Iterable[Path]) -> tuple[list[Row], list[str]]:
    """Return (the rows of the runs in and below `folders`, unpruned first; notes about them).

    Raises UserError for a folder without a run, and for two runs that belong in the same cell.
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
    """Add a run to its row, or a note if it has no score. Runs of other benchmarks and splits are skipped."""
    # 1. Does the run belong in the table?
    name = report["benchmark"]
    if name not in TABLE or report["split"] != BENCHMARKS[name].splits[0]:
        return
    if report["score"] is None:
        notes.append(f"{folder}: is not finished, so it is left out")
        return
    if report["published"] is None:
        notes.append(f"{folder}: has no score, only a file to upload, so it is left out")
        return
    # 2. Its row. max_new_tokens is left out, because it differs from benchmark to benchmark within one row.
    configuration, generation = report["configuration"], dict(report["generation"])
    generation.pop("max_new_tokens")
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
    # 3. Its score, and notes.
    row.scores[name] = report["published"]
    if report["score"].get("partial") and not part:
        notes.append(f"{folder}: scored on {report['score']['partial']}")
    if report["score"].get("judge"):
        notes.append(f"MM-Vet graded by {report['score']['judge']}; the published numbers are graded by GPT-4")


def label_of(configuration: dict) -> str:
    """Return the method of a configuration, its options, and all settings that are not the default, but no budget."""
    usual = AdaVConfig().to_dict()
    said = {name: value for name, value in configuration.items() if name in usual and value != usual[name]}
    said = {name: value for name, value in said.items() if name not in ("method", "overall_tokens", "options")}
    said |= configuration["options"]
    named = ", ".join(f"{name}={json.dumps(value) if value is True else value}" for name, value in said.items())
    return configuration["method"] + (f" ({named})" if named else "")


def lines_of(rows: list[Row], model: str | None) -> tuple[list[Line], list[str]]:
    """Return (lines, notes) for the rows of one checkpoint.

    model: the published rows of this model are added; None adds none. A published row with the method and budget of a
    row is printed below it, with the difference. All others come at the end.
    """
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
    """Return the line of a published row. whole: the published unpruned row."""
    # The average is computed from the row's scores, as for our rows, because the printed one is rounded.
    tokens = "all" if row.unpruned else str(row.tokens)
    return Line(checkpoint, "published", row.method, tokens, row.scores, average(row.scores, whole.scores))


def _difference(ours: Line, theirs: Line) -> Line:
    """Return the line of differences, ours less published."""
    scores = {name: value - theirs.scores[name] for name, value in ours.scores.items()}
    # Averages over different columns are different quantities and have no difference.
    same = ours.average and ours.average[1] == theirs.average[1]
    gap = (ours.average[0] - theirs.average[0], ours.average[1]) if same else None
    return Line(ours.checkpoint, "difference", ours.label, ours.tokens, scores, gap)


def cells(line: Line) -> list[str]:
    """Return the cells of a line as text. Differences have a sign."""
    number = "{:+.2f}".format if line.kind == "difference" else "{:.2f}".format
    label = {"ours": line.label, "published": f"{line.label}, published", "difference": "difference"}[line.kind]
    mean = "-"
    if line.average:
        value, columns = line.average
        mean = number(value) + ("" if columns == len(TABLE) else f" ({columns}/{len(TABLE)})")
    scores = [number(line.scores[name]) if name in line.scores else "-" for name in TABLE]
    return [label, line.tokens, *scores, mean]


def as_markdown(tables: dict[str, list[Line]]) -> str:
    """Return the tables in Markdown. tables: checkpoint -> lines."""
    return "\n\n".join(
        f"{name}\n\n{markdown_table([HEAD, *map(cells, lines)], left=1)}" for name, lines in tables.items()
    )


def as_latex(tables: dict[str, list[Line]]) -> str:
    """Return the tables in LaTeX, one tabular each. tables: checkpoint -> lines."""
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
    """Return one CSV table of all checkpoints, rounded to four decimals. tables: checkpoint -> lines."""
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
    """Return (the tables, one per checkpoint; the notes below them) as text. style: a key of FORMATS."""
    tables, notes = by_checkpoint(rows, notes, published)
    return FORMATS[style](tables), "\n".join(notes)


def by_checkpoint(
    rows: list[Row], notes: list[str], published: str | None = None
) -> tuple[dict[str, list[Line]], list[str]]:
    """Return (checkpoint -> its lines, notes).

    published: the model whose published rows are added. None takes the model with the name of the checkpoint, "none"
    adds no rows.
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
    """Return the table of some runs as text, with the unpruned rows in `output` that they are relative to."""
    # All runs in `output` are read, and those of the same rows kept: a row may have runs of earlier commands.
    mine, notes = collect(folders)
    keys = {(row.base, row.label, row.tokens) for row in mine}
    bases = {row.base for row in mine}
    every, _ = collect([output])
    rows = [r for r in every if (r.base, r.label, r.tokens) in keys or (r.unpruned and r.base in bases)]
    table, said = render(rows, notes)
    return f"\n{table}\n{said}".rstrip()
