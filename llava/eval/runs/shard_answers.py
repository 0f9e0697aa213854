"""Answer files of a run: appended sample by sample, read back after any interruption, merged once.

A shard's file holds one JSON object per finished sample: its key, the answer (or the error of an unreadable image)
and what was measured. A line counts once it ends in a newline, so a line that a kill or a full disk tore is redone.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from llava.common.errors import UserError
from llava.common.files import told_when_unwritable, write_atomically
from llava.eval.benchmarks.questions import Sample


class AnswerFile:
    """One shard's answers. `append` returns when the rows are with the operating system, so a kill loses none."""

    def __init__(self, path: Path):
        self.path = Path(path)
        with told_when_unwritable(self.path):
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def append(self, rows: list[dict]) -> None:
        data = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        with told_when_unwritable(self.path):
            while data:
                data = data[os.write(self._file, data) :]

    def close(self) -> None:
        os.close(self._file)


def read_rows(path: Path) -> list[dict]:
    """The complete rows of one shard's file; a torn last line is not among them."""
    data = Path(path).read_bytes()
    rows = []
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
            row["key"] = tuple(row["key"])
            if "answer" not in row and "error" not in row:
                raise KeyError("answer")
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path}, line {number}: is damaged; run again with --fresh to answer everything anew"
            ) from None
        rows.append(row)
    return rows


def collect(folder: Path) -> tuple[dict[tuple, dict], dict[tuple, str]]:
    """What the shard files of a run hold: (key -> answered row, key -> error of an image that stayed unreadable).

    Raises UserError where a sample is answered twice.
    """
    answered: dict[tuple, dict] = {}
    errors: dict[tuple, str] = {}
    for path in sorted(Path(folder).glob("shard-*.jsonl")):
        for row in read_rows(path):
            if "error" in row:
                errors[row["key"]] = row["error"]
            elif row["key"] in answered:
                raise UserError(f"{path}: question {row['key'][0]} is answered twice; run again with --fresh")
            else:
                answered[row["key"]] = row
    return answered, {key: error for key, error in errors.items() if key not in answered}


def merge(samples: list[Sample], answered: dict[tuple, dict], path: Path, model_id: str, salt: str) -> list[dict]:
    """Write merge.jsonl: LLaVA's answer rows in the order of the question file, every sample exactly once.

    answer_id follows from the sample and `salt`, so that an interrupted run ends with the same file as an undisturbed
    one. Raises UserError where a sample is missing or an answer belongs to none.
    """
    missing = [sample for sample in samples if sample.key not in answered]
    unknown = answered.keys() - {sample.key for sample in samples}
    if missing:
        raise UserError(
            f"{path.parent}: {len(missing)} of {len(samples)} questions have no answer, the first in {missing[0].place}"
        )
    if unknown:
        raise UserError(f"{path.parent}: {len(unknown)} answers belong to no question; run again with --fresh")
    try:
        import shortuuid  # here, since nothing else that runs a model needs it
    except ImportError:
        raise UserError(
            "answer files need the package shortuuid, which is not installed: pip install shortuuid"
        ) from None
    rows = []
    for sample in samples:
        done = answered[sample.key]
        metadata = {"vision_tokens": sum(done["kept"]), "vision_tokens_before": sum(done["total"])}
        if sample.image is not None:
            metadata["image"] = sample.image
        rows.append(
            {
                "question_id": sample.question_id,
                "prompt": sample.prompt,
                "text": done["answer"],
                "answer_id": shortuuid.uuid(name=salt + json.dumps(sample.key)),
                "model_id": model_id,
                "metadata": metadata,
            }
        )
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def remove_answers(run_folder: Path) -> None:
    """Forget everything that a run has answered (--fresh)."""
    for path in [*(run_folder / "shards").glob("shard-*.jsonl"), run_folder / "merge.jsonl", run_folder / "score.json"]:
        path.unlink(missing_ok=True)
