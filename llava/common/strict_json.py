"""Strict reader for JSON files that people write by hand."""

from __future__ import annotations

import json
from pathlib import Path

from llava.common.errors import UserError


def read_json_object(path: Path, error: type[UserError] = UserError) -> dict:
    """The object that a JSON file holds.

    Raises `error` for a missing or unreadable file, and for what strict JSON does not allow: comments, NaN, a key that
    stands twice in an object. For a syntax error, the message names line and column.
    """
    # 1. Read the text.
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise error(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as cause:
        why = getattr(cause, "strerror", None) or cause
        raise error(f"{path}: cannot be read as a text file ({why})") from None

    # 2. Parse it. json.loads alone keeps the last of two equal keys and accepts NaN and Infinity, both silently.
    def unique(pairs):
        seen = dict(pairs)
        if len(seen) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise error(f'{path}: key "{twice}" is there twice, allowed is once')
        return seen

    def no_constant(name):
        raise error(f"{path}: found {name}, which JSON does not have; allowed are plain numbers")

    try:
        values = json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)
    except RecursionError:
        raise error(f"{path}: its values lie too deep in each other, allowed is plain JSON") from None
    except json.JSONDecodeError as cause:
        # 3. Show what stands at the error. Not splitlines(): the decoder counts "\n" alone.
        line = text.split("\n")[cause.lineno - 1]
        found = line[cause.colno - 1 :].strip()[:40]
        hint = "; JSON has no comments" if found.startswith(("//", "#", "/*")) else ""
        raise error(
            f"{path}: line {cause.lineno}, column {cause.colno}: "
            f"{'found ' + repr(found) if found else 'the file ends'}, allowed is plain JSON{hint}"
        ) from None
    if not isinstance(values, dict):
        raise error(f"{path}: found {type(values).__name__}, allowed is one JSON object")
    return values
