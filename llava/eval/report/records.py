"""How runs were made: what is the same in all of them, what differs, and their commands."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass

from llava.eval.report.runs import RecordedRun

_PARTS = ("configuration", "checkpoint", "generation", "conversation", "environment")
_BUDGET = "configuration.overall_tokens"
_OF_SESSIONS = ("commit", "code", "shards", "devices", "batch_size", "ranks")


@dataclass(frozen=True)
class Cell:
    """A value as text, "-" where there is none; odd: not what most runs have."""

    text: str
    odd: bool


@dataclass(frozen=True)
class Records:
    """same: key -> the value of all runs. differing: keys; cells: one row per run, one cell per differing key."""

    same: dict[str, str]
    differing: list[str]
    cells: list[list[Cell]]


def records(runs: list[RecordedRun]) -> Records:
    """Configuration, generation settings and environment of runs, key by key."""
    tables = [_facts(run) for run in runs]
    keys = list(dict.fromkeys(key for table in tables for key in table))
    # What is empty in one run and has entries in another stands under the names of its entries.
    keys = [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]
    parts = list(dict.fromkeys(key.split(".")[0] for key in keys))
    keys.sort(key=lambda key: parts.index(key.split(".")[0]))  # also those that the first run lacks
    columns = {key: [table.get(key, "-") for table in tables] for key in keys}
    counted = {key: Counter(column) for key, column in columns.items()}
    if _BUDGET in counted:  # a run without a budget is like any other
        del counted[_BUDGET]["-"]
    same = {key: next(iter(count)) for key, count in counted.items() if len(count) == 1}
    differing = [key for key in keys if key not in same]
    usual = {key: counted[key].most_common(1)[0][0] for key in differing}
    cells = [
        [Cell(text, text in counted[key] and text != usual[key]) for key in differing for text in [columns[key][n]]]
        for n in range(len(runs))
    ]
    return Records(same, differing, cells)


def _facts(run: RecordedRun) -> dict[str, str]:
    """Dotted key -> value as text, of what a score or a time may depend on."""
    found = {}
    for part in _PARTS:
        _flatten(part, run.report.get(part), found)
    if not run.budgeted:
        found.pop(_BUDGET, None)  # it had no effect
    answered = [session for session in run.report["sessions"] if session.get("answered")]
    for name in _OF_SESSIONS:
        values = dict.fromkeys(_text(session[name]) for session in answered if name in session)
        if values:
            found[name] = "; ".join(values)
    return found


def _flatten(name: str, value, found: dict[str, str]) -> None:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            _flatten(f"{name}.{key}", inner, found)
    else:
        found[name] = _text(value)


def _text(value) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    return value if isinstance(value, str) else json.dumps(value)
