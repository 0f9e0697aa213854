"""Allowed values of all options: one table of rules for the configuration file and for every method."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from llava.common.errors import UserError


@dataclass(frozen=True)
class Rule:
    """One rule for values: `test` tells whether a value is allowed, `allowed` says in words what is."""

    allowed: str
    test: Callable[[Any], bool]


def iswhole(value) -> bool:
    """Return whether `value` is an integer. True and False are not, although bool is a subclass of int."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value) -> bool:
    """Return whether `value` is an integer or a float; True and False are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def whole(minimum: int, also: int | None = None) -> Rule:
    """Return the rule for integers of at least `minimum`, and the single value `also` where it is given."""
    words = f"a whole number of at least {minimum}" + ("" if also is None else f", or {also}")
    return Rule(words, lambda v: iswhole(v) and (v >= minimum or v == also))


def one_of(*values) -> Rule:
    """Return the rule for a fixed set of strings."""
    return Rule("one of " + ", ".join(json.dumps(v) for v in values), lambda v: isinstance(v, str) and v in values)


def _is_keep_list(value) -> bool:
    """Return whether `value` is a list of three counts, or of three shares, none above the one before it."""
    if not isinstance(value, list) or len(value) != 3:
        return False
    counts = all(iswhole(v) and v >= 1 for v in value)
    shares = all(isinstance(v, float) and 0 < v < 1 for v in value)
    return (counts or shares) and value == sorted(value, reverse=True)


BOOL = Rule("true or false", lambda v: isinstance(v, bool))


RATE = Rule("a number from 0 to below 1", lambda v: is_number(v) and 0 <= v < 1)


SHARE = Rule("a number from 0 to 1", lambda v: is_number(v) and 0 <= v <= 1)


OPTIONAL_SHARE = Rule("a number from 0 to 1, or null", lambda v: v is None or SHARE.test(v))


OBJECT = Rule("an object of method options", lambda v: isinstance(v, dict))


# Options of methods and of the image path, by name. The dataclass of a method says which of them it takes; this table
# says which values are allowed. It imports no torch, so the launcher can check a configuration before any model loads.
OPTION_RULES: dict[str, Rule] = {
    "min_share": Rule("a number from 0 to 0.5", lambda v: is_number(v) and 0 <= v <= 0.5),
    "temperature": Rule("a number above 0", lambda v: is_number(v) and 0 < v < float("inf")),
    "compat": Rule('"public" or null', lambda v: v is None or v == "public"),
    "seed": whole(0),
    "dominant": whole(1),
    "contextual": whole(0),
    "relevance": one_of("clip", "embeddings"),
    "text_tower": Rule("the folder or hub name of a CLIP checkpoint", lambda v: isinstance(v, str) and v.strip() != ""),
    "theta": RATE,
    "anchor_share": SHARE,
    "start": whole(0),
    "second_stage": BOOL,
    "salient_share": SHARE,
    "alpha": Rule("a number of at least 0", lambda v: is_number(v) and 0 <= v < float("inf")),
    "strength": Rule("a number of at least 0", lambda v: is_number(v) and 0 <= v < float("inf")),
    "crops": whole(0),
    "crop_share": SHARE,
    "positions": one_of("reindexed", "original"),
    "text_scope": one_of("after", "turn"),
    "anyres": one_of("official", "fastervlm"),
    "saliency": one_of("attention", "distance"),
    "detail_share": SHARE,
    "layer": whole(1),
    "ratio": Rule("a percentage above 0 and below 100", lambda v: is_number(v) and 0 < v < 100),
    "keep": Rule(
        "a list of three counts of at least 1, or of three shares below 1, none above the one before it", _is_keep_list
    ),
    "version": one_of("1.0", "2.0"),
    "table": Rule("the path of a FitPrune table file", lambda v: isinstance(v, str) and v != ""),
    "budget": one_of("last", "mean"),
}


# Methods whose compat "public" implies anyres "fastervlm", the tile path of their published numbers.
PUBLIC_TILES = frozenset({"adav", "hiprune"})


# Options that every method takes, with their defaults. They steer the code around the method, not the method itself.
COMMON_OPTIONS = {
    "positions": "reindexed",
    "text_scope": "after",
    "anyres": "official",
    "saliency": "attention",
    "detail_share": 0.0,
}


def check_options(method) -> None:
    """Raise UserError where an option of `method` is out of its range.

    method: a dataclass instance whose fields are its options. A value that is the default is not checked: for many
    options it is None, which means "not set" and which no rule allows.
    """
    for option in fields(method):
        value, rule = getattr(method, option.name), OPTION_RULES.get(option.name)
        if rule is not None and value is not option.default and not rule.test(value):
            raise UserError(f"option {option.name!r} is {value!r}, allowed is {rule.allowed}")
