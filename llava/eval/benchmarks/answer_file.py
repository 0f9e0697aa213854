"""Answer files, of this project (merge.jsonl) or of LLaVA: they are read, joined with the questions, and scored."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from llava.common.errors import UserError
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.eval.benchmarks import Benchmark
from llava.eval.benchmarks.questions import Sample, read_lines


def read_answers(path: Path) -> list[dict]:
    """Return the rows of an answer file. Raises UserError for a damaged line, or one without question_id and text."""
    rows = []
    for number, row in read_lines(path):
        if not isinstance(row.get("question_id"), (int, str)) or not isinstance(row.get("text"), str):
            raise UserError(f'{path}, line {number}: has no "question_id" and "text", is this a file of answers?')
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: holds no answer")
    return rows


def answers_by_id(path: Path) -> list[tuple]:
    """Return (question_id, text) of each row of an answer file. Raises UserError if a question_id repeats."""
    rows = read_answers(path)
    ids = [row["question_id"] for row in rows]
    twice = len(ids) - len(set(ids))
    if twice:
        raise UserError(f"{path}: {twice} of {len(rows)} answers are to questions that are answered already")
    return [(row["question_id"], row["text"]) for row in rows]


def match(
    samples: list[Sample], rows: list[dict], path: Path, partial: bool = False
) -> tuple[list[Sample], list[dict]]:
    """Return (the answered samples, their rows), both in the order of `samples`.

    rows: from `path`, in any order. Raises UserError, with counts, for answers to other questions, for several answers
    to one question, and, unless `partial`, for questions without an answer.
    """
    # 1. Join by question_id as a string (some of LLaVA's files have numbers where others have strings), and by prompt.
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
    # 2. Report all problems in one message.
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
    """Return whether the prompt of a row is that of the sample. A row without prompt is decided by its id alone."""
    # For some benchmarks, LLaVA's answer files have the prompt with the instruction, for others without it.
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
