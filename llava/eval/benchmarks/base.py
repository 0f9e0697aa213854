"""Base of every benchmark: files in LLaVA's layout, a prompt per row, and a score or an upload file at the end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from llava.errors import UserError
from llava.eval.checkpoints import EvalCheckpoint
from llava.eval.samples import Sample, check_images, read_questions


class Benchmark(ABC):
    """One benchmark for one run.

    A subclass says where its files are (`question_file`, `image_folder`), what to ask (`prompt`), and how the merged
    answers are judged (`finish`). One that reads another format than LLaVA's .jsonl overrides `read`.

    data_root   folder with one sub-folder per benchmark (playground/data/eval as LLaVA users know it)
    """

    name: ClassVar[str]
    max_new_tokens: ClassVar[int] = 128  # LLaVA's model_vqa_loader
    download_page: ClassVar[str | None] = None

    def __init__(self, data_root: Path, checkpoint: EvalCheckpoint):
        self.data_root = Path(data_root)
        self.checkpoint = checkpoint

    @property
    @abstractmethod
    def question_file(self) -> Path: ...

    @property
    @abstractmethod
    def image_folder(self) -> Path: ...

    @abstractmethod
    def finish(self, samples: list[Sample], rows: list[dict], folder: Path) -> dict:
        """Judge the answers of a finished run: returns what goes into score.json and is printed.

        samples[i] was answered by rows[i] (a row of merge.jsonl). folder: the run's, for further files. A benchmark
        that is scored against an annotation file joins by the sample's key, never by order.
        """

    def make_data(self) -> None:  # noqa: B027 (nothing to make is the usual case)
        """Build files that need no download; does nothing where they are there."""

    def prompt(self, row: dict) -> str:
        """The question as the model reads it, without image placeholder and conversation template."""
        return row["text"]

    def needed_files(self) -> list[Path]:
        """Files and folders without which the run could not be scored in the end; checked before it starts."""
        return [self.question_file, self.image_folder]

    def read(self) -> list[Sample]:
        return read_questions(self.question_file, self.prompt)

    def load(self, limit: int | None = None) -> list[Sample]:
        """The checked samples of this benchmark (the first `limit` of them). UserError for whatever is wrong."""
        self.make_data()
        for path in self.needed_files():
            if not path.exists():
                hint = f"; {self.download_page} says where to get it" if self.download_page else ""
                raise UserError(f"{path}: missing, benchmark {self.name} needs it{hint}")
        samples = self.read()[:limit]
        check_images(samples, self.image_folder, self.question_file)
        return samples
