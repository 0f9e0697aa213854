"""Rows of a user's own question or answer file: JSON lines, CSV, or a folder of the Hugging Face library `datasets`.

A row is a dict. In CSV, an empty cell is a missing field, and a cell of `images` or `answers` may hold a JSON list.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llava.common.errors import UserError, first_line
from llava.common.files import as_user_error_on_write
from llava.eval.benchmarks.questions import read_lines

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_LISTS = ("images", "answers")
FORMATS = "a .jsonl, .csv or .tsv file, or a folder of the datasets library"


@dataclass(frozen=True)
class Picture:
    """An image that a data set holds itself. name: file name that it gets. content: bytes, or the path of a file."""

    name: str
    content: bytes | str

    def write(self, folder: Path) -> None:
        """Write the image into `folder`, unless it is there already."""
        content = self.content if isinstance(self.content, bytes) else Path(self.content).read_bytes()
        path = folder / self.name
        if not path.is_file() or path.read_bytes() != content:
            path.write_bytes(content)


def read_own_rows(path: Path, split: str | None = None) -> tuple[list[tuple[int, dict]], str]:
    """Return ((number, row) pairs, what the number counts: "line" or "row").

    split: of a folder with several. Images that a folder holds are Picture objects.
    Raises UserError for what cannot be read.
    """
    if path.is_dir():
        return _of_dataset(path, split), "row"
    if path.suffix in _SEPARATORS:
        return list(_of_table(path, _SEPARATORS[path.suffix])), "line"
    if path.suffix != ".jsonl":
        raise UserError(f"{path}: cannot be read as questions or answers, allowed is {FORMATS}")
    return read_lines(path), "line"


def _of_table(path: Path, separator: str) -> Iterator[tuple[int, dict]]:
    """Yield (line number, row) of a CSV file whose first line has the names of the fields."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, delimiter=separator, strict=True)
            for row in table:
                where = f"{path}, line {table.line_num}"
                # DictReader puts surplus cells under None, and fills missing ones with None.
                if None in row:
                    raise UserError(f"{where}: has more cells than the first line has names, quote cells with commas")
                cells = {name: value for name, value in row.items() if value not in (None, "")}
                if cells:
                    yield table.line_num, {name: _cell(name, value, where) for name, value in cells.items()}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a table ({error})") from None


def _cell(name: str, value: str, where: str):
    """Return the value of a cell: a list where the field may have several and the cell is a JSON list, else text."""
    if name not in _LISTS or not value.lstrip().startswith("["):
        return [value] if name in _LISTS else value
    try:
        return json.loads(value)
    except ValueError as error:
        raise UserError(f'{where}: "{name}" begins like a JSON list and is none ({error})') from None


def _of_dataset(folder: Path, split: str | None) -> list[tuple[int, dict]]:
    """Return the rows of a folder that `save_to_disk` wrote, or that `load_dataset` can read."""
    try:
        import datasets
    except ImportError:
        raise UserError(f'{folder}: folders need the datasets library: pip install "adav[prepare]"') from None
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    saved = any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))
    try:
        table = datasets.load_from_disk(str(folder)) if saved else datasets.load_dataset(str(folder))
    except Exception as error:  # pyarrow and datasets have no common exception
        raise UserError(f"{folder}: cannot be read by the datasets library ({first_line(error)})") from None
    if isinstance(table, dict):
        if split is None and len(table) > 1 or split is not None and split not in table:
            raise UserError(f"{folder}: --split is {split or 'not given'}, allowed are {', '.join(table)}")
        table = table[split or next(iter(table))]
    elif split is not None:
        raise UserError(f"{folder}: has no splits, so --split does not go with it")
    # decode=False: the files are written as they are. The second case is a column of lists of images.
    for name, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            table = table.cast_column(name, datasets.List(datasets.Image(decode=False)))
    return [(number, _row(number, row)) for number, row in enumerate(table, 1)]


def _row(number: int, row: dict) -> dict:
    """Return a row of a data set without its empty fields, with Picture objects for its images."""
    found = {name: value for name, value in row.items() if value is not None}
    if isinstance(found.get("image"), dict):
        found["image"] = _picture(f"{number:06d}", found["image"])
    if isinstance(found.get("images"), list):
        several = enumerate(found["images"], 1)
        found["images"] = [_picture(f"{number:06d}-{n}", one) if isinstance(one, dict) else one for n, one in several]
    return found


def _picture(stem: str, image: dict) -> Picture:
    """Return an image of the datasets library. image: {"bytes": ..., "path": ...}, of which one may be None."""
    # The library writes images that have no file as PNG. Pillow does not read the suffix anyway.
    return Picture(stem + (Path(image["path"] or "").suffix or ".png"), image["bytes"] or image["path"])


def write_pictures(pictures: list[Picture], folder: Path) -> None:
    """Write images into `folder`, which is made if needed. UserError if it cannot be written."""
    with as_user_error_on_write(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            picture.write(folder)
