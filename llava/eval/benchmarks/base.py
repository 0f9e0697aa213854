"""Benchmark, the base class of all benchmarks: files in LLaVA's layout, a prompt per row, a score or an upload file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from pathlib import Path
from typing import Any, ClassVar

from llava.common.errors import UserError
from llava.common.find_checkpoint import EvalCheckpoint
from llava.eval.benchmarks.questions import Sample, check_images, read_questions
from llava.eval.benchmarks.subset import Subset
from llava.eval.scoring.match_answers import has_label, join, shown
from llava.eval.scoring.verdicts import Verdict


class Benchmark(ABC):
    """One split of one benchmark, for one run or one file of answers.

    A subclass says where its files are (`question_file`, `image_folder`, `annotation_files`), what to ask (`prompt`),
    which labels there are (`annotations`), and how answers are judged (`score`). One that reads another format than
    LLaVA's .jsonl overrides `read`.

    data_root   folder with one sub-folder per benchmark (LLaVA's playground/data/eval)
    checkpoint  the checkpoint whose answers are scored; None if only a file of answers is known
    split       one of `splits`; None takes the first
    """

    name: ClassVar[str]
    splits: ClassVar[tuple[str, ...]] = ("test",)
    max_new_tokens: ClassVar[int] = 128  # LLaVA's model_vqa_loader
    download_page: ClassVar[str | None] = None
    headline: ClassVar[str | None] = None  # key of the score that published tables print; None: only an upload file
    duration: ClassVar[str | None] = None  # how long a whole run takes, where that is known; said at the start
    points: ClassVar[bool] = False  # True: scores are points, not shares between 0 and 1
    repeats: ClassVar[bool] = False  # True: the same question may be asked, and labelled, several times

    def __init__(self, data_root: Path, checkpoint: EvalCheckpoint | None, split: str | None = None):
        if split is not None and split not in self.splits:
            raise UserError(f'benchmark {self.name} has no split "{split}", allowed are {", ".join(self.splits)}')
        self.data_root = Path(data_root)
        self.checkpoint = checkpoint
        self.split = split or self.splits[0]
        #: The part of the split that is asked, in words for the score ("the first 100 of 5,000"); None: all of it.
        self.partial: str | None = None

    @property
    @abstractmethod
    def question_file(self) -> Path: ...

    @property
    @abstractmethod
    def image_folder(self) -> Path: ...

    @abstractmethod
    def score(self, samples: list[Sample], rows: list[dict], folder: Path) -> dict:
        """Return the content of score.json: a score, or the path of an upload file that this call writes.

        rows[i] is the answer to samples[i], a row of merge.jsonl. folder: folder of the run, for further files.
        Answers and annotations are joined by key, never by order. Raises UserError for an answer without annotation,
        and, unless `self.partial`, for an annotation without answer.
        """

    def verdicts(self, samples: list[Sample], rows: list[dict], folder: Path) -> list[Verdict] | None:
        """Return the verdict of each answer, in the order of `samples`; None if only a server can judge them.

        samples, rows, folder: as for `score`, of a run that has been scored. The verdicts' `terms` add up to the
        headline of that score.
        """
        return None

    def finish(self, samples: list[Sample], rows: list[dict], folder: Path) -> dict:
        """Return the score of a finished run, with a label if only a part of the split was asked."""
        label = {"partial": self.partial} if self.partial else {}
        return {**label, **self.score(samples, rows, folder)}

    def published(self, score: dict) -> float | None:
        """Return the number of a score that published tables print: percent or points. None if there is no score."""
        if self.headline is None or self.headline not in score:
            return None
        return score[self.headline] * (1 if self.points else 100)

    def make_data(self) -> None:  # noqa: B027 (nothing to make is the usual case)
        """Build files that need no download. Does nothing if they exist."""

    def prompt(self, row: dict) -> str:
        """Return the question as the model reads it, without image placeholder and conversation template."""
        return row["text"]

    def group(self, sample: Sample) -> Hashable:
        """Return the group of a sample. The samples of a group are scored together, so a subset takes whole groups.

        By default each sample is its own group. MMBench groups the rotations of a question, MME the pair of an image.
        """
        return sample.key

    def annotation_files(self) -> list[Path]:
        """Return the files and folders that are needed to score answers or to write their upload file."""
        return []

    def annotations(self) -> tuple[Path, list[tuple[Hashable, Any]]] | None:
        """(file or folder, (key, label) pairs) of all labels; None where this machine has none.

        Raises UserError for a label that no answer could be judged by.
        """
        return None

    def key(self, sample: Sample) -> Hashable:
        """The key of a question in `annotations`."""
        return sample.question_id

    def check_label(self, key: Hashable, labels: list, source: Path) -> None:  # noqa: B027 (most have one label)
        """UserError where the labels of one question contradict each other."""

    def needed_files(self) -> list[Path]:
        """Return the files and folders that must exist before a run starts."""
        # The annotations too: a run of many hours should not fail at its score.
        return [self.question_file, self.image_folder, *self.annotation_files()]

    def read(self) -> list[Sample]:
        """Return all samples of the split, without a look at their images."""
        return read_questions(self.question_file, self.prompt)

    def load(self, limit: int | None = None, subset: Subset | None = None, partial: bool = False) -> list[Sample]:
        """The checked samples of this benchmark: all, the first `limit`, or a drawn `subset`.

        Sets `self.partial` where they are not all. Raises UserError for whatever is wrong, also for labels that do not
        match the questions; partial: a part of them has to match (`scorable`).
        """
        self.make_data()
        self._refuse_missing(self.needed_files())
        every = self.read()
        samples = self.chosen(every, limit, subset)
        if len(samples) < len(every):
            first = f"the first {len(samples):,} of {len(every):,} questions"
            self.partial = subset.label(len(samples), len(every)) if subset else first
        self._matched(samples, partial)
        check_images(samples, self.image_folder, self.question_file)
        return samples

    def scorable(self, samples: list[Sample], partial: bool = False) -> list[Sample]:
        """The samples whose answers can be scored: all of them, or UserError where questions and labels do not match.

        partial: those that share no group with a question without label. Sets `self.partial` where they are not all, or
        where there are labels of other questions.
        """
        found, labels = self._matched(samples, partial)
        asked = self.partial or f"{len(samples):,} questions"
        if len(found) < len(samples):
            self.partial = f"{len(found):,} questions with a label, out of {asked}"
        elif self.partial is None and labels > len(found):
            self.partial = f"{len(found):,} of the {labels:,} questions that have a label"
        return found

    def _matched(self, samples: list[Sample], partial: bool) -> tuple[list[Sample], int]:
        """The samples that have a label, and the number of all labels."""
        annotations = self.annotations()
        if annotations is None:
            return samples, len(samples)
        source, labels = annotations
        answers = [(self.key(sample), "") for sample in samples]
        has = has_label([key for key, _ in answers], labels)
        without = [sample for sample, labelled in zip(samples, has, strict=True) if not labelled]
        asked, has = {key for key, _ in answers}, has_label([key for key, _ in labels], answers)
        surplus = [
            key for (key, _), used in zip(labels, has, strict=True) if not used and (self.repeats or key not in asked)
        ]
        if not partial and (without or (surplus and not self.partial)):
            raise UserError(self._mismatch(samples, source, without, [] if self.partial else surplus))
        groups = {self.group(sample) for sample in without}
        found = [sample for sample in samples if self.group(sample) not in groups]
        if not found:
            raise UserError(f"{source}: has labels of none of the {len(samples):,} questions of {self.question_file}")
        answers = [(self.key(sample), "") for sample in found]
        for key, (_, several) in join(answers, labels, source, partial or bool(self.partial), self.repeats).items():
            self.check_label(key, several, source)
        return found, len(labels)

    def _mismatch(self, samples: list[Sample], source: Path, without: list[Sample], surplus: list) -> str:
        """Return one sentence about how questions and labels differ."""
        parts = []
        if without:
            first = f"{without[0].question_id}, {without[0].place} of {self.question_file.name}"
            parts.append(f"has no label for {len(without):,} of {len(samples):,} questions (the first: {first})")
        if surplus:
            first = shown(surplus[0])
            parts.append(f"has {len(surplus):,} labels of questions that are not asked (the first: {first})")
        return f"{source}: {' and '.join(parts)}; --partial scores the questions that have a label, and says so"

    def chosen(self, every: list[Sample], limit: int | None, subset: Subset | None) -> list[Sample]:
        """Return the part of all samples that a run asks."""
        return subset.draw(every, self.group) if subset else every[:limit]

    def load_questions(self) -> list[Sample]:
        """Return all samples without checking their images. This is enough to score a file of answers."""
        self._refuse_missing([self.question_file, *self.annotation_files()])
        return self.read()

    def _refuse_missing(self, paths: list[Path]) -> None:
        missing = [path for path in paths if not path.exists()]
        if missing:
            hint = f"; {self.download_page} says where to get it" if self.download_page else ""
            more = f"; also missing: {', '.join(map(str, missing[1:]))}" if missing[1:] else ""
            raise UserError(f"{missing[0]}: missing, benchmark {self.name} needs it{hint}{more}")

    def upload_file(self, folder: Path, place: Path, suffix: str) -> Path:
        """Return the path of the upload file: place/<checkpoint>/<run>.<suffix>, the layout of LLaVA's scripts.

        If no checkpoint is known, the file is in `folder`, beside the answers.
        """
        if self.checkpoint is None:
            return folder / f"{self.name}-{self.split}-upload.{suffix}"
        return place / self.checkpoint.short_name / f"{folder.name}.{suffix}"
