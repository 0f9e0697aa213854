"""The demo benchmark: questions about coloured shapes, digits and letters, drawn by the project's own generator.

The data is made on first use, in shapes-v1.5 (one tile) or shapes-v1.6 (several tiles), by the checkpoint's own
configuration. The score is the share of answers whose first word is right, overall and per kind of question. The words
after the first do not count. `ended_after_one_word` is the share of answers of one word: with few vision tokens, the
demo models often do not stop.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path

import PIL

import llava.shapes
from llava.common.errors import UserError
from llava.common.files import as_user_error_on_write, read_json, write_json
from llava.common.find_checkpoint import EvalCheckpoint
from llava.eval.benchmarks.base import Benchmark
from llava.eval.benchmarks.questions import Sample, read_lines
from llava.eval.scoring.annotations import told_when_malformed
from llava.eval.scoring.match_answers import mean
from llava.eval.scoring.verdicts import Verdict, mean_by_kind

QUESTIONS = 4000


class Shapes(Benchmark):
    """Accuracy on the test split of the demo task."""

    name = "shapes"
    splits = ("v1.5", "v1.6")  # by default, the one that fits the checkpoint's configuration
    headline = "accuracy"
    duration = f"all {QUESTIONS:,} of one tile with 14 tokens take one to two minutes on two free cores"
    max_new_tokens = 2  # answers are one word, which is one token, and the token that ends them

    def __init__(self, data_root: Path, checkpoint: EvalCheckpoint | None, split: str | None = None):
        several_tiles = checkpoint is not None and checkpoint.anyres
        super().__init__(data_root, checkpoint, split or ("v1.6" if several_tiles else "v1.5"))

    @property
    def family(self) -> str:
        return self.split

    @property
    def folder(self) -> Path:
        return self.data_root / f"shapes-{self.family}"

    @property
    def question_file(self) -> Path:
        return self.folder / "questions.jsonl"

    @property
    def image_folder(self) -> Path:
        return self.folder / "images"

    def annotation_files(self) -> list[Path]:
        return [self.folder / "labels.jsonl"]

    def make_data(self) -> None:
        """Draw the test split, unless the same generator has drawn it already."""
        # Pillow's version counts: another one may draw the same shapes with other pixels.
        recipe = {"split": "test", "questions": QUESTIONS, "generator": _generator_digest(), "pillow": PIL.__version__}
        stamp = self.folder / "recipe.json"
        if stamp.is_file() and read_json(stamp) == recipe:
            return
        from llava.shapes.dataset import write_dataset

        with as_user_error_on_write(self.folder):
            self.data_root.mkdir(parents=True, exist_ok=True)
            new = Path(tempfile.mkdtemp(prefix=f".shapes-{self.family}-", dir=self.data_root))
            # Drawn beside the old folder and then renamed: an interrupted start leaves no half of a data set.
            try:
                write_dataset(self.family, recipe["split"], recipe["questions"], new)
                write_json(new / stamp.name, recipe)
                # mkdtemp makes folders that only their owner can read.
                new.chmod(0o755)
                if self.folder.exists():
                    shutil.rmtree(self.folder)
                new.rename(self.folder)
            finally:
                shutil.rmtree(new, ignore_errors=True)

    def annotations(self) -> tuple[Path, list[tuple]]:
        source = self.folder / "labels.jsonl"
        with told_when_malformed(source):
            return source, [(key, (row["answer"].lower(), row["category"])) for key, row in self.labels().items()]

    def labels(self) -> dict:
        """Return question_id -> {answer, category}."""
        return {row["question_id"]: row for _, row in read_lines(self.folder / "labels.jsonl")}

    def categories(self, samples: list[Sample]) -> list[str]:
        """Return the kind of question of each sample."""
        labels = self.labels()
        return [labels[sample.question_id]["category"] for sample in samples]

    def right(self, samples: list[Sample], rows: list[dict]) -> list[bool]:
        """Return for each sample whether the first word of its answer is the label. rows: rows of merge.jsonl."""
        labels = self.labels()
        unlabelled = [sample for sample in samples if sample.question_id not in labels]
        if unlabelled:
            raise UserError(
                f"{self.folder / 'labels.jsonl'}: has no answer to {len(unlabelled)} of {len(samples)} questions"
            )
        answers = [labels[sample.question_id]["answer"].lower() for sample in samples]
        return [row["text"].lower().split()[:1] == [answer] for row, answer in zip(rows, answers, strict=True)]

    def score(self, samples: list[Sample], rows: list[dict], folder: Path) -> dict:
        verdicts = self.verdicts(samples, rows, folder)
        return {
            "accuracy": mean(verdict.value for verdict in verdicts),
            "questions": len(verdicts),
            "ended_after_one_word": sum(len(row["text"].split()) <= 1 for row in rows) / len(verdicts),
            "per_category": mean_by_kind(verdicts),
        }

    def verdicts(self, samples: list[Sample], rows: list[dict], folder: Path) -> list[Verdict]:
        right, labels = self.right(samples, rows), self.labels()
        return [
            Verdict.plain(value, labels[sample.question_id]["answer"], [labels[sample.question_id]["category"]])
            for sample, value in zip(samples, right, strict=True)
        ]


def _generator_digest() -> str:
    """Return a digest of the source of the generator. With it, old images are never scored with new labels."""
    seen = hashlib.sha256()
    for path in sorted(Path(llava.shapes.__file__).parent.glob("*.py")):
        seen.update(path.read_bytes())
    return seen.hexdigest()[:10]
