"""run.json of a run folder, read back and checked: what the table and the report may trust."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from llava.common.errors import UserError
from llava.common.files import read_json

_NUMBER = (int, float)
_MAYBE_NUMBER = (int, float, type(None))
_COUNT = (int, type(None))
# Dotted key -> types that its value may have. "*" stands for every entry of a list or an object.
_SHAPES: dict[str, tuple[type, ...]] = {
    "benchmark": (str,),
    "split": (str,),
    "asked": (dict,),
    "asked.limit": _COUNT,
    "asked.subset": _COUNT,
    "asked.seed": _COUNT,
    "tokens": (str,),
    "checkpoint": (dict,),
    "checkpoint.name": (str,),
    "checkpoint.content": (str, type(None)),
    "configuration": (dict,),
    "configuration.method": (str,),
    "configuration.options": (dict,),
    "configuration_digest": (str,),
    "generation": (dict,),
    "generation.max_new_tokens": (int,),
    "question_file": (str,),
    "questions": (int,),
    "environment": (dict,),
    "environment.cpu": (str, type(None)),
    "environment.gpus": (list,),
    "sessions": (list,),
    "sessions.*": (dict,),
    "sessions.*.command": (str,),
    "sessions.*.started": (str,),
    "sessions.*.outcome": (str,),
    "sessions.*.commit": (str, type(None)),
    "sessions.*.answered": (int,),
    "sessions.*.reused": (int,),
    "sessions.*.wall_seconds": _NUMBER,
    "score": (dict, type(None)),
    "score.partial": (str,),
    "published": _MAYBE_NUMBER,
}
# As _SHAPES, of what a run without answers, or of an earlier version, does not have.
_OPTIONAL: dict[str, tuple[type, ...]] = {
    "answered": (int,),
    "prefill_spread": _MAYBE_NUMBER,
    "seconds_per_stage": (dict,),
    "seconds_per_stage.*": _NUMBER,
    "vision_tokens_per_image": (dict,),
    "vision_tokens_per_image.*": _MAYBE_NUMBER,
    "prefill_flops_predicted": (dict,),
    "prefill_flops_predicted.*": _MAYBE_NUMBER,
    "kv_bytes_live": (dict,),
    "kv_bytes_live.*": _MAYBE_NUMBER,
}
_MISSING = object()


def read_record(path: Path, needed: Iterable[str]) -> dict:
    """The object of a run.json that has the keys `needed`; UserError names the value that no run writes."""
    report = read_json(path)
    for name in needed:
        if not isinstance(report, dict) or name not in report:
            raise UserError(f'{path}: has no "{name}", is this the record of a run?')
    for key, kinds in (_SHAPES | _OPTIONAL).items():
        if key.split(".")[0] in report:
            for value in _values(report, key.split(".")):
                if value is _MISSING and (key in _OPTIONAL or key == "score.partial"):
                    continue
                if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                    raise UserError(
                        f'{path}: "{key}" is missing or no value of that kind, is this the record of a run?'
                    )
    if report["tokens"] not in ("all", "0") and not report["tokens"].isdecimal():
        raise UserError(f'{path}: "tokens" is {report["tokens"]!r}, allowed are a number, all and 0')
    if report["score"] is None and report["published"] is not None:
        raise UserError(f'{path}: "published" is {report["published"]}, but "score" is null')
    return report


def _values(value, parts: list[str]) -> list:
    """Return the values of a dotted key in a value; _MISSING where there is no such entry."""
    if not parts:
        return [value]
    first, *rest = parts
    if first == "*":
        entries = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return [found for entry in entries for found in _values(entry, rest)]
    if value is None:  # a score that is not there has no parts
        return []
    return _values(value.get(first, _MISSING), rest) if isinstance(value, dict) else [_MISSING]
