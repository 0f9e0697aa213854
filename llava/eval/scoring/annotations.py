"""Annotation files of benchmarks, and the instructions that several benchmarks share."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

from llava.common.errors import UserError
from llava.common.files import read_json

# LLaVA's instructions, character by character: the checkpoints were trained with them.
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
OPTION_LETTER = "\nAnswer with the option's letter from the given choices directly."


@contextmanager
def told_when_malformed(path: Path):
    """Context that turns the error of a missing or malformed field of an annotation into a UserError with the path."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"{path}: an entry has no {error}, is this the benchmark's own file?") from None
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"{path}: an entry is not as the benchmark writes it ({error})") from None


def key_of(value, where: str) -> int | str:
    """Return the key of a label. UserError if it is neither a whole number nor a string."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise UserError(f"{where}: is known by {json.dumps(value)}, allowed is a whole number or a string")
    return value


def kind_of(value, where: str) -> str | None:
    """The benchmark's own type of a question, None where it has none; UserError where it is no string."""
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: its type is {json.dumps(value)}, allowed is a string")
    return value


def people_of(answers: list, where: str) -> list[str]:
    """Return the answers of people to one question. UserError if they are no list of at least two strings."""
    if not isinstance(answers, list) or len(answers) < 2 or not all(isinstance(answer, str) for answer in answers):
        raise UserError(f"{where}: its reference answers are {json.dumps(answers)}, allowed are two strings or more")
    return answers


def read_part(path: Path, name: str):
    """Return the value of `name` in a JSON file that contains one object. Raises UserError if it is not there."""
    whole = read_json(path)
    if not isinstance(whole, dict) or name not in whole:
        raise UserError(f'{path}: has no "{name}", is this the benchmark\'s own file?')
    return whole[name]
