"""Finished runs as one HTML page that opens without network: scores, charts, question types, flipped answers, settings.

    python -m llava.eval.report RUN... [-o report.html] [--examples N] [--data-root DIR]
        [--benchmark gqa,pope] [--checkpoint NAME]

RUN: run folders, or folders above them (runs/). Runs are compared only if they differ in nothing but their
configuration. Runs with another checkpoint, split, questions or generation settings are shown beside each other. No
model is run. Imports no torch. Exit codes: 0 done, 2 bad input (one sentence).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from llava.common.command_line import Parser, existing_folder, names, zero_or_more
from llava.common.errors import UserError, exits_cleanly
from llava.common.files import write_atomically
from llava.common.progress import progress_bar
from llava.eval.report.page import render
from llava.eval.report.runs import Questions, RecordedRun, find

# What runs can be chosen by: flag -> the name that a run has.
WHAT = {"benchmark": lambda run: run.name, "checkpoint": lambda run: run.checkpoint}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m llava.eval.report", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, or folders above them")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="the page (report.html)")
    parser.add_argument("--examples", type=zero_or_more, default=12, help="flipped answers per comparison (12)")
    parser.add_argument(
        "--data-root",
        type=existing_folder,
        help="where questions and pictures are (default: where each run found them)",
    )
    for what in WHAT:
        parser.add_argument(f"--{what}", type=names, help=f"only runs of these {what}s, with commas between them")
    return parser.parse_args(argv)


def chosen(runs: list[RecordedRun], args: argparse.Namespace) -> list[RecordedRun]:
    """The runs of the benchmarks and checkpoints that are asked for; UserError for a name that no run has."""
    for what, name in WHAT.items():
        wanted, there = getattr(args, what), list(dict.fromkeys(map(name, runs)))
        for one in wanted or []:
            if one not in there:
                raise UserError(f'--{what}: there is no run of "{one}", allowed are {", ".join(there)}')
        runs = [run for run in runs if wanted is None or name(run) in wanted]
    return runs


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    # Checked first, because judging all answers may take minutes.
    if not args.output.parent.is_dir():
        raise UserError(f"-o is {args.output}, but there is no folder {args.output.parent}")
    runs, notes = find(args.runs)
    runs = chosen(runs, args)
    questions = Questions(args.data_root)
    for run in progress_bar("judging", runs, unit=" runs"):
        questions.judge(run)
    html = render(runs, notes, args.examples)
    write_atomically(args.output, html)
    judged = sum(bool(run.answers) for run in runs)
    print(
        f"{args.output}: {len(runs)} runs, {judged} of them question by question; {len(html.encode()) / 1000:,.0f} kB"
    )


if __name__ == "__main__":
    main()
