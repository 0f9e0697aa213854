"""Score a file of answers apart from any run: one of ours (merge.jsonl) or of LLaVA's scripts.

    python -m llava.eval.score BENCHMARK ANSWERS.jsonl [--split S] [--partial] [--data-root DIR] [--output FILE]

Answers are joined with questions by question_id, and by prompt if an id repeats; never by their order. Prints the score
as JSON. Exit codes: 0 done, 2 bad input (one sentence).
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from llava.common.command_line import Parser, existing_folder
from llava.common.errors import UserError, exits_cleanly
from llava.common.files import BASE, write_json
from llava.eval.benchmarks import BENCHMARKS
from llava.eval.benchmarks.answer_file import score_file


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m llava.eval.score", description=__doc__.split("\n")[0])
    parser.add_argument("benchmark", help=", ".join(BENCHMARKS))
    parser.add_argument("answers", type=Path, help="a .jsonl file with question_id, prompt and text per line")
    parser.add_argument("--split", help="default: the benchmark's first")
    parser.add_argument(
        "--partial", action="store_true", help="score what is answered and has a label, and say so in the score"
    )
    parser.add_argument(
        "--data-root",
        type=existing_folder,
        default=os.environ.get("DATA_ROOT") or BASE / "playground" / "data" / "eval",
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
