"""Parser and argument types whose errors are one sentence with exit code 2. Imports no torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from llava.common.errors import UserError

DTYPES = ("auto", "float32", "float16", "bfloat16")


class Parser(argparse.ArgumentParser):
    """ArgumentParser that raises UserError instead of printing argparse's usage text. Flags cannot be abbreviated."""

    def __init__(self, **kwargs):
        # With abbreviations, a mistyped flag can silently set another one, and a new flag can break an old command.
        super().__init__(**{"allow_abbrev": False, **kwargs})

    def error(self, message):
        raise UserError(f"{message}; --help lists all arguments")


def add_checkpoint_flags(parser: argparse.ArgumentParser, conversation: bool = True) -> None:
    """Add the flags of a command that loads a checkpoint: --model-base, --dtype, --threads and, unless `conversation` is
    False, --conv-mode. A command may set another default with set_defaults."""
    parser.add_argument("--model-base", help="LLM under a LoRA or projector-only checkpoint")
    parser.add_argument(
        "--dtype", default="auto", choices=DTYPES, help="auto: float32 on a CPU, the checkpoint's own dtype on a GPU"
    )
    add_threads_flag(parser)
    if conversation:
        parser.add_argument("--conv-mode", help="conversation template (default: the checkpoint's)")


def add_threads_flag(parser: argparse.ArgumentParser) -> None:
    """Add --threads (llava/common/threads.py)."""
    parser.add_argument(
        "--threads",
        type=positive,
        help="CPU threads of each process (default: $OMP_NUM_THREADS, else 1 for a small model and all cores for others)",
    )


def positive(text: str) -> int:
    """argparse type of a whole number of at least 1."""
    # isascii: "²".isdigit() is True, but int("²") raises.
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, allowed is a whole number of at least 1")
    return int(text)


def zero_or_more(text: str) -> int:
    """argparse type of a whole number of at least 0."""
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r}, allowed is a whole number of at least 0")
    return int(text)


def existing_folder(text: str) -> Path:
    """argparse type of a folder that exists."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text}")
    return Path(text)


def existing_file(text: str) -> Path:
    """argparse type of a file that exists."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return Path(text)


def percents(text: str) -> list[float]:
    """argparse type of a comma-separated list of different percentages between 0 and 100. Returns the largest first."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [0.0]  # fails the check below, so all mistakes get the same sentence
    if len(set(values)) < len(values) or not all(0 < value < 100 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r}, allowed are numbers above 0 and below 100, as in 25,10,5")
    return sorted(values, reverse=True)


def names(text: str) -> list[str]:
    """argparse type of a comma-separated list of different names."""
    found = [part.strip() for part in text.split(",")]
    if not all(found) or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r}, allowed are names with commas between them, each once")
    return found
