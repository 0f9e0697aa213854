"""The published table in one command: what is missing, the plan, all runs, and the table beside the published one.

    bash scripts/reproduce.sh v1_5|v1_6 [--methods fastervlm,adav] [--tokens "144 58 29"] [--subset 500]
        [--prepare] [--plan]
    bash scripts/reproduce.sh avl [--methods fastv,h2o,avl] [--tokens 288] [--tasks docvqa_val,ocrbench] [--subset 500] [--plan]

--plan needs no weights and no GPU. --prepare fetches the benchmarks that have a public data set. A benchmark whose files
are missing is left out, and said. The same command continues after any interruption. The results are in
playground/reproduce/<family>/: table.md, table.csv, table.tex, intervals.csv and report.html.
`avl` runs A-VL's five data sets through lmms-eval, which fetches them; --subset then takes the first documents. Its
results are table.md and table.csv.
Exit codes: 0 done, 1 a shard died or a run of lmms-eval gave no results, 2 bad input (one sentence), 128 + n stopped by
signal n.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import io
import os
import shlex
import signal
import sys
from pathlib import Path

from llava.common.command_line import DTYPES, Parser, add_threads_flag, names, positive
from llava.common.errors import UserError, exits_cleanly
from llava.common.files import BASE, as_user_error_on_write, write_atomically
from llava.common.find_checkpoint import EvalCheckpoint, find_checkpoint
from llava.common.text_table import markdown_table
from llava.config import AdaVConfig, add_plugin_flag
from llava.eval.benchmarks import BENCHMARKS
from llava.eval.benchmarks.subset import Subset
from llava.eval.prepare import prepare
from llava.eval.results import lmms_reproduction as lmms
from llava.eval.results.published_table import FORMATS, collect, render
from llava.eval.results.reproduction import FAMILIES, Needed, configurations, describe, needs
from llava.eval.runs.evaluate import evaluate_or_exit
from llava.eval.runs.lmms_eval import LmmsRun
from llava.eval.runs.run import BATCH_SIZE_HELP, DATA_ROOT, OUTPUT, Run
from llava.eval.runs.work_order import Generation
from llava.eval.runs.worker_processes import Interrupted, device_groups
from llava.methods.index import method_names

SPEED = BASE / "benchmarks" / "results" / "end_to_end-llava-v1.6-vicuna-7b-cuda.csv"
FOLDER = BASE / "playground" / "reproduce"
AVL = "avl"
_FILES = {"markdown": "table.md", "csv": "table.csv", "latex": "table.tex"}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="bash scripts/reproduce.sh", description=__doc__.split("\n")[0])
    parser.add_argument("family", choices=(*FAMILIES, AVL), help="whose published table")
    parser.add_argument("--methods", type=names, help="default: those of the published table; none always runs")
    parser.add_argument("--tokens", type=budgets, help='default: those of the published table, as in "144 58 29"')
    parser.add_argument("--subset", type=positive, help="only N questions of each benchmark, drawn with a seed")
    parser.add_argument("--plan", action="store_true", help="print the plan, and run nothing")
    parser.add_argument("--prepare", action="store_true", help="fetch what public data sets allow")
    parser.add_argument("--checkpoint", default=os.environ.get("CKPT"), help="default: the published one ($CKPT)")
    parser.add_argument("--data-root", type=Path, default=os.environ.get("DATA_ROOT") or DATA_ROOT, help="$DATA_ROOT")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where run folders go (default: runs/)")
    parser.add_argument("--out", type=Path, help="where results go (default: playground/reproduce/<family>)")
    parser.add_argument("--batch-size", type=positive, help=f"samples per batch (default: {BATCH_SIZE_HELP})")
    parser.add_argument("--shards", type=positive, help="processes (default: as llava.eval.launch)")
    add_threads_flag(parser)
    parser.add_argument("--dtype", default="auto", choices=DTYPES)
    parser.add_argument(
        "--partial", action="store_true", help="score what has a label and a readable image, and say so"
    )
    parser.add_argument("--tasks", type=names, help=f"avl: tasks of lmms-eval (default: {','.join(lmms.USUAL)})")
    parser.add_argument("--lmms-flags", type=shlex.split, help="avl: further flags of lmms-eval, as one text")
    add_plugin_flag(parser)
    args = parser.parse_args(argv)
    args.out = args.out or FOLDER / args.family
    if args.family == AVL:
        return _of_avl(args)
    for flag, value in (("--tasks", args.tasks), ("--lmms-flags", args.lmms_flags)):
        if value is not None:
            raise UserError(f"{flag} is about lmms-eval, allowed is {AVL} in place of {args.family}")
    family = FAMILIES[args.family]
    args.methods, args.tokens = args.methods or family.methods, args.tokens or list(family.tokens)
    for name in args.methods:
        if name not in method_names():
            raise UserError(f'--methods: "{name}" is no method, allowed are {", ".join(method_names())}')
    args.data_root = Path(args.data_root)
    return args


def _of_avl(args: argparse.Namespace) -> argparse.Namespace:
    """Return the arguments of the family `avl` with its defaults. UserError for those that it does not have."""
    for flag, given, why in (
        ("--prepare", args.prepare, "lmms-eval fetches its data sets itself"),
        ("--partial", args.partial, "lmms-eval scores every document"),
    ):
        if given:
            raise UserError(f"{flag} is not for {AVL}: {why}")
    args.methods, args.tokens = args.methods or list(lmms.METHODS), args.tokens or list(lmms.FAMILY.tokens)
    args.tasks = args.tasks or list(lmms.USUAL)
    for name in args.tasks:
        if name not in lmms.TASKS:
            raise UserError(f'--tasks: "{name}" is no task of this table, allowed are {", ".join(lmms.TASKS)}')
    return args


def budgets(text: str) -> list[int]:
    """argparse type of different numbers of tokens with blanks or commas between them."""
    found = [positive(part) for part in text.replace(",", " ").split()]
    if not found or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f'{text!r}, allowed are different numbers of tokens, as in "144 58 29"')
    return found


def fetch(needed: list[Needed]) -> None:
    """Prepare the benchmarks that are missing and have a recipe. A failure is told, and the others go on."""
    for each in needed:
        if each.missing and each.fetchable:
            try:
                print(prepare(each.benchmark), flush=True)
            except UserError as error:
                print(f"warning: {error}", file=sys.stderr)


def run_all(args: argparse.Namespace, checkpoint: EvalCheckpoint, ready: list[Needed]) -> list[Path]:
    """Run every configuration over the benchmarks that are ready; return the run folders."""
    devices = device_groups(every=True)
    generation_of = {"dtype": args.dtype, "device": "cuda" if devices else "cpu"}
    subset = Subset(args.subset) if args.subset else None
    configs = configurations(FAMILIES[args.family], args.methods, args.tokens, checkpoint)
    folders = []
    for n, config in enumerate(configs, 1):
        runs = [_run(args, each, config, checkpoint, generation_of, subset) for each in ready]
        title = f"{n}/{len(configs)} {config.method} {runs[0].tokens}"
        evaluate_or_exit(runs, args.shards, devices, args.batch_size, False, title, args.partial, threads=args.threads)
        folders += [run.folder for run in runs]
        # After each configuration, so that a stopped command leaves the table of what is finished.
        write_tables(args, folders)
        print(f"{title}: done", file=sys.stderr, flush=True)
    return folders


def _run(args, needed: Needed, config: AdaVConfig, checkpoint: EvalCheckpoint, generation: dict, subset) -> Run:
    # A benchmark of its own for each run, because a run notes on it which part it scores.
    benchmark = BENCHMARKS[needed.name](args.data_root, checkpoint)
    settings = Generation(benchmark.max_new_tokens, **generation)
    return Run(benchmark, config, checkpoint, settings, args.output, subset=subset, partial=args.partial)


def write_tables(args: argparse.Namespace, folders: list[Path]) -> str:
    """Write the table in all formats; return it in Markdown with its notes."""
    rows, notes = collect(folders)
    if not rows:
        return "\n".join(notes)
    with as_user_error_on_write(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
    for style in FORMATS:
        text, said = render(rows, notes, style, FAMILIES[args.family].model)
        write_atomically(args.out / _FILES[style], text + (f"\n\n{said}\n" if style == "markdown" else "\n"))
    return (args.out / _FILES["markdown"]).read_text(encoding="utf-8")


def write_intervals_and_report(args: argparse.Namespace, folders: list[Path]) -> str:
    """Write intervals.csv and report.html; return the intervals as a Markdown table."""
    # Imported here: judging and drawing are needed only at the end.
    from llava.eval.report.comparison import compare
    from llava.eval.report.page import render as render_page
    from llava.eval.report.runs import Questions, find

    runs, notes = find(folders)
    questions = Questions(args.data_root)
    for run in runs:
        questions.judge(run)
    table = [("benchmark", "method", "tokens", "score", "low", "high", "minus none", "low", "high")]
    for group in compare(runs):
        for run, score, difference in zip(group.runs, group.scores, group.differences, strict=True):
            if score is not None:
                numbers = [score.value, score.low, score.high]
                numbers += [difference.value, difference.low, difference.high] if difference else []
                shown = [f"{round(number, 2) + 0.0:.2f}" for number in numbers]
                table.append((run.name, run.label, run.budget, *shown, *[""] * (6 - len(shown))))
    text = io.StringIO()
    head = [*table[0][:6], "difference", "difference_low", "difference_high"]
    csv.writer(text, lineterminator="\n").writerows([head, *table[1:]])
    write_atomically(args.out / "intervals.csv", text.getvalue())
    write_atomically(args.out / "report.html", render_page(runs, notes, 12))
    return markdown_table(table, left=2)


def reproduce_avl(args: argparse.Namespace, arguments: str) -> None:
    """Print the plan of A-VL's data sets; run what is missing; write the table. Exits with 1 if a run gave no results.

    arguments: the user's flags, for the commands of the plan.
    """
    from llava.costs.measured_speed import MeasuredSpeed

    # 1. The runs, and the plan.
    checkpoint = find_checkpoint(args.checkpoint or lmms.FAMILY.checkpoint, fetch=False)
    if checkpoint.folder is None and not args.plan:
        checkpoint = find_checkpoint(checkpoint.name)
    devices = device_groups(every=True)
    settings = {"limit": args.subset, "dtype": args.dtype, "flags": tuple(args.lmms_flags or ())}
    settings |= {"ranks": args.shards or max(1, len(devices)), "batch_size": args.batch_size}
    configs = lmms.configurations(args.methods, args.tokens)
    runs = [
        LmmsRun(task, label, config, checkpoint, args.output.resolve(), **settings)
        for label, config in configs
        for task in args.tasks
    ]
    installed = importlib.util.find_spec("lmms_eval") is not None
    print(lmms.described(checkpoint, runs, MeasuredSpeed.read(SPEED), len(devices), installed, arguments), flush=True)
    if args.plan:
        return
    if not installed:
        raise UserError("lmms_eval is not installed; make lmms-eval installs it and what it needs")
    # 2. The missing runs. One that gives no results does not keep the others from running.
    failed = []
    with as_user_error_on_write(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
    for number, run in enumerate(runs, 1):
        try:
            if run.results() is None:
                run.run()
            print(f"{number}/{len(runs)} {run.label} {run.task}: done", file=sys.stderr, flush=True)
        except UserError as error:
            failed.append(run)
            print(f"error: {error}", file=sys.stderr, flush=True)
        except Interrupted as stop:
            print(f"stopped by {stop}; the same command continues", file=sys.stderr)
            sys.exit(128 + stop.number)
        # After each run, so that a stopped command leaves the table of what is finished.
        rows = lmms.table_rows(runs[:number])
        write_atomically(args.out / _FILES["csv"], lmms.as_csv(rows))
        table = lmms.as_markdown(rows, [label for label, _ in configs], args.tasks, checkpoint)
        write_atomically(args.out / _FILES["markdown"], table + "\n")
    # 3. The result.
    print(f"\n{table}\n\n{args.out}: {_FILES['markdown']}, {_FILES['csv']}")
    if failed:
        sys.exit(1)


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.family == AVL:
        return reproduce_avl(args, lmms.arguments_of(sys.argv[1:] if argv is None else argv))
    # 1. What is here.
    family = FAMILIES[args.family]
    checkpoint = find_checkpoint(args.checkpoint or family.checkpoint, fetch=False)
    needed = needs(args.data_root, checkpoint, args.subset)
    if args.prepare and not args.plan:
        fetch(needed)
        needed = needs(args.data_root, checkpoint, args.subset)
    # 2. The plan. Predictions import torch.
    from llava.costs.measured_speed import MeasuredSpeed

    configs = configurations(family, args.methods, args.tokens, checkpoint)
    flags = ["--subset", str(args.subset)] if args.subset else []
    flags += ["--checkpoint", args.checkpoint] if args.checkpoint else []
    speed = MeasuredSpeed.read(SPEED)
    gpus = len(device_groups(every=True))
    print(describe(args.family, checkpoint, needed, configs, speed, gpus, flags), flush=True)
    if args.plan:
        return
    ready = [each for each in needed if not each.missing]
    if not ready:
        raise UserError(f"{args.data_root}: has the files of no benchmark of the table; --prepare fetches what it can")
    for each in needed:
        if each.missing:
            print(f"warning: {each.name} is left out, {each.missing[0]} is missing", file=sys.stderr)
    # 3. The runs.
    if checkpoint.folder is None:
        checkpoint = find_checkpoint(checkpoint.name)
    folders = run_all(args, checkpoint, ready)
    # 4. The results.
    table = write_tables(args, folders)
    intervals = write_intervals_and_report(args, folders)
    with open(args.out / _FILES["markdown"], "a", encoding="utf-8") as file:
        file.write(f"\n95 % bootstrap intervals over images:\n\n{intervals}\n")
    print(f"\n{table}\n{intervals}\n\n{args.out}: {', '.join([*_FILES.values(), 'intervals.csv', 'report.html'])}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
