"""Question files in LLaVA's format. Rows are checked before a model is loaded.

The key of a sample is (question_id, image, text), because some benchmarks use one question_id for several questions. If
even that repeats, the line number is added. Two identical lines are an error.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from llava.common.errors import UserError
from llava.common.progress import progress_bar
from llava.constants import DEFAULT_IMAGE_TOKEN

SHOWN = 100  # names of missing images in one message


@dataclass(frozen=True)
class Sample:
    """One question.

    row: the whole line of the question file. prompt: the text that goes into the conversation template.
    line, unit: number and kind of its place in the file; the unit is "line", "entry" or "row".
    more_images: further images after `image`, of a question about several.
    """

    line: int
    question_id: int | str
    image: str | None
    text: str
    prompt: str
    key: tuple
    row: dict
    unit: str = "line"
    more_images: tuple[str, ...] = ()

    @property
    def images(self) -> tuple[str, ...]:
        """All images of the question, in the order in which the prompt has them."""
        return () if self.image is None else (self.image, *self.more_images)

    @property
    def place(self) -> str:
        """The place of the question in its file, for messages."""
        return f"{self.unit} {self.line}"


def read_lines(path: Path) -> list[tuple[int, dict]]:
    """Return (line number, JSON object) for each line of a .jsonl file; blank lines are skipped.

    Raises UserError, with the line number, for a line that is no JSON object.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a text file ({error})") from None
    rows = []
    # split, not splitlines: that would also split at U+2028 and its like, which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: is no JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: found {type(row).__name__}, allowed is one JSON object per line")
        rows.append((number, row))
    return rows


def read_questions(path: Path, prompt=lambda row: row["text"]) -> list[Sample]:
    """Return the samples of a question file, in the order of the file.

    prompt: function from a row to the question, without image placeholder and template. By default the row's "text".
    Raises UserError for a malformed line (with its number), two identical lines, or an empty file.
    """
    return make_samples(read_lines(path), path, prompt)


def make_samples(
    rows: list[tuple[int, dict]], path: Path, prompt=lambda row: row["text"], unit: str = "line"
) -> list[Sample]:
    """Return samples for (number, row) pairs in LLaVA's format.

    Used for question files of other formats. unit: what the number counts. Raises UserError as `read_questions` does.
    """
    if not rows:
        raise UserError(f"{path}: holds no question, allowed is one JSON object per {unit}")
    for number, row in rows:
        _check_row(row, f"{path}, {unit} {number}")
    _refuse_identical(rows, path, unit)
    keys = [(row["question_id"], row.get("image"), row["text"]) for _, row in rows]
    # Only repeated keys get the line number: the others stay the same if lines are inserted or moved.
    repeated = {key for key, count in Counter(keys).items() if count > 1}
    samples = []
    for (number, row), key in zip(rows, keys, strict=True):
        full = (*key, number) if key in repeated else key
        samples.append(Sample(number, row["question_id"], row.get("image"), row["text"], prompt(row), full, row, unit))
    return samples


def refuse_repeated_ids(samples: list[Sample], path: Path) -> None:
    """Raise UserError if two samples share a question_id, for benchmarks that join answers by it alone."""
    first: dict[int | str, str] = {}
    for sample in samples:
        if sample.question_id in first:
            raise UserError(
                f"{path}, {sample.place}: question_id {sample.question_id} is already in "
                f"{first[sample.question_id]}, allowed is each once"
            )
        first[sample.question_id] = sample.place


def _check_row(row: dict, where: str) -> None:
    """Raise UserError if a row is not in LLaVA's format."""
    for name, kinds, allowed in (("question_id", (int, str), "a whole number or a string"), ("text", str, "a string")):
        if name not in row:
            raise UserError(f'{where}: has no "{name}", allowed is a row with "question_id", "text" and maybe "image"')
        # In Python a bool is an int.
        if not isinstance(row[name], kinds) or isinstance(row[name], bool):
            raise UserError(f'{where}: "{name}" is {json.dumps(row[name])}, allowed is {allowed}')
    image = row.get("image")
    if image is not None and (not isinstance(image, str) or not image):
        raise UserError(f'{where}: "image" is {json.dumps(image)}, allowed is a path inside the image folder')
    for name in ("question_id", "text", "image"):
        if not _is_text(str(row.get(name))):
            found = json.dumps(row[name])
            raise UserError(f'{where}: "{name}" is {found}, allowed is text without NUL or half a character')
    if DEFAULT_IMAGE_TOKEN in row["text"]:
        raise UserError(
            f'{where}: "text" holds {DEFAULT_IMAGE_TOKEN}, allowed is the bare question: the image is put before it'
        )


def _is_text(value: str) -> bool:
    """False for what no file name and no tokenizer takes: a NUL, or one half of a surrogate pair."""
    return "\0" not in value and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _refuse_identical(rows, path, unit) -> None:
    """Raise UserError if two rows are equal."""
    first = {}
    for number, row in rows:
        content = json.dumps(row, sort_keys=True)
        if content in first:
            raise UserError(f"{path}, {unit} {number}: is identical to {unit} {first[content]}, allowed is each once")
        first[content] = number


def check_images(samples: list[Sample], folder: Path, source: Path) -> None:
    """Check that every image exists inside `folder`. Raises UserError that names the first that does not.

    folder may itself be a link. A path that leads out of it (absolute, "..", a link inside it) is refused.
    """
    root = os.path.realpath(folder)
    if not os.path.isdir(root):
        raise UserError(f"{folder}: no such image folder")
    where = {}
    for sample in samples:
        for image in sample.images:
            where.setdefault(image, sample.place)
    # realpath asks the file system for each part of a path. With the folders resolved once, each image needs two calls,
    # which matters for 100,000 images on a network file system.
    parents: dict[str, str] = {}
    missing = []
    for image, place in progress_bar("checking images", where.items(), unit=" images"):
        path = os.path.join(root, image)
        parent, name = os.path.split(path)
        if parent not in parents:
            parents[parent] = os.path.realpath(parent)
        real = os.path.join(parents[parent], name)
        # The last part has to be resolved only if it is no plain name or is itself a link.
        if name in ("", ".", "..") or os.path.islink(real):
            real = os.path.realpath(real)
        if os.path.isabs(image) or not real.startswith(root + os.sep):
            raise UserError(
                f'{source}, {place}: image "{image}" leaves the image folder {folder}, allowed are paths inside it'
            )
        if not os.path.isfile(real):
            missing.append((image, place))
    if missing:
        image, place = missing[0]
        more = ""
        if len(missing) > 1:
            others = ", ".join(f'"{other}"' for other, _ in missing[1:SHOWN]) + (
                ", ..." if len(missing) > SHOWN else ""
            )
            more = f" ({len(missing)} of {len(where)} images are missing), and neither is {others}"
        raise UserError(f'{source}, {place}: image "{image}" is not in {folder}{more}')
