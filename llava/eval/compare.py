"""Every method at several budgets on the demo checkpoints: one CSV, one table, one plot.

    python -m llava.eval.compare [--methods adav,random --budgets 25,10,5 --limit N ...]          (make compare)

Each cell (checkpoint, method, budget, seed) is a run of the launcher. So the command continues after an interruption,
and cells that are finished cost nothing. A budget is a share of the vision tokens that `none` reads, as a mean over the
questions. `none` and `adav` are always measured: budgets are relative to `none`, differences to `adav`.
Writes compare.csv, compare.md and compare.png.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from llava.common.command_line import Parser, names, percents, positive
from llava.common.errors import UserError, exits_cleanly
from llava.common.files import BASE, as_user_error_on_write, write_atomically
from llava.common.find_checkpoint import EvalCheckpoint, find_checkpoint
from llava.common.machine import cores
from llava.common.rounding import floor_share
from llava.config import AdaVConfig
from llava.eval.benchmarks import BENCHMARKS
from llava.eval.results.compare_rows import Cell, rows_of
from llava.eval.results.compare_table import CAVEAT, markdown, read_rows, write_rows
from llava.eval.runs.evaluate import evaluate_runs
from llava.eval.runs.run import DATA_ROOT, OUTPUT, Run
from llava.eval.runs.work_order import Generation
from llava.eval.runs.worker_processes import Interrupted, ShardFailure, device_groups
from llava.methods.index import method_names

FOLDER = BASE / "playground" / "compare"
CHECKPOINTS = "playground/llava-shapes-v1.5,playground/llava-shapes-v1.6"
REFERENCE = "adav"
# The ends of the scale, all vision tokens and no image. They have no budget.
ENDS = ("none", "no_image")
_KEPT = "what is answered is kept; the same command continues from there"


@dataclass(frozen=True)
class Workload:
    """The default number of questions, and the samples per batch."""

    questions: int
    batch: int


# With these numbers, a whole comparison takes less than an hour on two cores.
ONE_TILE, SEVERAL_TILES = Workload(1000, 32), Workload(400, 16)


@dataclass(frozen=True)
class Entry:
    """One line of the comparison.

    options: of the method. tiles_only: measured only for checkpoints that cut images into tiles.
    """

    method: str
    options: dict = field(default_factory=dict)
    tiles_only: bool = False


def entries() -> dict[str, Entry]:
    """Return name -> entry for every method of the configuration, and for AdaV as in its authors' code."""
    # compat "public" implies the tile rule "fastervlm", which makes sense only for images of several tiles.
    found = {name: Entry(name) for name in method_names()}
    return found | {"adav-public": Entry("adav", {"compat": "public"}, tiles_only=True)}


def cells(chosen: list[str], budgets: list[float], seeds: int, full: float) -> list[Cell]:
    """Return all cells of one checkpoint except `none`.

    chosen: names of `entries`. budgets: percent. seeds: runs of a method that draws at random. full: vision tokens per
    image that `none` reads, mean over the questions.
    """
    found = []
    for name in chosen:
        entry = entries()[name]
        if name in ENDS:
            found += [Cell(name, entry.method)] if name != "none" else []
            continue
        for percent in budgets:
            tokens = max(1, floor_share(percent / 100, full))
            for seed in range(seeds) if _takes_seed(entry.method) else [None]:
                options = entry.options | ({} if seed is None else {"seed": seed})
                found.append(Cell(name, entry.method, percent, tokens, seed, options))
    return found


def _takes_seed(method: str) -> bool:
    """Return whether a method draws at random."""
    from llava.methods.before_llm import option_names, selector_names

    return method in selector_names() and "seed" in option_names(method)


class Comparison:
    """The comparison on one checkpoint. No run is started before `measure`."""

    def __init__(self, checkpoint: EvalCheckpoint, output: Path, limit: int | None, device: str):
        self.checkpoint, self.output = checkpoint, output
        self.load = SEVERAL_TILES if checkpoint.anyres else ONE_TILE
        self.limit = limit or self.load.questions
        self.benchmark = BENCHMARKS["shapes"](DATA_ROOT, checkpoint)
        self.generation = Generation(self.benchmark.max_new_tokens, device=device)

    def run(self, cell: Cell) -> Run:
        """Return the run of a cell."""
        budget = {} if cell.tokens is None else {"overall_tokens": cell.tokens}
        config = AdaVConfig(method=cell.method, options=dict(cell.options), **budget)
        return Run(self.benchmark, config, self.checkpoint, self.generation, self.output, limit=self.limit)

    def measure(
        self, chosen: list[str], budgets: list[float], seeds: int, shards: int, devices: list[str], fresh: bool
    ) -> list[dict]:
        """Answer the missing questions; return the rows of this checkpoint for compare.csv."""

        def answer(wanted: list[Cell], title: str) -> tuple[dict[Cell, Run], dict[Cell, dict]]:
            runs = {cell: self.run(cell) for cell in wanted}
            reports = evaluate_runs(list(runs.values()), shards, devices, self.load.batch, fresh, title)
            return runs, dict(zip(runs, reports, strict=True))

        # 1. `none` first: its vision tokens turn percentages into numbers of tokens.
        name, whole = self.checkpoint.short_name, Cell("none", "none")
        runs, reports = answer([whole], f"{name}, none")
        full = reports[whole]["vision_tokens_per_image"]["before"]
        # 2. All other cells share the worker processes, so the checkpoint is loaded once per shard.
        chosen = [entry for entry in chosen if self.checkpoint.anyres or not entries()[entry].tiles_only]
        others = cells(chosen, budgets, seeds, full)
        more_runs, more_reports = answer(others, f"{name}, {len(others)} runs")
        return rows_of(self.benchmark, runs | more_runs, reports | more_reports, REFERENCE)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m llava.eval.compare", description=__doc__.split("\n")[0])
    known = list(entries())
    parser.add_argument("--methods", type=names, default=known, help=f"of {', '.join(known)} (default: all)")
    parser.add_argument("--budgets", type=percents, default="25,10,5", help="%% of the vision tokens (25,10,5)")
    parser.add_argument("--checkpoints", type=names, default=CHECKPOINTS, help=f"folders or hub names ({CHECKPOINTS})")
    parser.add_argument("--seeds", type=positive, default=3, help="runs of a method that draws at random (3)")
    parser.add_argument(
        "--limit",
        type=positive,
        help=f"questions per checkpoint (default: {ONE_TILE.questions} for one tile, {SEVERAL_TILES.questions} for several)",
    )
    parser.add_argument("--shards", type=positive, help="processes (default: one per device or, on the CPU, per core)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where run folders go (default: runs/)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="where results go (default: playground/compare/)")
    parser.add_argument("--fresh", action="store_true", help="forget what these very runs have answered already")
    parser.add_argument("--plot-only", action="store_true", help="table and plot from the compare.csv that is there")
    args = parser.parse_args(argv)
    for name in args.methods:
        if name not in known:
            raise UserError(f'--methods: "{name}" is no method, allowed are {", ".join(known)}')
    # The order of the command line does not matter: methods are in the order of the index.
    args.methods = [name for name in known if name in {*args.methods, "none", REFERENCE}]
    return args


def compare(args: argparse.Namespace) -> None:
    """Measure all checkpoints and write compare.csv."""
    devices = device_groups()
    shards = args.shards or len(devices) or cores()
    checkpoints = [find_checkpoint(name) for name in args.checkpoints]
    _refuse_same_name(checkpoints)
    with as_user_error_on_write(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
    comparisons = [Comparison(c, args.output, args.limit, "cuda" if devices else "cpu") for c in checkpoints]
    rows: list[dict] = []
    for comparison in comparisons:
        rows += comparison.measure(args.methods, args.budgets, args.seeds, shards, devices, args.fresh)
        # Written after each checkpoint, so that an interruption keeps the finished ones.
        write_rows(rows, args.out / "compare.csv")


def present(folder: Path) -> str:
    """Write compare.md and compare.png from the compare.csv in `folder`; return the table."""
    # Imported here, because matplotlib takes a second to load.
    from llava.eval.results.compare_plot import draw

    rows = read_rows(folder / "compare.csv")
    text = markdown(rows)
    write_atomically(folder / "compare.md", f"{text}\n\n{CAVEAT}\n")
    draw(rows, folder / "compare.png")
    return text


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    begun = time.monotonic()
    if not args.plot_only:
        try:
            compare(args)
        except Interrupted as error:
            print(f"stopped by {error}: {_KEPT}", file=sys.stderr)
            sys.exit(128 + error.number)
        except ShardFailure as error:
            print(f"error: {error}\n{_KEPT}", file=sys.stderr)
            sys.exit(1)
    print(f"{present(args.out)}\n\n{CAVEAT}\n")
    print(f"{args.out / 'compare.csv'}, compare.md, compare.png; {time.monotonic() - begun:.0f} s")


def _refuse_same_name(checkpoints: list[EvalCheckpoint]) -> None:
    """Raise UserError if two checkpoints have the same short name, under which compare.csv would mix them."""
    short = [checkpoint.short_name for checkpoint in checkpoints]
    for name in short:
        if short.count(name) > 1:
            raise UserError(f'--checkpoints: two are called "{name}", allowed is each last part of a path once')


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
