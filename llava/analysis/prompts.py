"""Shared parts of the attention analyses: arguments, prompts one at a time, measures of a row, and CSV files.

Prompts keep all vision tokens (method none), because the analyses ask where attention goes without any selection.
"""

from __future__ import annotations

import csv
import io
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from llava.common.command_line import Parser, add_checkpoint_flags, positive
from llava.common.errors import UserError
from llava.common.files import as_user_error_on_write, write_atomically
from llava.common.progress import progress_bar
from llava.common.rounding import floor_share
from llava.config import AdaVConfig
from llava.eval.benchmarks.questions import check_images, read_questions

TOP = (0.05, 0.10, 0.25)  # shares of the tokens whose attention is reported


def parser(prog: str, description: str, limit: int) -> Parser:
    """Parser with the arguments that all analyses have. limit: default number of questions."""
    made = Parser(prog=f"python -m {prog}", description=description)
    made.add_argument("checkpoint", help="folder or hub name")
    made.add_argument("--questions", type=Path, required=True, help="question file in LLaVA's layout (.jsonl)")
    made.add_argument("--images", type=Path, required=True, help="folder of its images")
    made.add_argument("--limit", type=positive, default=limit, help=f"only the first N questions ({limit})")
    made.add_argument("--out", type=Path, required=True, help="folder for the .csv files and the plot")
    add_checkpoint_flags(made)
    return made


def prompts(args: Namespace) -> Iterator[tuple]:
    """(LoadedCheckpoint, Sample, PreparedPrompt) of each question with an image. UserError for bad files.

    All files are checked before the model is loaded.
    """
    samples = [sample for sample in read_questions(args.questions)[: args.limit] if sample.image is not None]
    if not samples:
        raise UserError(f"{args.questions}: has no question with an image among its first {args.limit}")
    check_images(samples, args.images, args.questions)
    with as_user_error_on_write(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
    if args.conv_mode is not None:
        from llava.conversation import get_conversation

        get_conversation(args.conv_mode)
    # Imported late: these two import torch, and errors in the arguments should not wait for it.
    from llava.eval.runs.image_reader import UnreadableImage, read_image
    from llava.inference.loaded_checkpoint import LoadedCheckpoint

    config = AdaVConfig(method="none")
    loaded = LoadedCheckpoint(
        args.checkpoint, args.model_base, config, dtype=args.dtype, threads=args.threads, purpose="an analysis"
    )
    for sample in progress_bar("prompts", samples, unit=" questions"):
        try:
            image = read_image(args.images / sample.image)
        except UnreadableImage as error:
            raise UserError(
                f'{args.questions}, line {sample.line}: image "{sample.image}" cannot be read ({error})'
            ) from None
        yield loaded, sample, loaded.prepare([sample.prompt], [image], config, args.conv_mode)


def top_share(values: np.ndarray, share: float) -> np.ndarray:
    """[...] sum of the largest values of [..., P]; their number is floor(share * P), but at least one."""
    return np.sort(values, axis=-1)[..., -_count(share, values.shape[-1]) :].sum(axis=-1)


def top_set(values: np.ndarray, share: float) -> np.ndarray:
    """[..., P] bool: the values that top_share sums up. Of equal values, those with the lowest index."""
    order = np.argsort(-values, axis=-1, kind="stable")[..., : _count(share, values.shape[-1])]
    found = np.zeros(values.shape, dtype=bool)
    np.put_along_axis(found, order, True, axis=-1)
    return found


def _count(share: float, size: int) -> int:
    return max(1, floor_share(share, size))


def effective_share(values: np.ndarray) -> np.ndarray:
    """[...] exp(entropy) / P of distributions [..., P]: 1 if all values are equal, 1/P if one value is everything."""
    # 1e-30 avoids log(0); the term is 0 either way.
    entropy = -np.sum(values * np.log(np.maximum(values, 1e-30)), axis=-1)
    return np.exp(entropy) / values.shape[-1]


def write_csv(rows: list[dict], path: Path) -> None:
    """Write rows with the same fields as a CSV file. Floats have six digits after the point; NaN is an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _cell(value) for name, value in row.items()})
    write_atomically(path, text.getvalue())


def _cell(value):
    if isinstance(value, (float, np.floating)):
        return "" if np.isnan(value) else round(float(value), 6)
    return value
