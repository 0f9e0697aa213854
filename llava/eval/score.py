"""Score a file of answers apart from any run: one of ours (merge.jsonl) or of LLaVA's scripts.

    python -m llava.eval.score BENCHMARK ANSWERS.jsonl [--split S] [--partial] [--data-root DIR] [--output FILE]

Answers belong to questions by question_id, and by prompt where that repeats; never by their order. Prints the score as
JSON. Exit codes: 0 done, 2 bad input (one sentence).
"""

from __future__ import annotations

import argparse
import json
import os
from collections import defaultdict
from pathlib import Path

from llava.common.command_line import Parser, existing_folder
from llava.common.errors import UserError, exits_cleanly
from llava.common.files import REPOSITORY, write_json
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.eval.benchmarks import BENCHMARKS, Benchmark
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
    strangers = again = 0
    for row in rows:
        candidates = [sample for sample in by_id[str(row["question_id"])] if _asked(row, sample)]
        free = [sample for sample in candidates if sample.key not in found]
        if free:
            found[free[0].key] = row
        elif candidates:
            again += 1
        else:
            strangers += 1
    problems = []
    if strangers:
        problems.append(f"{strangers} of {len(rows)} answers are to none of these {len(samples)} questions")
    if again:
        problems.append(f"{again} answers are to questions that are answered already")
    if not strangers and len(found) < len(samples) and not partial:
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
    """The score of an answer file, labelled where only a part of the questions is answered and `partial` allows it."""
    samples = benchmark.load_questions()
    answered, rows = match(samples, read_answers(path), path, partial)
    if len(answered) < len(samples):
        benchmark.partial = f"{len(answered):,} of {len(samples):,} questions"
    return benchmark.finish(answered, rows, Path(path).resolve().parent)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m llava.eval.score", description=__doc__.split("\n")[0])
    parser.add_argument("benchmark", help=", ".join(BENCHMARKS))
    parser.add_argument("answers", type=Path, help="a .jsonl file with question_id, prompt and text per line")
    parser.add_argument("--split", help="default: the benchmark's first")
    parser.add_argument("--partial", action="store_true", help="score what is answered, and say so in the score")
    parser.add_argument(
        "--data-root",
        type=existing_folder,
        default=os.environ.get("DATA_ROOT") or REPOSITORY / "playground" / "data" / "eval",
        help="default: $DATA_ROOT, else playground/data/eval",
    )
    parser.add_argument("--output", type=Path, help="also write the score here")
    return parser.parse_args(argv)


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.benchmark not in BENCHMARKS:
        raise UserError(f'unknown benchmark "{args.benchmark}", allowed are {", ".join(BENCHMARKS)}')
    benchmark = BENCHMARKS[args.benchmark](args.data_root, None, args.split)
    score = score_file(benchmark, args.answers, args.partial)
    if args.output:
        write_json(args.output, score)
    print(json.dumps(score, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
