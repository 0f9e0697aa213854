"""VQAv2 test-dev (arXiv 1612.00837): an upload file for the EvalAI server, which alone has the answers.

Files in LLaVA's layout, below vqav2/: the questions (llava_vqav2_mscoco_test-dev2015.jsonl), the whole test split
that an upload must cover (llava_vqav2_mscoco_test2015.jsonl), and the images (test2015).
"""

from __future__ import annotations

import json
from pathlib import Path

from llava.errors import UserError
from llava.eval.benchmarks.base import Benchmark
from llava.eval.evalai_normaliser import normalise
from llava.eval.files import told_when_unwritable, write_atomically
from llava.eval.samples import Sample, read_lines

SPLIT = "llava_vqav2_mscoco_test-dev2015"


class VQAv2(Benchmark):
    """Answers normalised as EvalAI does it; questions of the test split that were not asked get an empty answer."""

    name = "vqav2"
    download_page = "https://github.com/haotian-liu/LLaVA/blob/main/docs/Evaluation.md#vqav2"

    @property
    def folder(self) -> Path:
        return self.data_root / "vqav2"

    @property
    def question_file(self) -> Path:
        return self.folder / f"{SPLIT}.jsonl"

    @property
    def whole_split(self) -> Path:
        return self.folder / "llava_vqav2_mscoco_test2015.jsonl"

    @property
    def image_folder(self) -> Path:
        return self.folder / "test2015"

    def needed_files(self) -> list[Path]:
        return [*super().needed_files(), self.whole_split]

    def read(self) -> list[Sample]:
        """The questions; that the upload file can be written from them is checked now, not hours later."""
        samples = super().read()
        first: dict[int | str, int] = {}
        for sample in samples:
            if sample.question_id in first:
                raise UserError(
                    f"{self.question_file}, line {sample.line}: question_id {sample.question_id} is already in line "
                    f"{first[sample.question_id]}, allowed is each once"
                )
            first[sample.question_id] = sample.line
        strangers = len(first.keys() - set(self._split_ids()))
        if strangers:
            raise UserError(
                f"{self.whole_split}: lacks {strangers} of the {len(first)} question_ids of {self.question_file}"
            )
        return samples

    def finish(self, samples: list[Sample], rows: list[dict], folder: Path) -> dict:
        """Write answers_upload/<split>/<checkpoint>/<run>.json: [{question_id, answer}] over the whole test split."""
        answers = {sample.question_id: normalise(row["text"]) for sample, row in zip(samples, rows, strict=True)}
        ids = self._split_ids()
        upload = self.folder / "answers_upload" / SPLIT / self.checkpoint.short_name / f"{folder.name}.json"
        with told_when_unwritable(upload):
            upload.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(upload, json.dumps([{"question_id": i, "answer": answers.get(i, "")} for i in ids]))
        return {"upload": str(upload), "answered": len(answers), "empty": len(ids) - len(answers)}

    def _split_ids(self) -> list:
        rows = read_lines(self.whole_split)
        for number, row in rows:
            if not isinstance(row.get("question_id"), (int, str)):
                raise UserError(
                    f'{self.whole_split}, line {number}: has no "question_id" that is a whole number or a string'
                )
        return [row["question_id"] for _, row in rows]
