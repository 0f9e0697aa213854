"""What the benchmarks share whose pictures this project draws: they make their own data on first use."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import ClassVar

import PIL

import llava.shapes
from llava.common.errors import UserError
from llava.common.files import as_user_error_on_write, read_json, write_json
from llava.common.find_checkpoint import EvalCheckpoint
from llava.eval.benchmarks.base import Benchmark
from llava.eval.benchmarks.questions import Sample, read_lines
from llava.eval.scoring.annotations import told_when_malformed


class Drawn(Benchmark):
    """A benchmark on the test split of the demo's scenes, with the first `questions` questions.

    The data is in <name>-v1.5 (one tile) or <name>-v1.6 (several tiles). captions: as in llava.shapes.dataset.
    """

    splits = ("v1.5", "v1.6")  # by default, the one that fits the checkpoint's configuration
    questions: ClassVar[int]
    captions: ClassVar[bool] = False

    def __init__(self, data_root: Path, checkpoint: EvalCheckpoint | None, split: str | None = None):
        several_tiles = checkpoint is not None and checkpoint.anyres
        super().__init__(data_root, checkpoint, split or ("v1.6" if several_tiles else "v1.5"))

    @property
    def family(self) -> str:
        return self.split

    @property
    def folder(self) -> Path:
        return self.data_root / f"{self.name}-{self.family}"

    @property
    def question_file(self) -> Path:
        return self.folder / "questions.jsonl"

    @property
    def image_folder(self) -> Path:
        return self.folder / "images"

    @property
    def label_file(self) -> Path:
        return self.folder / "labels.jsonl"

    def annotation_files(self) -> list[Path]:
        return [self.label_file]

    def make_data(self) -> None:
        """Draw the test split, unless the same generator has drawn it already."""
        # Pillow's version counts: another one may draw the same shapes with other pixels.
        recipe = {"split": "test", "questions": self.questions}
        recipe |= {"generator": _generator_digest(), "pillow": PIL.__version__}
        stamp = self.folder / "recipe.json"
        if stamp.is_file() and read_json(stamp) == recipe:
            return
        from llava.shapes.dataset import write_dataset

        with as_user_error_on_write(self.folder):
            self.data_root.mkdir(parents=True, exist_ok=True)
            new = Path(tempfile.mkdtemp(prefix=f".{self.folder.name}-", dir=self.data_root))
            # Drawn beside the old folder and then renamed: an interrupted start leaves no half of a data set.
            try:
                write_dataset(self.family, recipe["split"], recipe["questions"], new, captions=self.captions)
                write_json(new / stamp.name, recipe)
                # mkdtemp makes folders that only their owner can read.
                new.chmod(0o755)
                if self.folder.exists():
                    shutil.rmtree(self.folder)
                new.rename(self.folder)
            finally:
                shutil.rmtree(new, ignore_errors=True)

    def annotations(self) -> tuple[Path, list[tuple]]:
        with told_when_malformed(self.label_file):
            labels = [(key, (row["answer"].lower(), row["category"])) for key, row in self.labels().items()]
        return self.label_file, labels

    def labels(self) -> dict:
        """Return question_id -> {answer, category}."""
        return {row["question_id"]: row for _, row in read_lines(self.label_file)}

    def labels_of(self, samples: list[Sample]) -> list[dict]:
        """Return {answer, category} of each sample. Raises UserError if some have none."""
        labels = self.labels()
        unlabelled = [sample for sample in samples if sample.question_id not in labels]
        if unlabelled:
            raise UserError(f"{self.label_file}: has no answer to {len(unlabelled)} of {len(samples)} questions")
        return [labels[sample.question_id] for sample in samples]


def _generator_digest() -> str:
    """Return a digest of the source of the generator. With it, old images are never scored with new labels."""
    seen = hashlib.sha256()
    for path in sorted(Path(llava.shapes.__file__).parent.glob("*.py")):
        seen.update(path.read_bytes())
    return seen.hexdigest()[:10]
