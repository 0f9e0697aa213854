"""Finished runs as the published table: seven benchmarks, and the mean of ratios to the unpruned row.

    python -m llava.eval.table DIR... [--format markdown|csv|latex] [--published MODEL|none] [--output FILE]

DIR: run folders, or folders above them (runs/). The table has one row per checkpoint, configuration and part of the
questions. The average is relative to the run with method none of the same checkpoint and part. If columns are missing,
it says over how many it is: (6/7). Published rows are printed below the rows with the same method and budget, with the
difference. Imports no torch.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llava.common.command_line import Parser
from llava.common.errors import UserError, exits_cleanly
from llava.common.files import write_atomically
from llava.eval.results.published import TABLE, published_models
from llava.eval.results.published_table import FORMATS, collect, render


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m llava.eval.table", description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="run folders, or folders above them")
    parser.add_argument("--format", choices=FORMATS, default="markdown")
    parser.add_argument(
        "--published",
        choices=[*published_models(), "none"],
        help="whose published rows stand beside (default: those of a checkpoint of the same name)",
    )
    parser.add_argument("--output", type=Path, help="also write the table here")
    return parser.parse_args(argv)


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    rows, notes = collect(args.folders)
    if not rows:
        what = "; ".join(notes) or "its runs are of other benchmarks"
        raise UserError(
            f"{args.folders[0]}: no finished run of the published table's benchmarks, which are {', '.join(TABLE)} "
            f"({what}); python -m llava.eval.report shows runs of any benchmark"
        )
    table, said = render(rows, notes, args.format, args.published)
    if args.output:
        write_atomically(args.output, table + "\n")
    print(table)
    # A program may read CSV or LaTeX from stdout, so the notes go to stderr.
    if said:
        print(f"\n{said}", file=sys.stdout if args.format == "markdown" else sys.stderr)


if __name__ == "__main__":
    main()
