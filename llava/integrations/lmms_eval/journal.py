"""Journal: the answers of a run on disk, so that an interrupted task of lmms-eval goes on where it was.

lmms-eval's own response cache stores the answers of a task when all are there.
"""

from __future__ import annotations

import json
from pathlib import Path

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts

from llava.common.errors import UserError
from llava.common.files import as_user_error_on_write, digest_of, read_json, repair, write_json


class Journal:
    """Answers by request, in one file per rank.

    folder: is made if it is missing. settings: what the answers depend on. UserError for a folder with the answers of
    other settings. The number of ranks may change from one start to the next.
    """

    def __init__(self, folder: Path, rank: int, settings: dict):
        self._path = folder / f"rank-{rank}.jsonl"
        noted = folder / "settings.json"
        if noted.is_file() and read_json(noted) != settings:
            raise UserError(f"answers={folder}: has the answers of other settings; name another folder")
        if rank == 0:
            write_json(noted, settings)
        self._answers: dict[str, GenerationResult] = {}
        for path in sorted(folder.glob("rank-*.jsonl")):
            # The last line may be torn by an interruption, or be half written by another rank now.
            for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
                row = json.loads(line)
                counts = TokenCounts(input_tokens=row["input_tokens"], output_tokens=row["output_tokens"])
                self._answers[row["key"]] = GenerationResult(row["text"], counts)
        if self._path.is_file():
            repair(self._path)

    def get(self, request: Instance) -> GenerationResult | None:
        """Return the answer to a request; None where there is none yet."""
        return self._answers.get(_key(request))

    def add(self, requests: list[Instance], answers: list[GenerationResult]) -> None:
        """Append the answers to a batch of requests."""
        lines = [
            json.dumps(
                {
                    "key": _key(request),
                    "text": answer.text,
                    "input_tokens": answer.token_counts.input_tokens,
                    "output_tokens": answer.token_counts.output_tokens,
                }
            )
            for request, answer in zip(requests, answers, strict=True)
        ]
        with as_user_error_on_write(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "a", encoding="utf-8") as file:
                file.write("".join(line + "\n" for line in lines))


def _key(request: Instance) -> str:
    """Return what identifies a request: its task, its document, its prompt and its settings of generation."""
    context, settings, _, doc_id, task, split = request.args
    return digest_of([task, split, doc_id, request.idx, context, json.dumps(settings, sort_keys=True, default=str)])
