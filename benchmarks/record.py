"""What every benchmark writes: rows of figures, each with how they were made, in one CSV schema."""

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

from llava.eval.environment import commit, environment
from llava.eval.files import write_atomically

RESULTS = Path(__file__).resolve().parent / "results"


def how(args: argparse.Namespace, script: str, device: str) -> dict:
    """How the figures were made: a column each. `args` has preset, repeats, dtype and given (the command line)."""
    machine = environment()
    return {
        "preset": args.preset,
        "repeats": args.repeats,
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


def write_csv(file: Path, rows: list[dict], made: dict) -> None:
    """The columns of `rows`, then those of `made`, the same in every row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*rows[0], *made], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, **made} for row in rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, text.getvalue())
