"""The demo benchmark: questions about coloured shapes, digits and letters, drawn by the project's own generator.

The data is built on first use into shapes-v1.5 (one tile) or shapes-v1.6 (several tiles), whichever the checkpoint's
own configuration asks for. Score: share of answers whose first word is right, overall and per kind of question. What
comes after that word does not count, but `ended_after_one_word` tells how often nothing does: with few vision tokens
the demo models often forget to stop.
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
from llava.eval.scoring.match_answers import mean
from llava.eval.scoring.verdicts import Verdict, mean_by_kind

QUESTIONS = 4000


class Shapes(Benchmark):
    """Accuracy on the test split of the demo task."""

    name = "shapes"
    splits = ("v1.5", "v1.6")  # without a choice, the one that the checkpoint's configuration asks for
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
        """Draw the test split, unless this very generator has drawn it already."""
        recipe = {"split": "test", "questions": QUESTIONS, "generator": _generator_digest(), "pillow": PIL.__version__}
        stamp = self.folder / "recipe.json"
        if stamp.is_file() and read_json(stamp) == recipe:
            return
        from llava.shapes.dataset import write_dataset

        with as_user_error_on_write(self.folder):
            self.data_root.mkdir(parents=True, exist_ok=True)
            new = Path(tempfile.mkdtemp(prefix=f".shapes-{self.family}-", dir=self.data_root))
            try:
                write_dataset(self.family, recipe["split"], recipe["questions"], new)
                write_json(new / stamp.name, recipe)
                new.chmod(0o755)
                if self.folder.exists():
                    shutil.rmtree(self.folder)
                new.rename(self.folder)
            finally:
                shutil.rmtree(new, ignore_errors=True)

    def labels(self) -> dict:
        """question_id -> {answer, category}"""
        return {row["question_id"]: row for _, row in read_lines(self.folder / "labels.jsonl")}

    def categories(self, samples: list[Sample]) -> list[str]:
        """Per sample, the kind of its question."""
        labels = self.labels()
        return [labels[sample.question_id]["category"] for sample in samples]

    def right(self, samples: list[Sample], rows: list[dict]) -> list[bool]:
        """Per sample, whether the first word of its answer (a row of merge.jsonl) is the label's."""
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
    """Changes with the source of the generator, so that old pictures are never scored as new ones."""
    seen = hashlib.sha256()
    for path in sorted(Path(llava.shapes.__file__).parent.glob("*.py")):
        seen.update(path.read_bytes())
    return seen.hexdigest()[:10]
