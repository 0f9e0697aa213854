"""Accuracy by the number of crops that are encoded, against all crops: adav_zoom, and the option `crops` of two methods.

    python benchmarks/adav_zoom_crops.py [--split validation|test] [--methods adav] [--questions 600] [--output FILE.csv]
    python benchmarks/adav_zoom_crops.py --table benchmarks/results/adav_zoom_crops-*.csv    # into docs/comparison.md

The default of `crops` is chosen on the validation pictures of the demo task and on nothing else; the test split is for
the documentation. Every picture is encoded once for each method that reads other states, and its tiles are shared by all
cells. An answer is right if its first word is the label. Intervals are 95 % bootstrap intervals over pictures, with the
same draws in all cells; differences are paired, question by question, against the same method with all crops.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from page import made, number, put_results
from PIL import Image
from record import RESULTS, how, write_csv

from llava.common.command_line import percents
from llava.common.errors import UserError, exits_cleanly
from llava.common.files import REPOSITORY
from llava.common.progress import progress_bar
from llava.common.rounding import floor_share
from llava.common.text_table import markdown_table
from llava.config import AdaVConfig
from llava.costs.measure import predicted
from llava.costs.model_shape import ImageCounts
from llava.eval.benchmarks.questions import read_lines
from llava.eval.scoring.bootstrap import cluster_intervals
from llava.inference.loaded_checkpoint import LoadedCheckpoint
from llava.model.decoding.sampling import Sampling
from llava.model.encoded_images import EncodedImage
from llava.shapes.dataset import PER_IMAGE, write_dataset
from llava.shapes.vocabulary import QUESTION_TYPES

FAMILY, BATCH = "v1.6", 32
# Method with all crops -> the settings that are compared with it.
SETTINGS = {
    "adav": [
        *(("adav_zoom", {"crops": crops}) for crops in (0, 1, 2, 3)),
        *(("adav_zoom", {"crop_share": share}) for share in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)),
    ],
    "fastervlm": [("fastervlm", {"crops": crops}) for crops in (1, 2)],
    "visionzip": [("visionzip", {"crops": crops}) for crops in (1, 2)],
}


@dataclass
class Cell:
    """A setting at a budget. right: per question, whether the answer is right; tiles, flops: per question.

    against: the cell of the same method with all crops; None for that cell itself.
    """

    config: AdaVConfig
    percent: float
    against: Cell | None = None
    right: list[bool] = field(default_factory=list)
    tiles: list[int] = field(default_factory=list)
    flops: list[int] = field(default_factory=list)


def cells(methods: list[str], budgets: list[float], full: float) -> Iterator[Cell]:
    """All cells. methods: keys of SETTINGS; budgets: percent of `full`, the vision tokens of a picture, mean."""
    for percent in budgets:
        tokens = floor_share(percent / 100, full)
        for whole in methods:
            reference = Cell(AdaVConfig(method=whole, overall_tokens=tokens), percent)
            yield reference
            for method, options in SETTINGS[whole]:
                yield Cell(AdaVConfig(method=method, overall_tokens=tokens, options=options), percent, reference)


class Task:
    """A demo checkpoint and the questions of a split."""

    def __init__(self, split: str, questions: int):
        self.loaded = LoadedCheckpoint(REPOSITORY / "playground" / f"llava-shapes-{FAMILY}", device="cpu")
        self.folder = REPOSITORY / "playground" / "train" / f"{split}-{FAMILY}-{questions}"
        write_dataset(FAMILY, split, questions, self.folder)
        self.rows = [row for _, row in read_lines(self.folder / "questions.jsonl")]
        self.labels = [row for _, row in read_lines(self.folder / "labels.jsonl")]
        self.pictures = [row["image"] for row in self.rows]
        self._encoded: dict[tuple, dict[str, EncodedImage]] = {}

    def tokens(self) -> float:
        """Vision tokens of a picture before selection, mean."""
        images = self._images(AdaVConfig(method="adav")).values()
        return statistics.mean(len(image.tokens.tile) for image in images)

    def _images(self, config: AdaVConfig) -> dict[str, EncodedImage]:
        """The encoded pictures by name. Settings that need the same encoding share them, tiles that were added later too."""
        encoding = self.loaded.model.encoding(config)
        if encoding not in self._encoded:
            found: dict[str, EncodedImage] = {}
            names = list(dict.fromkeys(self.pictures))
            for start in range(0, len(names), BATCH):
                part = names[start : start + BATCH]
                opened = [Image.open(self.folder / "images" / name).convert("RGB") for name in part]
                pixels = [self.loaded.pixels(image, config) for image in opened]
                found |= zip(part, self.loaded.encode(pixels, config), strict=True)
            # Methods that project late have an encoding of their own for each setting: those are not kept.
            if config.make_method().reads_features:
                self._encoded[encoding] = found
            return found
        return self._encoded[encoding]

    def answer(self, cell: Cell) -> None:
        """Answer all questions under the setting of a cell."""
        encoded, config = self._images(cell.config), cell.config
        for start in range(0, len(self.rows), BATCH):
            part, labels = self.rows[start : start + BATCH], self.labels[start : start + BATCH]
            images = [encoded[row["image"]] for row in part]
            prepared = self.loaded.splice([row["text"] for row in part], [[image] for image in images], config)
            answers = self.loaded.engine.generate(prepared, Sampling(1)).answers
            counts = [ImageCounts.from_plan(image.plan, self.loaded.shape.side) for image in images]
            cell.right += [a.text.strip() == own["answer"] for a, own in zip(answers, labels, strict=True)]
            cell.flops += [cost.total for cost in predicted(prepared, counts, self.loaded.shape, config)]
            chosen = [selection.tiles for (selection,) in prepared.selections]
            cell.tiles += [
                image.plan.tiles if own is None else len(own) for image, own in zip(images, chosen, strict=True)
            ]


def rows_of(task: Task, answered: list[Cell], split: str) -> list[dict]:
    """Rows of the results file. One bootstrap over all cells, so that all use the same draws."""
    right = {id(cell): np.array(cell.right, dtype=float) for cell in answered}
    compared = [cell for cell in answered if cell.against is not None]
    columns = [right[id(cell)] for cell in answered]
    columns += [right[id(cell)] - right[id(cell.against)] for cell in compared]
    mean, low, high = (100 * values for values in cluster_intervals(np.stack(columns, axis=1), task.pictures))
    kinds = defaultdict(list)
    for question, label in enumerate(task.labels):
        kinds[label["category"]].append(question)
    rows, difference = [], len(answered)
    for n, cell in enumerate(answered):
        row = {"split": split, "questions": len(task.rows), "budget_percent": cell.percent}
        row |= {"overall_tokens": cell.config.overall_tokens, "method": cell.config.method}
        row |= {"options": json.dumps(cell.config.options) if cell.config.options else ""}
        row |= {"tiles": statistics.mean(cell.tiles), "prefill_gflops": statistics.mean(cell.flops) / 1e9}
        row |= {"accuracy": mean[n], "accuracy_low": low[n], "accuracy_high": high[n]}
        if cell.against is not None:
            row |= {"difference": mean[difference]}
            row |= {"difference_low": low[difference], "difference_high": high[difference]}
            difference += 1
        row |= {f"accuracy_{kind}": 100 * right[id(cell)][kinds[kind]].mean() for kind in QUESTION_TYPES}
        rows.append({name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()})
    return rows


def means(rows: list[dict]) -> str:
    """Per setting, the mean accuracy over the budgets, and the mean number of tiles: what the default is chosen by."""
    found = defaultdict(list)
    for row in rows:
        found[row["method"], row["options"]].append(row)
    return "\n".join(
        f"{method} {options}: mean accuracy {statistics.mean(row['accuracy'] for row in own):.2f}, "
        f"{statistics.mean(row['tiles'] for row in own):.2f} tiles"
        for (method, options), own in found.items()
    )


def table(rows: list[dict]) -> str:
    """Markdown table of the rows of a results file, with a line about how they were made."""

    def interval(row: dict, name: str, form: str) -> str:
        values = [row[name + end] for end in ("", "_low", "_high")]
        return "" if values[0] is None else "{} [{}, {}]".format(*(format(value, form) for value in values))

    head = ("tokens", "method", "tiles", "GFLOPs", "accuracy, % [95 %]", "minus all crops [95 %]", *QUESTION_TYPES)
    lines = [head]
    for row in rows:
        cells = [f"{row['budget_percent']:g} %", " ".join(filter(None, (f"`{row['method']}`", _words(row["options"]))))]
        cells += [number(row["tiles"], 2), number(row["prefill_gflops"], 2)]
        cells += [interval(row, "accuracy", ".1f"), interval(row, "difference", "+.1f")]
        lines.append((*cells, *(number(row[f"accuracy_{kind}"], 1) for kind in QUESTION_TYPES)))
    about = f"The {rows[0]['split']} split, {number(rows[0]['questions'])} questions. {made(rows)}."
    return f"{about}\n\n{markdown_table(lines)}"


def _words(options: str | None) -> str:
    """Options as the page shows them: `crops` 2."""
    return ", ".join(f"`{name}` {value}" for name, value in json.loads(options or "{}").items())


@exits_cleanly
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--questions", type=int, default=600)
    parser.add_argument("--methods", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="default: all of them")
    parser.add_argument("--budgets", type=percents, default="25,10,5", help="%% of the vision tokens (25,10,5)")
    parser.add_argument("--output", type=Path, help="default: runs/benchmarks/adav_zoom_crops-<split>.csv")
    parser.add_argument(
        "--table", nargs="+", type=Path, metavar="CSV", help="put results into docs/comparison.md instead"
    )
    args = parser.parse_args()
    if args.table:
        put_results(REPOSITORY / "docs" / "comparison.md", "adav_zoom_crops", args.table, "tiles", table)
        return
    if args.questions < PER_IMAGE:
        raise UserError(f"--questions is {args.questions}, allowed is at least {PER_IMAGE}, which share a picture")
    # One thread, so that a rerun sums in the same order.
    torch.set_num_threads(1)
    args.preset, args.repeats, args.dtype, args.given = f"llava-shapes-{FAMILY}", 1, "float32", sys.argv[1:]
    task = Task(args.split, args.questions)
    answered: list[Cell] = []
    output = args.output or RESULTS / f"adav_zoom_crops-{args.split}.csv"
    todo = progress_bar("measuring", [*cells(args.methods, args.budgets, task.tokens())], unit=" cells")
    for cell in todo:
        task.answer(cell)
        answered.append(cell)
    rows = rows_of(task, answered, args.split)
    write_csv(output, rows, how(args, "adav_zoom_crops.py", "cpu"))
    print(f"{means(rows)}\n{output}")


if __name__ == "__main__":
    main()
