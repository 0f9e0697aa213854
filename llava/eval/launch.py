"""Evaluate a checkpoint on a benchmark: shards over the devices, resumes, merges, scores.

    python -m llava.eval.launch BENCHMARK|all [TOKENS] --family demo|v1_5|v1_6|v1_6_34B [--shards N] [flags]
    python -m llava.eval.launch mydata [TOKENS] --questions q.jsonl --images DIR [--answers a.jsonl] --checkpoint DIR

The scripts in scripts/ call this command with a family. "all" means the seven benchmarks of the published table: the
same processes answer them, and the result is printed as that table. "mydata" means questions of the user's own. Under torchrun each rank takes its share
(llava.eval.runs.machines). The same command continues after any interruption, also with another number of shards or
ranks. A single process imports no torch, so errors of the input show before a model is loaded.
Exit codes: 0 done, 1 a shard died, 2 bad input (one sentence), 128 + n stopped by signal n.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from llava.common.command_line import Parser, add_checkpoint_flags, existing_folder, positive
from llava.common.errors import UserError, exits_cleanly
from llava.common.find_checkpoint import EvalCheckpoint, find_checkpoint
from llava.config import add_config_flags, config_of_flags
from llava.conversation import get_conversation
from llava.eval.benchmarks import BENCHMARKS, Benchmark
from llava.eval.benchmarks.own_data import NAME, OwnData, add_own_data_flags, refuse_own_data_flags
from llava.eval.benchmarks.subset import Subset
from llava.eval.results.published import TABLE
from llava.eval.runs.describe import describe_plan, describe_run
from llava.eval.runs.engines import ENGINES, RunEngine, worker_python
from llava.eval.runs.evaluate import evaluate_or_exit, follow_rank_zero
from llava.eval.runs.machines import Ranks
from llava.eval.runs.run import BATCH_SIZE_HELP, DATA_ROOT, FAMILIES, OUTPUT, Run
from llava.eval.runs.work_order import Generation
from llava.eval.runs.worker_processes import device_groups


def parse(argv: list[str] | None) -> argparse.Namespace:
    env = os.environ
    parser = Parser(prog="python -m llava.eval.launch", description=__doc__.split("\n")[0])
    # 1. What is evaluated.
    parser.add_argument("benchmark", help=", ".join([*BENCHMARKS, NAME, f"or all, which is {', '.join(TABLE)}"]))
    parser.add_argument("tokens", nargs="?", help="vision tokens per image; overrides overall_tokens")
    parser.add_argument("--family", choices=FAMILIES, help="whose checkpoint to evaluate where CKPT names none")
    parser.add_argument(
        "--checkpoint", "--model-path", default=env.get("CKPT"), help="folder or hub name (default: $CKPT)"
    )
    add_checkpoint_flags(parser)
    parser.set_defaults(conv_mode=env.get("CONV_MODE"))
    parser.add_argument(
        "--data-root",
        type=existing_folder,
        default=env.get("DATA_ROOT") or None,
        help="default: $DATA_ROOT, else playground/data/eval",
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where run folders go (default: runs/)")
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="llava",
        help="llava is this repository's engine (default); vllm runs in .venv-vllm, or under $VLLM_PYTHON",
    )
    parser.add_argument(
        "--shards",
        type=positive,
        help="processes (default: one per device or device group; a small model on a CPU: one per core, as memory allows)",
    )
    parser.add_argument(
        "--gpus-per-model",
        type=positive,
        default=env.get("GPUS_PER_MODEL", "1"),
        help="devices per shard, with vllm its tensor parallelism (default: $GPUS_PER_MODEL, else 1)",
    )
    parser.add_argument("--batch-size", type=positive, help=f"samples per batch (default: {BATCH_SIZE_HELP})")
    # 2. Questions and answers.
    parser.add_argument("--max-new-tokens", type=positive, help="default: the benchmark's")
    parser.add_argument("--split", help="of the benchmark (default: its first)")
    parser.add_argument("--limit", type=positive, help="only the first N questions")
    parser.add_argument(
        "--subset",
        type=positive,
        default=env.get("SUBSET"),
        help="only N questions, drawn with a seed (default: $SUBSET)",
    )
    parser.add_argument("--subset-seed", type=int, default=0, help="of the draw (0)")
    parser.add_argument(
        "--partial", action="store_true", help="score the questions that have a label and a readable image, and say so"
    )
    parser.add_argument("--fresh", action="store_true", help="forget what this very run has answered already")
    parser.add_argument("--plan", action="store_true", help="print what would run, and run nothing")
    add_own_data_flags(parser, ("--answers", "--labels"))
    add_config_flags(parser)
    # Intermixed, because the scripts put --family between the benchmark and the tokens. Plain parse_args would match
    # the optional tokens with nothing before it reads the flag, and then refuse them.
    return parser.parse_intermixed_args(argv)


def budget(text: str | None) -> int | None:
    """<tokens>; UserError for what is no number of tokens."""
    try:
        return None if text is None else positive(text)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"<tokens> is {error} (vision tokens per image, all tiles together)") from None


def plan(args: argparse.Namespace, shards: int | None, devices: list[str]) -> list[Run]:
    """Return the runs that the command line asks for. All input is checked: raises UserError.

    shards: number of processes on this machine, None where the run decides.
    """
    # 1. Arguments that exclude each other.
    if args.benchmark not in (*BENCHMARKS, NAME, "all"):
        raise UserError(f'unknown benchmark "{args.benchmark}", allowed are {", ".join([*BENCHMARKS, NAME, "all"])}')
    if args.benchmark != NAME:
        refuse_own_data_flags(args)
    names = TABLE if args.benchmark == "all" else [args.benchmark]
    if args.split and len(names) > 1:
        raise UserError("--split goes with one benchmark, not with all")
    if args.limit and args.subset:
        raise UserError("--limit takes the first questions and --subset draws them; give one of them")
    config = config_of_flags(args, budget(args.tokens), "<tokens>")
    engine = RunEngine.named(args.engine)
    engine.check(config, shards, devices)
    family = FAMILIES.get(args.family)
    name = args.checkpoint or (family and family.checkpoint)
    if not name:
        raise UserError("no checkpoint is named; give --family, --checkpoint or CKPT=")
    # The family's template belongs to the family's own checkpoint. Another checkpoint says its template itself.
    conversation = args.conv_mode or (family.conversation if family and not args.checkpoint else None)
    if conversation is not None:
        get_conversation(conversation)
    # 2. The checkpoint.
    checkpoint = find_checkpoint(name, fetch=not args.plan)
    model_base = find_checkpoint(args.model_base, fetch=not args.plan) if args.model_base else None
    # 3. One run per benchmark. Making a run reads and checks its questions and images.
    subset = Subset(args.subset, args.subset_seed) if args.subset else None
    runs, refused = [], []
    for each in names:
        benchmark = _benchmark(each, args, checkpoint)
        generation = Generation(
            max_new_tokens=args.max_new_tokens or benchmark.max_new_tokens,
            conversation=conversation,
            dtype=args.dtype,
            device="cuda" if devices else "cpu",
        )
        part = (args.limit, subset, args.partial)
        try:
            runs.append(Run(benchmark, config, checkpoint, generation, args.output, model_base, *part, engine))
        except UserError as error:  # what the other benchmarks lack is told at the same time
            refused.append(str(error))
    if refused:
        raise UserError("; ".join(refused))
    return runs


def _benchmark(name: str, args: argparse.Namespace, checkpoint: EvalCheckpoint) -> Benchmark:
    if name == NAME:
        return OwnData.of_flags(args, checkpoint)
    return BENCHMARKS[name](args.data_root or DATA_ROOT, checkpoint, args.split)


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    ranks = Ranks.of_environment()
    devices = device_groups(args.gpus_per_model, every=ranks is not None)
    if ranks is None:
        run_as_rank_zero(args, args.shards, devices)
        return
    devices = ranks.share(devices)
    ranks.python = worker_python(args.engine)
    # One per rank on a CPU: how many ranks share a machine is the choice of who started them.
    with ranks.joined(args.shards or max(1, len(devices)), devices):
        if ranks.rank == 0:
            run_as_rank_zero(args, sum(ranks.shards), devices, ranks)
        else:
            follow_rank_zero(ranks)


def run_as_rank_zero(
    args: argparse.Namespace, shards: int | None, devices: list[str], ranks: Ranks | None = None
) -> None:
    """Run, or with --plan print, what the command line asks for. Called by the only process or by rank 0.

    shards: number of shards of all ranks, None where the run decides. devices: those of this process.
    """
    try:
        runs = plan(args, ranks.shards[ranks.rank] if ranks else shards, devices)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    if args.plan:
        print(describe_plan(runs, shards, devices, args.threads))
        return
    for run in runs:
        if run.benchmark.duration:
            told = f"{run.benchmark.name}: {len(run.samples):,} questions; {run.benchmark.duration}; --limit N asks the first N"
            print(told, file=sys.stderr, flush=True)
    title = f"{args.benchmark} {runs[0].folder.name if len(runs) == 1 else runs[0].checkpoint.short_name}"
    reports = evaluate_or_exit(
        runs, shards, devices, args.batch_size, args.fresh, title, args.partial, ranks, threads=args.threads
    )
    for run, report in zip(runs, reports, strict=True):
        print(describe_run(run, report))
    if len(runs) > 1:
        # The unpruned runs in --output are needed too, because the average is relative to them.
        from llava.eval.results.published_table import show_runs

        print(show_runs([run.folder for run in runs], args.output))


if __name__ == "__main__":
    main()
