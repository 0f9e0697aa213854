"""Settings and environment of runs: what is the same in all of them, and what is different."""

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
    """A value as text, "-" if the run has none. odd: most runs have another value."""

    text: str
    odd: bool


@dataclass(frozen=True)
class Records:
    """Result of `records`.

    same: key -> value that all runs have. differing: the other keys. cells: one row per run, one cell per such key.
    """

    same: dict[str, str]
    differing: list[str]
    cells: list[list[Cell]]


def records(runs: list[RecordedRun]) -> Records:
    """Compare configuration, generation settings and environment of runs, key by key."""
    # 1. The keys, part by part.
    tables = [_facts(run) for run in runs]
    keys = list(dict.fromkeys(key for table in tables for key in table))
    # A dict that is empty in one run ("options") and has entries in another ("options.seed") is listed by its entries.
    keys = [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]
    parts = list(dict.fromkeys(key.split(".")[0] for key in keys))
    # Keys that the first run lacks go to their part too. The sort is stable, so the order within a part stays.
    keys.sort(key=lambda key: parts.index(key.split(".")[0]))
    # 2. The values of each key, and how many runs have each value.
    columns = {key: [table.get(key, "-") for table in tables] for key in keys}
    counted = {key: Counter(column) for key, column in columns.items()}
    # Methods without a budget ("none") have "-". They must not turn the common budget of the others into a difference.
    if _BUDGET in counted:
        del counted[_BUDGET]["-"]
    # 3. The same in all runs, or different; among different values, the most common one is the usual.
    same = {key: next(iter(count)) for key, count in counted.items() if len(count) == 1}
    differing = [key for key in keys if key not in same]
    usual = {key: counted[key].most_common(1)[0][0] for key in differing}
    cells = [
        [Cell(text, text in counted[key] and text != usual[key]) for key in differing for text in [columns[key][n]]]
        for n in range(len(runs))
    ]
    return Records(same, differing, cells)


def _facts(run: RecordedRun) -> dict[str, str]:
    """Return dotted key -> value as text, for everything that a score or a time may depend on."""
    found = {}
    for part in _PARTS:
        _flatten(part, run.report.get(part), found)
    # overall_tokens has no effect on a method without budget.
    if not run.budgeted:
        found.pop(_BUDGET, None)
    # Only sessions that answered something: a session that found nothing to do left no trace in the answers.
    answered = [session for session in run.report["sessions"] if session.get("answered")]
    for name in _OF_SESSIONS:
        values = dict.fromkeys(_text(session[name]) for session in answered if name in session)
        if values:
            found[name] = "; ".join(values)
    return found


def _flatten(name: str, value, found: dict[str, str]) -> None:
    """Put the leaves of nested dicts into `found` under dotted keys."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            _flatten(f"{name}.{key}", inner, found)
    else:
        found[name] = _text(value)


def _text(value) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    return value if isinstance(value, str) else json.dumps(value)
