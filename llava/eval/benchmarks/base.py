"""Base of every benchmark: files in LLaVA's layout, a prompt per row, and a score or an upload file at the end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from pathlib import Path
from typing import ClassVar

from llava.common.errors import UserError
from llava.common.find_checkpoint import EvalCheckpoint
from llava.eval.benchmarks.questions import Sample, check_images, read_questions
from llava.eval.benchmarks.subset import Subset
from llava.eval.scoring.verdicts import Verdict


class Benchmark(ABC):
    """One split of one benchmark, for one run or one file of answers.

    A subclass says where its files are (`question_file`, `image_folder`, `annotation_files`), what to ask (`prompt`),
    and how answers are judged (`score`). One that reads another format than LLaVA's .jsonl overrides `read`.

    data_root   folder with one sub-folder per benchmark (playground/data/eval as LLaVA users know it)
    checkpoint  whose answers are judged; None where only a file of answers is known
    split       one of `splits`, the first if None
    """

    name: ClassVar[str]
    splits: ClassVar[tuple[str, ...]] = ("test",)
    max_new_tokens: ClassVar[int] = 128  # LLaVA's model_vqa_loader
    download_page: ClassVar[str | None] = None
    headline: ClassVar[str | None] = None  # key of the score that published tables print; None: only an upload file
    duration: ClassVar[str | None] = None  # how long a whole run takes, where that is known; said at the start
    points: ClassVar[bool] = False  # True: scores are points, not shares between 0 and 1

    def __init__(self, data_root: Path, checkpoint: EvalCheckpoint | None, split: str | None = None):
        if split is not None and split not in self.splits:
            raise UserError(f'benchmark {self.name} has no split "{split}", allowed are {", ".join(self.splits)}')
        self.data_root = Path(data_root)
        self.checkpoint = checkpoint
        self.split = split or self.splits[0]
        #: What part of the split is asked, in words for the score ("the first 100 of 5,000"); None: all of it.
        self.partial: str | None = None

    @property
    @abstractmethod
    def question_file(self) -> Path: ...

    @property
    @abstractmethod
    def image_folder(self) -> Path: ...

    @abstractmethod
    def score(self, samples: list[Sample], rows: list[dict], folder: Path) -> dict:
        """What goes into score.json: a score, joined by the sample's key and never by order, or an upload file's path.

        samples[i] was answered by rows[i] (a row of merge.jsonl). folder: the run's, for further files. Annotations
        without an answer are an error unless `self.partial`; answers without an annotation always are.
        """

    def verdicts(self, samples: list[Sample], rows: list[dict], folder: Path) -> list[Verdict] | None:
        """What each answer is worth, in the order of `samples`; None where a server alone can tell.

        samples, rows, folder: as for `score`, of a run that is scored already. Their `terms` add up to its headline.
        """
        return None

    def finish(self, samples: list[Sample], rows: list[dict], folder: Path) -> dict:
        """The score of a finished run, labelled where only a part of the split was asked."""
        label = {"partial": self.partial} if self.partial else {}
        return {**label, **self.score(samples, rows, folder)}

    def published(self, score: dict) -> float | None:
        """The number of a score that published tables print: percent, or points. None: the server alone knows it."""
        if self.headline is None or self.headline not in score:
            return None
        return score[self.headline] * (1 if self.points else 100)

    def make_data(self) -> None:  # noqa: B027 (nothing to make is the usual case)
        """Build files that need no download; does nothing where they are there."""

    def prompt(self, row: dict) -> str:
        """The question as the model reads it, without image placeholder and conversation template."""
        return row["text"]

    def group(self, sample: Sample) -> Hashable:
        """Samples of one group are scored together (rotations, pairs): a subset takes whole groups. Here each alone."""
        return sample.key

    def annotation_files(self) -> list[Path]:
        """Files and folders without which answers cannot be scored, or their upload file not be written."""
        return []

    def needed_files(self) -> list[Path]:
        """Files and folders without which the run could not be scored in the end; checked before it starts."""
        return [self.question_file, self.image_folder, *self.annotation_files()]

    def read(self) -> list[Sample]:
        return read_questions(self.question_file, self.prompt)

    def load(self, limit: int | None = None, subset: Subset | None = None) -> list[Sample]:
        """The checked samples of this benchmark: all, the first `limit`, or a drawn `subset`.

        Sets `partial` where they are not all. Raises UserError for whatever is wrong.
        """
        self.make_data()
        self._refuse_missing(self.needed_files())
        every = self.read()
        samples = self.chosen(every, limit, subset)
        if len(samples) < len(every):
            first = f"the first {len(samples):,} of {len(every):,} questions"
            self.partial = subset.label(len(samples), len(every)) if subset else first
        check_images(samples, self.image_folder, self.question_file)
        return samples

    def chosen(self, every: list[Sample], limit: int | None, subset: Subset | None) -> list[Sample]:
        """The part of all samples that a run asks."""
        return subset.draw(every, self.group) if subset else every[:limit]

    def load_questions(self) -> list[Sample]:
        """The samples without their images: what scoring a file of answers needs."""
        self._refuse_missing([self.question_file, *self.annotation_files()])
        return self.read()

    def _refuse_missing(self, paths: list[Path]) -> None:
        missing = [path for path in paths if not path.exists()]
        if missing:
            hint = f"; {self.download_page} says where to get it" if self.download_page else ""
            more = f"; also missing: {', '.join(map(str, missing[1:]))}" if missing[1:] else ""
            raise UserError(f"{missing[0]}: missing, benchmark {self.name} needs it{hint}{more}")

    def upload_file(self, folder: Path, place: Path, suffix: str) -> Path:
        """Where the upload file goes: place/<checkpoint>/<run>.<suffix>, as LLaVA's scripts lay them out.

        Beside the answers, in `folder`, where no checkpoint is known.
        """
        if self.checkpoint is None:
            return folder / f"{self.name}-{self.split}-upload.{suffix}"
        return place / self.checkpoint.short_name / f"{folder.name}.{suffix}"
