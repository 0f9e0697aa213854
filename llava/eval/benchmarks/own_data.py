"""mydata: the user's own questions and images, scored against the user's own answers.

    python -m llava.eval.launch mydata --questions q.jsonl --images DIR [--answers a.jsonl] [--metric exact]

Fields of a question: text; image or images, names inside DIR; question_id; answer or answers; type. The answers may be
in a file of their own, with question_id and answer or answers. Whole numbers and texts are the same id (7 and "7").
Without any question_id, questions are numbered from 1.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from llava.common.errors import UserError
from llava.common.find_checkpoint import EvalCheckpoint
from llava.eval.benchmarks.base import Benchmark
from llava.eval.benchmarks.own_rows import FORMATS, Picture, read_own_rows, write_pictures
from llava.eval.benchmarks.questions import Sample, make_samples, refuse_repeated_ids
from llava.eval.scoring.bootstrap import cluster_intervals
from llava.eval.scoring.match_answers import mean
from llava.eval.scoring.metrics import METRICS
from llava.eval.scoring.verdicts import Verdict, mean_by_kind, most_said

NAME = "mydata"
_FLAGS = ("questions", "images", "labels", "metric")


class OwnData(Benchmark):
    """Questions, images and answers of the user.

    questions, answers: files or folders that `read_own_rows` reads; answers is None if the questions have them, or if
    there are none. images: folder of the images; None is the folder of the questions. metric: a key of METRICS.
    split: of a folder of the datasets library.
    """

    name = NAME
    splits = ("all",)

    def __init__(
        self,
        questions: Path,
        images: Path | None = None,
        answers: Path | None = None,
        metric: str = "exact",
        checkpoint: EvalCheckpoint | None = None,
        split: str | None = None,
    ):
        self._questions, self._answers, self.metric = Path(questions), answers and Path(answers), metric
        super().__init__(self._questions.parent, checkpoint)
        self._images = Path(images) if images else self._questions.parent
        self.dataset_split = split
        self.headline = METRICS[metric].headline

    @classmethod
    def of_flags(cls, args: argparse.Namespace, checkpoint: EvalCheckpoint | None) -> OwnData:
        """Return the benchmark that the flags of `add_own_data_flags` describe. UserError without --questions."""
        if args.questions is None:
            raise UserError(f"{NAME} needs --questions FILE, allowed is {FORMATS}")
        metric = args.metric or "exact"
        return cls(args.questions, args.images, args.labels, metric, checkpoint, getattr(args, "split", None))

    @property
    def question_file(self) -> Path:
        return self._questions

    @property
    def image_folder(self) -> Path:
        return self._images

    def annotation_files(self) -> list[Path]:
        return [self._answers] if self._answers else []

    def arguments(self) -> dict[str, str | None]:
        """Return the arguments of this object, so that a run.json says how to make it again."""
        files = {"questions": self._questions, "images": self._images, "answers": self._answers}
        found = {name: path and str(path.resolve()) for name, path in files.items()}
        return found | {"metric": self.metric, "split": self.dataset_split}

    @cached_property
    def _rows(self) -> tuple[list[tuple[int, dict]], str]:
        """The rows of the questions with an id each, and what their numbers count."""
        rows, unit = read_own_rows(self._questions, self.dataset_split)
        if not any("question_id" in row for _, row in rows):
            if self._answers:
                raise UserError(f'{self._questions}: has no "question_id", which {self._answers} is joined by')
            rows = [(number, {"question_id": n, **row}) for n, (number, row) in enumerate(rows, 1)]
        return rows, unit

    def make_data(self) -> None:
        """Write the images that a folder of the datasets library holds into the image folder."""
        if not self._questions.is_dir():
            return
        pictures = [one for _, row in self._rows[0] for one in _listed_images(row) if isinstance(one, Picture)]
        if pictures and self._images == self._questions.parent:
            raise UserError(f"{self._questions}: holds its images itself; --images says where to write them")
        write_pictures(pictures, self._images)

    def read(self) -> list[Sample]:
        rows, unit = self._rows
        images = [_image_names(row, f"{self._questions}, {unit} {number}") for number, row in rows]
        asked = [
            (number, {**row, "image": names[0] if names else None})
            for (number, row), names in zip(rows, images, strict=True)
        ]
        # Pictures and lists are left out: the rows are compared as JSON.
        asked = [(number, {name: value for name, value in row.items() if name != "images"}) for number, row in asked]
        samples = make_samples(asked, self._questions, unit=unit)
        # All images are part of the key, because a run's identity is made of keys and prompts.
        samples = [
            replace(sample, more_images=names[1:], key=(*sample.key, *names[1:]))
            for sample, names in zip(samples, images, strict=True)
        ]
        refuse_repeated_ids([replace(sample, question_id=self.key(sample)) for sample in samples], self._questions)
        return samples

    def key(self, sample: Sample) -> str:
        """The id as text: a CSV file knows no numbers, a JSON file may have either."""
        return str(sample.question_id)

    def annotations(self) -> tuple[Path, list[tuple]] | None:
        source = self._answers or self._questions
        rows, unit = read_own_rows(source) if self._answers else self._rows
        labels, types = [], {}
        if self._answers:
            types = {str(row["question_id"]): row.get("type") for _, row in self._rows[0]}
        for number, row in rows:
            where = f"{source}, {unit} {number}"
            if not self._answers and "answer" not in row and "answers" not in row:
                continue
            if not isinstance(row.get("question_id"), (int, str)) or isinstance(row["question_id"], bool):
                raise UserError(f'{where}: has no "question_id", allowed is a whole number or a string')
            key = str(row["question_id"])
            kind = row.get("type", types.get(key))
            labels.append((key, (self._references(row, where), None if kind is None else str(kind))))
        # Questions alone are no mistake: they are answered, and nothing is scored.
        return (source, labels) if labels or self._answers else None

    def _references(self, row: dict, where: str) -> tuple[str, ...]:
        """Return the reference answers of a row. Raises UserError for none, and for too few for the metric."""
        given = [name for name in ("answer", "answers") if name in row]
        if len(given) != 1:
            raise UserError(f'{where}: has {" and ".join(given) or "no answer"}, allowed is "answer" or "answers"')
        values = row[given[0]] if isinstance(row[given[0]], list) else [row[given[0]]]
        for value in values:
            if not isinstance(value, (str, int, float)) or isinstance(value, bool) or not str(value).strip():
                raise UserError(f'{where}: "{given[0]}" holds {json.dumps(value, default=repr)}, allowed is text')
        needed = METRICS[self.metric].references
        if len(values) < needed:
            raise UserError(
                f"{where}: has {len(values)} answers, allowed with metric {self.metric} are {needed} or more"
            )
        return tuple(map(str, values))

    def score(self, samples: list[Sample], rows: list[dict], folder: Path) -> dict:
        verdicts = self.verdicts(samples, rows, folder)
        if verdicts is None:
            return {"questions": len(samples)}
        values = np.array([[verdict.value] for verdict in verdicts])
        _, low, high = cluster_intervals(values, [sample.image or sample.key for sample in samples])
        found = {
            self.headline: mean(verdict.value for verdict in verdicts),
            "interval": {"low": float(low[0]), "high": float(high[0])},
            "metric": self.metric,
            "questions": len(verdicts),
        }
        kinds = mean_by_kind(verdicts)
        return found | ({"per_type": kinds} if kinds else {})

    def verdicts(self, samples: list[Sample], rows: list[dict], folder: Path) -> list[Verdict] | None:
        annotations = self.annotations()
        if annotations is None:
            return None
        labels, value = dict(annotations[1]), METRICS[self.metric].value
        found = []
        for sample, row in zip(samples, rows, strict=True):
            references, kind = labels[self.key(sample)]
            found.append(Verdict.plain(value(row["text"], list(references)), most_said(references), [kind]))
        return found


def add_own_data_flags(parser: argparse.ArgumentParser, labels: tuple[str, ...]) -> None:
    """Add the flags of mydata. labels: the names of the flag for the file of reference answers."""
    group = parser.add_argument_group(NAME)
    group.add_argument("--questions", type=Path, metavar="FILE", help=FORMATS)
    group.add_argument("--images", type=Path, metavar="DIR", help="folder of the images (default: that of FILE)")
    group.add_argument(
        *labels, dest="labels", type=Path, metavar="FILE", help="reference answers, where FILE does not have them"
    )
    group.add_argument("--metric", choices=METRICS, help="exact match (default), VQA accuracy, ANLS or containment")


def refuse_own_data_flags(args: argparse.Namespace) -> None:
    """UserError if a flag of mydata is given to a command that evaluates something else."""
    given = [f"--{'answers' if name == 'labels' else name}" for name in _FLAGS if getattr(args, name) is not None]
    if given:
        raise UserError(f"{', '.join(given)} goes with the benchmark {NAME} alone")


def _listed_images(row: dict) -> list:
    """Return the images of a row, from `image` or `images`, as they stand there."""
    several = row.get("images")
    several = several if isinstance(several, list) else [several]
    return [one for one in [row.get("image"), *several] if one is not None]


def _image_names(row: dict, where: str) -> tuple[str, ...]:
    """Return the file names of a row's images. Raises UserError for `image` beside `images`, and for other than names."""
    if row.get("image") is not None and row.get("images") is not None:
        raise UserError(f'{where}: has "image" and "images", allowed is one of them')
    found = []
    for one in _listed_images(row):
        name = one.name if isinstance(one, Picture) else one
        if not isinstance(name, str) or not name or "\0" in name:
            raise UserError(
                f"{where}: an image is {json.dumps(one, default=repr)}, allowed is a path inside the folder"
            )
        found.append(name)
    return tuple(found)
