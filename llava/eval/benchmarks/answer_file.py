"""Files of answers, ours (merge.jsonl) or LLaVA's: read, joined with the questions by key, and scored."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from llava.common.errors import UserError
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.eval.benchmarks import Benchmark
from llava.eval.benchmarks.questions import Sample, read_lines


def read_answers(path: Path) -> list[dict]:
    """The rows of an answer file. UserError for a damaged line, or one without question_id and text."""
    rows = []
    for number, row in read_lines(path):
        if not isinstance(row.get("question_id"), (int, str)) or not isinstance(row.get("text"), str):
            raise UserError(f'{path}, line {number}: has no "question_id" and "text", is this a file of answers?')
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: holds no answer")
    return rows


def answers_by_id(path: Path) -> list[tuple]:
    """(question_id, text) of an answer file in which no id comes twice; UserError counts those that do."""
    rows = read_answers(path)
    ids = [row["question_id"] for row in rows]
    twice = len(ids) - len(set(ids))
    if twice:
        raise UserError(f"{path}: {twice} of {len(rows)} answers are to questions that are answered already")
    return [(row["question_id"], row["text"]) for row in rows]


def match(
    samples: list[Sample], rows: list[dict], path: Path, partial: bool = False
) -> tuple[list[Sample], list[dict]]:
    """The samples that `rows` (of `path`) answer, and the rows in the same order, which is that of the samples.

    Raises UserError, with counts, for answers to other questions, several answers to one, and, unless `partial`,
    questions without an answer.
    """
    by_id: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_id[str(sample.question_id)].append(sample)
    found: dict[tuple, dict] = {}
    unknown_ids = again = 0
    for row in rows:
        candidates = [sample for sample in by_id[str(row["question_id"])] if _asked(row, sample)]
        free = [sample for sample in candidates if sample.key not in found]
        if free:
            found[free[0].key] = row
        elif candidates:
            again += 1
        else:
            unknown_ids += 1
    problems = []
    if unknown_ids:
        problems.append(f"{unknown_ids} of {len(rows)} answers are to none of these {len(samples)} questions")
    if again:
        problems.append(f"{again} answers are to questions that are answered already")
    if not unknown_ids and len(found) < len(samples) and not partial:
        problems.append(
            f"{len(samples) - len(found)} of {len(samples)} questions have no answer (--partial scores the others)"
        )
    if problems:
        raise UserError(f"{path}: " + ", and ".join(problems))
    answered = [sample for sample in samples if sample.key in found]
    return answered, [found[sample.key] for sample in answered]


def _asked(row: dict, sample: Sample) -> bool:
    """Whether the row's prompt is the sample's; LLaVA's files leave the instruction out for some benchmarks."""
    if not isinstance(row.get("prompt"), str):
        return True
    prompt = row["prompt"].replace(DEFAULT_IMAGE_TOKEN, "").strip()
    return prompt in (sample.prompt.strip(), sample.text.strip())


def score_file(benchmark: Benchmark, path: Path, partial: bool = False) -> dict:
    """The score of an answer file.

    partial: also where answers or labels are missing, or labels belong to no question; the score then says so.
    """
    samples = benchmark.load_questions()
    answered, rows = match(samples, read_answers(path), path, partial)
    if len(answered) < len(samples):
        benchmark.partial = f"{len(answered):,} of {len(samples):,} questions"
    scored = benchmark.scorable(answered, partial)
    kept = {sample.key for sample in scored}
    rows = [row for sample, row in zip(answered, rows, strict=True) if sample.key in kept]
    return benchmark.finish(scored, rows, Path(path).resolve().parent)
