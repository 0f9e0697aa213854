"""Every method at several budgets: one CSV, one table, one plot. On the demo task, or on the user's own data.

    python -m llava.eval.compare [--methods adav,random --budgets 25,10,5 --limit N ...]          (make compare)
    python -m llava.eval.compare mydata --questions q.jsonl --images DIR --checkpoints DIR [--answers a.jsonl ...]
    python -m llava.eval.compare [BENCHMARK] --answers A.jsonl B.jsonl          (two files of answers, no model)

Each cell (checkpoint, method, budget, seed) is a run of the launcher. So the command continues after an interruption,
and cells that are finished cost nothing. A budget is a share of the vision tokens that `none` reads, as a mean over the
questions. `none` and `adav` are always measured: budgets are relative to `none`, differences to `adav`.
Writes compare.csv, compare.md and compare.png. Of two answer files, only a text is printed.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from llava.common.command_line import Parser, add_checkpoint_flags, existing_folder, names, percents, positive
from llava.common.errors import UserError, exits_cleanly
from llava.common.files import BASE, as_user_error_on_write, write_atomically
from llava.common.find_checkpoint import EvalCheckpoint, find_checkpoint
from llava.common.rounding import floor_share
from llava.config import AdaVConfig, add_plugin_flag
from llava.conversation import get_conversation
from llava.eval.benchmarks import BENCHMARKS, Benchmark
from llava.eval.benchmarks.own_data import NAME, OwnData, add_own_data_flags, refuse_own_data_flags
from llava.eval.results.compare_rows import Cell, rows_of
from llava.eval.results.compare_table import caveat, markdown, read_rows, write_rows
from llava.eval.runs.evaluate import evaluate_runs
from llava.eval.runs.run import BATCH_SIZE_HELP, DATA_ROOT, OUTPUT, Run
from llava.eval.runs.work_order import Generation
from llava.eval.runs.worker_processes import Interrupted, ShardFailure, device_groups
from llava.methods.index import method_names

FOLDER = BASE / "playground" / "compare"
DEMO = "shapes"
CHECKPOINTS = "playground/llava-shapes-v1.5,playground/llava-shapes-v1.6"
REFERENCE = "adav"
# The ends of the scale, all vision tokens and no image. They have no budget.
ENDS = ("none", "no_image")
_KEPT = "what is answered is kept; the same command continues from there"


@dataclass(frozen=True)
class Workload:
    """The default number of questions (None: all of them), and of samples per batch (None: that of the launcher)."""

    questions: int | None
    batch: int | None


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

    def __init__(self, checkpoint: EvalCheckpoint, model_base: EvalCheckpoint | None, args: argparse.Namespace, device):
        self.checkpoint, self.model_base, self.output = checkpoint, model_base, args.output
        self.benchmark = _benchmark(args, checkpoint)
        own = args.benchmark == NAME
        self.load = Workload(None, None) if own else SEVERAL_TILES if checkpoint.anyres else ONE_TILE
        self.limit = args.limit or self.load.questions
        self.batch = args.batch_size or self.load.batch
        longest = args.max_new_tokens or self.benchmark.max_new_tokens
        self.generation = Generation(longest, args.conv_mode, args.dtype, device)

    def run(self, cell: Cell) -> Run:
        """Return the run of a cell."""
        budget = {} if cell.tokens is None else {"overall_tokens": cell.tokens}
        config = AdaVConfig(method=cell.method, options=dict(cell.options), **budget)
        run = Run(
            self.benchmark, config, self.checkpoint, self.generation, self.output, self.model_base, limit=self.limit
        )
        if self.benchmark.annotations() is None:
            raise UserError(
                f"{self.benchmark.question_file}: has no answers, so methods cannot be compared; --answers names a file of "
                "them, and llava.analysis.try_it compares with the answers of all tokens"
            )
        return run

    def measure(
        self, chosen: list[str], budgets: list[float], seeds: int, devices: list[str], args: argparse.Namespace
    ) -> list[dict]:
        """Answer the missing questions; return the rows of this checkpoint for compare.csv.

        args: the command line, of which shards, threads and fresh are read.
        """

        def answer(wanted: list[Cell], title: str) -> tuple[dict[Cell, Run], dict[Cell, dict]]:
            runs = {cell: self.run(cell) for cell in wanted}
            listed = list(runs.values())
            reports = evaluate_runs(listed, args.shards, devices, self.batch, args.fresh, title, threads=args.threads)
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
    parser.add_argument(
        "benchmark", nargs="?", help=f"{DEMO} (default) or {NAME}; of two answer files, any benchmark that has labels"
    )
    parser.add_argument("--methods", type=names, help=f"of {', '.join(entries())}, --plugin (default: all)")
    parser.add_argument("--budgets", type=percents, default="25,10,5", help="%% of the vision tokens (25,10,5)")
    parser.add_argument("--checkpoints", type=names, default=CHECKPOINTS, help=f"folders or hub names ({CHECKPOINTS})")
    parser.add_argument("--seeds", type=positive, default=3, help="runs of a method that draws at random (3)")
    parser.add_argument(
        "--limit",
        type=positive,
        help=f"questions per checkpoint (default: {ONE_TILE.questions} for one tile, {SEVERAL_TILES.questions} for several)",
    )
    parser.add_argument("--shards", type=positive, help="processes (default: as llava.eval.launch)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where run folders go (default: runs/)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="where results go (default: playground/compare/)")
    parser.add_argument("--fresh", action="store_true", help="forget what these very runs have answered already")
    parser.add_argument("--plot-only", action="store_true", help="table and plot from the compare.csv that is there")
    parser.add_argument(
        "--batch-size", type=positive, help=f"samples per batch (default with {NAME}: {BATCH_SIZE_HELP})"
    )
    parser.add_argument("--max-new-tokens", type=positive, help="default: the benchmark's")
    parser.add_argument("--data-root", type=existing_folder, help="of the benchmark of two answer files")
    parser.add_argument("--split", help="of the benchmark of two answer files, or of a folder of the datasets library")
    parser.add_argument(
        "--answers",
        type=Path,
        nargs="+",
        metavar="FILE",
        help=f"two files: compare these answers; one file: reference answers of {NAME}, as --labels",
    )
    add_checkpoint_flags(parser)
    add_own_data_flags(parser, ("--labels",))
    add_plugin_flag(parser)
    args = parser.parse_intermixed_args(argv)
    _sort_answers(args)
    if args.files:
        return args
    args.benchmark = args.benchmark or DEMO
    if args.benchmark not in (DEMO, NAME):
        raise UserError(
            f'"{args.benchmark}" cannot be compared, allowed are {DEMO} and {NAME}, or --answers A.jsonl B.jsonl'
        )
    if args.benchmark == NAME:
        OwnData.of_flags(args, None)
    else:
        refuse_own_data_flags(args)
    if args.conv_mode is not None:
        get_conversation(args.conv_mode)
    # Not earlier: --plugin has added its method while the command line was read.
    known = list(entries())
    for name in args.methods or []:
        if name not in known:
            raise UserError(f'--methods: "{name}" is no method, allowed are {", ".join(known)}')
    args.methods = args.methods or known
    # The order of the command line does not matter: methods are in the order of the index.
    args.methods = [name for name in known if name in {*args.methods, "none", REFERENCE}]
    return args


def _sort_answers(args: argparse.Namespace) -> None:
    """Set args.files to the two answer files to compare, or to None; one file is args.labels."""
    args.files = None
    if args.answers and len(args.answers) == 1:
        if args.labels is not None:
            raise UserError("--answers and --labels both name reference answers; give one of them")
        (args.labels,) = args.answers
    elif args.answers:
        if len(args.answers) > 2:
            raise UserError(
                f"--answers names {len(args.answers)} files, allowed are two answer files, or one of references"
            )
        args.files = tuple(args.answers)


def _benchmark(args: argparse.Namespace, checkpoint: EvalCheckpoint | None) -> Benchmark:
    """Return the benchmark of the command line. UserError for an unknown one."""
    if args.benchmark == NAME:
        return OwnData.of_flags(args, checkpoint)
    if args.benchmark not in BENCHMARKS:
        raise UserError(f'unknown benchmark "{args.benchmark}", allowed are {", ".join([*BENCHMARKS, NAME])}')
    return BENCHMARKS[args.benchmark](args.data_root or DATA_ROOT, checkpoint, args.split)


def compare_files(args: argparse.Namespace) -> str:
    """Compare two answer files; return the text."""
    from llava.eval.report.answer_files import benchmark_beside, compare_answers

    if args.benchmark is None and args.questions is not None:
        args.benchmark = NAME
    if args.benchmark is not None:
        benchmark = _benchmark(args, None)
    else:
        # A run's own folder says which benchmark it answered.
        benchmark = benchmark_beside(args.files[0], args.data_root)
    return compare_answers(args.files, benchmark).text()


def compare(args: argparse.Namespace) -> None:
    """Measure all checkpoints and write compare.csv."""
    devices = device_groups()
    checkpoints = [find_checkpoint(name) for name in args.checkpoints]
    _refuse_same_name(checkpoints)
    with as_user_error_on_write(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
    model_base = find_checkpoint(args.model_base) if args.model_base else None
    comparisons = [Comparison(c, model_base, args, "cuda" if devices else "cpu") for c in checkpoints]
    rows: list[dict] = []
    for comparison in comparisons:
        rows += comparison.measure(args.methods, args.budgets, args.seeds, devices, args)
        # Written after each checkpoint, so that an interruption keeps the finished ones.
        write_rows(rows, args.out / "compare.csv")


def present(folder: Path) -> str:
    """Write compare.md and compare.png from the compare.csv in `folder`; return the content of compare.md."""
    # Imported here, because matplotlib takes a second to load.
    from llava.eval.results.compare_plot import draw

    rows = read_rows(folder / "compare.csv")
    text = markdown(rows)
    text += f"\n\n{caveat(rows)}\n"
    write_atomically(folder / "compare.md", text)
    draw(rows, folder / "compare.png")
    return text


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.files:
        print(compare_files(args))
        return
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
    print(present(args.out))
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
