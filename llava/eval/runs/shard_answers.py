"""Answer files of a run: shards append rows, the launcher reads them after any interruption and merges them once.

The file of a shard has one JSON object per finished sample: its key, the answer (or the error of an unreadable image)
and the measurements. A line counts only if it ends in a newline. A line torn by a kill or a full disk does not count,
so its sample is answered again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from llava.common.errors import UserError
from llava.common.files import as_user_error_on_write, write_atomically
from llava.eval.benchmarks.questions import Sample


class AnswerFile:
    """The answer file of one shard. When `append` returns, the operating system has the rows, so a kill loses none."""

    def __init__(self, path: Path):
        self.path = Path(path)
        with as_user_error_on_write(self.path):
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def append(self, rows: list[dict]) -> None:
        """Append rows. Raises UserError if the file cannot be written."""
        data = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        with as_user_error_on_write(self.path):
            # os.write has no buffer in this process that a kill could lose. It may write only a part of the data.
            while data:
                data = data[os.write(self._file, data) :]

    def close(self) -> None:
        os.close(self._file)


def read_rows(path: Path) -> list[dict]:
    """Return the complete rows of the file of one shard. Raises UserError for a damaged line."""
    # [:-1] drops what follows the last newline: nothing, or a torn line.
    data = Path(path).read_bytes()
    rows = []
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
            # JSON has no tuples, but keys are used as keys of dicts.
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
    """Read the answer files of all shards; return (key -> answered row, key -> error of an unreadable image).

    Raises UserError if a sample is answered twice.
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
    # An image that was unreadable may have been repaired since: then a later session has answered its questions.
    return answered, {key: error for key, error in errors.items() if key not in answered}


def merge(samples: list[Sample], answered: dict[tuple, dict], path: Path, model_id: str, salt: str) -> list[dict]:
    """Write merge.jsonl and return its rows: LLaVA's answer rows, in the order of the samples, each sample once.

    model_id: name of the checkpoint. salt: digest of the run's identity.
    Raises UserError if a sample has no answer, or an answer belongs to no sample.
    """
    # 1. Answers and samples must match one to one.
    missing = [sample for sample in samples if sample.key not in answered]
    unknown = answered.keys() - {sample.key for sample in samples}
    if missing:
        raise UserError(
            f"{path.parent}: {len(missing)} of {len(samples)} questions have no answer, the first in {missing[0].place}"
        )
    if unknown:
        raise UserError(f"{path.parent}: {len(unknown)} answers belong to no question; run again with --fresh")
    # 2. The rows, in LLaVA's format.
    try:
        # Imported here, because nothing else that runs a model needs it.
        import shortuuid
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
        if sample.more_images:
            metadata["images"] = sample.images
        # answer_id is a function of sample and salt: an interrupted run ends with the same file as an undisturbed one.
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
    """Remove all answers and the score of a run (--fresh)."""
    for path in [*(run_folder / "shards").glob("shard-*.jsonl"), run_folder / "merge.jsonl", run_folder / "score.json"]:
        path.unlink(missing_ok=True)
