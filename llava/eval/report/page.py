"""The HTML page, from comparisons, pictures and records. All text that comes from a run is escaped."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from llava.common.errors import UserError
from llava.common.scatter import REASON
from llava.eval.report import charts
from llava.eval.report.comparison import Comparison, compare
from llava.eval.report.pictures import Pictures
from llava.eval.report.records import records
from llava.eval.report.runs import RecordedRun
from llava.eval.results.plots import short_number
from llava.eval.results.published import COLUMNS
from llava.eval.results.published_table import HEAD, by_checkpoint, cells, collect
from llava.eval.scoring.annotations import SHORT_ANSWER
from llava.eval.scoring.bootstrap import LEVEL, RESAMPLES

TEXT = 600  # characters of an answer or a question that are shown; the rest is cut


def render(runs: list[RecordedRun], notes: list[str], examples: int) -> str:
    """Return the whole page as HTML.

    runs: judged runs, in the order of the page. notes: remarks about runs that are not in it. examples: number of
    flipped answers per comparison.
    """
    comparisons = compare(runs)
    # autoescape: an answer of a model may contain markup. StrictUndefined: a misspelt name in the template is an error.
    environment = Environment(
        autoescape=True,
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(short=short_number, cut=_cut, question=_question, bytes=_bytes, json=_json)
    pictures, filters = Pictures(), Filters.of(runs)
    html = environment.get_template("page.html.jinja").render(
        style=Path(__file__).with_name("style.css").read_text(encoding="utf-8"),
        title=_title(comparisons),
        overview=_overview(runs),
        filters=filters,
        head=HEAD,
        comparisons=comparisons,
        charts=charts,
        examples=examples,
        picture=lambda run, sample: _picture(pictures, run, sample),
        records=records(runs),
        runs=runs,
        notes=notes,
        scatter=REASON,
        level=f"{100 * LEVEL:g} %",
        resamples=f"{RESAMPLES:,}",
    )
    # An answer may contain half of a surrogate pair (from a \u escape in JSON), which cannot be written as UTF-8.
    return html.encode("utf-8", "replace").decode("utf-8")


@dataclass(frozen=True)
class Filters:
    """Filters of the page that work without a script: check boxes, and style rules that hide what is not checked."""

    benchmarks: list[str]
    checkpoints: list[str]

    @classmethod
    def of(cls, runs: list[RecordedRun]) -> Filters:
        names = ([run.name for run in runs], [run.checkpoint for run in runs])
        return cls(*(list(dict.fromkeys(each)) for each in names))

    @property
    def groups(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """(legend, (id, name) of each box); only those with a choice."""
        found = {"benchmark": self.benchmarks, "checkpoint": self.checkpoints}
        return [
            (what, [(f"{what}-{n}", name) for n, name in enumerate(names)])
            for what, names in found.items()
            if len(names) > 1
        ]

    def classes(self, run: RecordedRun) -> str:
        """Return the style classes of the parts of `run`. A filter hides all parts of one class."""
        return f"of-benchmark-{self.benchmarks.index(run.name)} of-checkpoint-{self.checkpoints.index(run.checkpoint)}"

    @property
    def rules(self) -> str:
        boxes = [box for _, boxes in self.groups for box, _ in boxes]
        return "\n".join(f"body:has(#{box}:not(:checked)) .of-{box} {{ display: none; }}" for box in boxes)


def _title(comparisons: list[Comparison]) -> str:
    """Return the title: the benchmarks and the checkpoints, at most three names of each."""

    def listed(names: list[str]) -> str:
        names = list(dict.fromkeys(names))
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    checkpoints = listed([comparison.first.checkpoint for comparison in comparisons])
    return f"{listed([comparison.first.name for comparison in comparisons])}: {checkpoints}"


def _overview(runs: list[RecordedRun]) -> list[dict]:
    """Return the table of llava.eval.table for each checkpoint; [] if no run is of a benchmark of that table."""
    rows, _ = collect([run.folder for run in runs if run.name in COLUMNS])
    tables, _ = by_checkpoint(rows, [])
    return [
        {"checkpoint": name, "lines": [(line.kind, cells(line)) for line in lines]} for name, lines in tables.items()
    ]


def _picture(pictures: Pictures, run: RecordedRun, sample) -> dict:
    """Return URL and size of a picture for the template, or the reason why there is none."""
    try:
        url, width, height = pictures.get(run, sample)
    except UserError as error:
        return {"url": None, "why": str(error)}
    return {"url": url, "width": width, "height": height}


def _cut(text: str) -> str:
    if not text.strip():
        return "(empty)"
    return text if len(text) <= TEXT else f"{text[:TEXT]}... ({len(text) - TEXT:,} more characters)"


def _question(text: str) -> str:
    """Return a question without the instruction that all questions of a benchmark end with."""
    return _cut(text.removesuffix(SHORT_ANSWER))


def _json(value) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _bytes(value: float | None) -> str:
    return (
        "-"
        if value is None
        else f"{short_number(float(f'{value:.3g}'))}B"
        if value >= 1e6
        else f"{value / 1000:,.0f} kB"
    )
