"""Result files of the benchmarks: rows of figures with columns about how they were made, as CSV."""

from __future__ import annotations

import argparse
import csv
import io
import platform
import shlex
import time
from importlib.metadata import version
from pathlib import Path

import torch

from llava.common.errors import UserError
from llava.common.files import BASE, write_atomically
from llava.common.machine import commit, environment

#: Where a benchmark writes unless told: git ignores it. benchmarks/results has what the documentation shows.
RESULTS = BASE / "runs" / "benchmarks"
# Columns whose cells are words even where they look like numbers: a commit 4156e43, a Python 3.10.
WORDS = ("commit", "python", "torch", "transformers", "triton", "name")


def how(args: argparse.Namespace, script: str, device: str) -> dict:
    """Columns that say how figures were made. args: with preset, repeats, dtype and given (the command line)."""
    machine = environment()
    return {
        "preset": args.preset,
        "repeats": args.repeats,
        "backend": device,
        "device": torch.cuda.get_device_name() if device == "cuda" else machine["cpu"],
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "commit": commit(),
        "command": shlex.join(["python", f"benchmarks/{script}", *args.given]),
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def pick(device: str | None, dtype: str | None) -> tuple[str, str]:
    """(device, dtype) as given. Defaults: the GPU if there is one; bfloat16 on a GPU, float32 on a CPU.

    UserError for cuda without a GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but this torch sees no GPU")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return device, dtype or ("bfloat16" if device == "cuda" else "float32")


def write_csv(file: Path, rows: list[dict], made: dict | None = None) -> None:
    """Write a CSV with the columns of all `rows`, in the order of their first use. `made` is added to every row."""
    rows = [{**row, **(made or {})} for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, text.getvalue())


def read_text(path: Path, column: str) -> list[dict[str, str]]:
    """Rows of a results file as text. UserError if it cannot be read, has no rows, or does not have `column`."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not rows or column not in rows[0]:
        raise UserError(f"{path}: found no rows with a column {column}, allowed is what the benchmarks write")
    return rows


def read_csv(path: Path, column: str) -> list[dict]:
    """Rows as in read_text, but with numbers converted and None for empty cells."""
    return [{name: _value(name, cell) for name, cell in row.items()} for row in read_text(path, column)]


def _value(name: str, cell: str | None):
    if not cell:
        return None
    if name in WORDS:
        return cell
    try:
        return float(cell)
    except ValueError:
        return cell
