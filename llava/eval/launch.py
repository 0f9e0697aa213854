"""Evaluate a checkpoint on a benchmark: shards over the devices, resumes, merges, scores.

    python -m llava.eval.launch BENCHMARK|all [TOKENS] --family demo|v1_5|v1_6|v1_6_34B [--shards N] [flags]

The scripts below scripts/ are this command with a family; "all" are the seven benchmarks of the published table, answered by
the same processes and printed as that table. Under torchrun each rank takes its share (llava.eval.runs.machines).
The same command goes on after any interruption, also with another number of shards or ranks.
A single process imports no torch: whatever is wrong with the input shows before a model is loaded.
Exit codes: 0 done, 1 a shard died, 2 bad input (one sentence), 128 + n stopped by signal n.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from llava.common.command_line import Parser, existing_folder, positive
from llava.common.errors import UserError, exits_cleanly
from llava.common.files import REPOSITORY
from llava.common.find_checkpoint import find_checkpoint
from llava.common.machine import code_digest, commit
from llava.config import AdaVConfig, add_config_flags, config_overrides
from llava.conversation import get_conversation
from llava.eval.benchmarks import BENCHMARKS
from llava.eval.results.published import TABLE
from llava.eval.runs.describe import describe_plan, describe_run
from llava.eval.runs.division import Subset, divide, useful_shards
from llava.eval.runs.machines import Ranks
from llava.eval.runs.run import Generation, Run
from llava.eval.runs.worker_processes import Interrupted, ShardFailure, device_groups, run_shards


@dataclass(frozen=True)
class Family:
    """A checkpoint, and the conversation template it was trained with where its files may leave that open."""

    checkpoint: str
    conversation: str | None = None


FAMILIES = {
    "demo": Family("playground/llava-shapes-v1.5"),
    "v1_5": Family("liuhaotian/llava-v1.5-7b"),
    "v1_6": Family("liuhaotian/llava-v1.6-vicuna-7b"),
    "v1_6_34B": Family("liuhaotian/llava-v1.6-34b", "chatml_direct"),
}
DATA_ROOT = REPOSITORY / "playground" / "data" / "eval"
OUTPUT = REPOSITORY / "runs"
BATCH_SIZE = 8


def carry_out(
    runs: list[Run],
    shards: int,
    devices: list[str],
    batch_size: int,
    fresh: bool = False,
    title: str = "",
    partial: bool = False,
    ranks: Ranks | None = None,
) -> list[dict]:
    """Answer, merge and score runs of one checkpoint, which share the worker processes. Returns each run's report.

    partial: score also a run with unreadable images, on the other questions, and say so.
    ranks: this is rank 0 of several that have joined; `shards` are then those of all of them.
    Raises ShardFailure or Interrupted with everything that was answered on disk, UserError for bad input.
    """
    try:
        for run in runs:
            run.open(fresh)
        missing = [run.todo() for run in runs]
        shards = useful_shards(missing, shards)
        session = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": shlex.join([Path(sys.executable).name, *sys.argv]),
            "commit": commit(),
            "code": code_digest(),
            "shards": shards,
            "devices": devices or ["cpu"],
            "batch_size": batch_size,
        }
        if ranks:
            session["ranks"] = [
                {"host": host, "devices": each or ["cpu"], "shards": count}
                for host, each, count in zip(ranks.hosts, ranks.devices, ranks.shards, strict=True)
            ]
        begun, reused = time.monotonic(), [len(run.answered) for run in runs]

        def record(run: Run, before: int, outcome: str, score: dict | None) -> dict:
            seconds = round(time.monotonic() - begun, 3)
            done = {
                "answered": len(run.answered) - before,
                "reused": before,
                "wall_seconds": seconds,
                "outcome": outcome,
            }
            return run.record({**session, **done}, score)

        for run in runs:
            if run.answered and not all(code == session["code"] for code in run.earlier_code()):
                text = (
                    f"warning: {len(run.answered)} answers came from another version of the code; --fresh answers anew"
                )
                print(text, file=sys.stderr)
        try:
            if any(missing):
                _answer(runs, missing, shards, devices, batch_size, title, ranks)
        except BaseException as error:
            with suppress(UserError):  # a full disk must not hide what went wrong first
                for run, before in zip(runs, reused, strict=True):
                    run.refresh()
                    record(run, before, f"{type(error).__name__}: {error}", None)
            raise
        reports, failed = [], []
        for run, before in zip(runs, reused, strict=True):
            try:
                reports.append(record(run, before, "finished", run.finish(partial)))
            except UserError as error:  # the other runs are scored all the same
                failed.append(error)
                with suppress(UserError):
                    record(run, before, f"{type(error).__name__}: {error}", None)
        if failed:
            raise failed[0]
        return reports
    finally:
        for run in runs:
            run.close()


def _answer(
    runs: list[Run],
    missing: list[list],
    shards: int,
    devices: list[str],
    batch_size: int,
    title: str,
    ranks: Ranks | None,
) -> None:
    orders: list[list[Path]] = [[] for _ in range(shards)]
    for run, samples in zip(runs, missing, strict=True):
        for shard, part in enumerate(divide(samples, shards)):
            if part:
                orders[shard].append(run.write_order(shard, part, batch_size))
    work = {
        "orders": orders,
        "answers": [run.answers_of(shard) for run in runs for shard in range(shards)],
        "locks": [run.lock for run in runs],
        "logs": [runs[0].shards / f"shard-{shard}.log" for shard in range(shards)],
        "title": title,
        "todo": sum(map(len, missing)),
    }
    if ranks:
        ranks.lead(**work, folders=[run.folder for run in runs])
    else:
        run_shards(**work, devices=devices)


def parse(argv: list[str] | None) -> argparse.Namespace:
    env = os.environ
    parser = Parser(prog="python -m llava.eval.launch", description=__doc__.split("\n")[0])
    parser.add_argument("benchmark", help=", ".join([*BENCHMARKS, f"or all, which is {', '.join(TABLE)}"]))
    parser.add_argument("tokens", nargs="?", help="vision tokens per image; overrides overall_tokens")
    parser.add_argument("--family", choices=FAMILIES, help="whose checkpoint to evaluate where CKPT names none")
    parser.add_argument(
        "--checkpoint", "--model-path", default=env.get("CKPT"), help="folder or hub name (default: $CKPT)"
    )
    parser.add_argument("--model-base", help="LLM under a LoRA or projector-only checkpoint")
    parser.add_argument(
        "--conv-mode",
        default=env.get("CONV_MODE"),
        help="conversation template (default: $CONV_MODE, else the checkpoint's)",
    )
    parser.add_argument(
        "--data-root",
        type=existing_folder,
        default=env.get("DATA_ROOT") or None,
        help="default: $DATA_ROOT, else playground/data/eval",
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where run folders go (default: runs/)")
    parser.add_argument("--config", help="default: $ADAV_CONFIG, else adav_configs.json of the repository")
    parser.add_argument("--shards", type=positive, help="processes (default: one per device or device group)")
    parser.add_argument(
        "--gpus-per-model",
        type=positive,
        default=env.get("GPUS_PER_MODEL", "1"),
        help="devices per shard (default: $GPUS_PER_MODEL, else 1)",
    )
    parser.add_argument(
        "--batch-size", type=positive, default=BATCH_SIZE, help=f"samples per batch (default {BATCH_SIZE})"
    )
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
        "--partial", action="store_true", help="score all but the questions with unreadable images, and say so"
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "float16", "bfloat16"),
        help="auto: float32 on CPU, the checkpoint's own on GPU",
    )
    parser.add_argument("--fresh", action="store_true", help="forget what this very run has answered already")
    parser.add_argument("--plan", action="store_true", help="print what would run, and run nothing")
    add_config_flags(parser)
    return parser.parse_intermixed_args(argv)


def configuration(args: argparse.Namespace) -> AdaVConfig:
    """The configuration file with the command line's overrides; UserError for whatever cannot be used."""
    overrides = config_overrides(args)
    if args.tokens is not None:
        try:
            tokens = positive(args.tokens)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"<tokens> is {error} (vision tokens per image, all tiles together)") from None
        if overrides.get("overall_tokens", tokens) != tokens:
            raise UserError(
                f"<tokens> is {tokens}, but --overall-tokens is {overrides['overall_tokens']}; give one of them"
            )
        overrides["overall_tokens"] = tokens
    return AdaVConfig.load(args.config, **overrides)


def plan(args: argparse.Namespace, devices: list[str]) -> list[Run]:
    """The runs that the command line asks for, every input checked."""
    if args.benchmark not in (*BENCHMARKS, "all"):
        raise UserError(f'unknown benchmark "{args.benchmark}", allowed are {", ".join([*BENCHMARKS, "all"])}')
    names = TABLE if args.benchmark == "all" else [args.benchmark]
    if args.split and len(names) > 1:
        raise UserError("--split goes with one benchmark, not with all")
    if args.limit and args.subset:
        raise UserError("--limit takes the first questions and --subset draws them; give one of them")
    config = configuration(args)
    family = FAMILIES.get(args.family)
    name = args.checkpoint or (family and family.checkpoint)
    if not name:
        raise UserError("no checkpoint is named; give --family, --checkpoint or CKPT=")
    conversation = args.conv_mode or (family.conversation if family and not args.checkpoint else None)
    if conversation is not None:
        get_conversation(conversation)
    checkpoint = find_checkpoint(name, fetch=not args.plan)
    model_base = find_checkpoint(args.model_base, fetch=not args.plan) if args.model_base else None
    subset = Subset(args.subset, args.subset_seed) if args.subset else None
    runs = []
    for each in names:
        benchmark = BENCHMARKS[each](args.data_root or DATA_ROOT, checkpoint, args.split)
        generation = Generation(
            max_new_tokens=args.max_new_tokens or benchmark.max_new_tokens,
            conversation=conversation,
            dtype=args.dtype,
            device="cuda" if devices else "cpu",
        )
        runs.append(Run(benchmark, config, checkpoint, generation, args.output, model_base, args.limit, subset))
    return runs


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    ranks = Ranks.of_environment()
    devices = device_groups(args.gpus_per_model, every=ranks is not None)
    if ranks is None:
        lead(args, args.shards or max(1, len(devices)), devices)
        return
    devices = ranks.share(devices)
    with ranks.joined(args.shards or max(1, len(devices)), devices):
        if ranks.rank == 0:
            lead(args, sum(ranks.shards), devices, ranks)
        else:
            carry_out_share(ranks)


def lead(args: argparse.Namespace, shards: int, devices: list[str], ranks: Ranks | None = None) -> None:
    """What the command line asks for, by the only process or by rank 0."""
    try:
        runs = plan(args, devices)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    if args.plan:
        print(describe_plan(runs, shards, devices))
        return
    title = f"{args.benchmark} {runs[0].folder.name if len(runs) == 1 else runs[0].checkpoint.short_name}"
    reports = answered_or_exit(runs, shards, devices, args.batch_size, args.fresh, title, args.partial, ranks)
    for run, report in zip(runs, reports, strict=True):
        print(describe_run(run, report))
    if len(runs) > 1:
        from llava.eval.table import show_runs

        print(show_runs([run.folder for run in runs], args.output))


def carry_out_share(ranks: Ranks) -> None:
    """What rank 0 gives to this rank; a shard that died or a signal ends it as it ends rank 0."""
    try:
        ranks.follow()
    except ShardFailure as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except Interrupted as error:
        sys.exit(128 + error.number)


def answered_or_exit(runs: list[Run], *arguments) -> list[dict]:
    """`carry_out`, as a command ends: a shard that died or a signal is told, and what is kept besides."""
    try:
        return carry_out(runs, *arguments)
    except (ShardFailure, Interrupted) as error:
        answered, all_ = sum(len(run.answered) for run in runs), sum(len(run.samples) for run in runs)
        kept = f"{answered} of {all_} questions are answered and kept; the same command goes on from there"
        if isinstance(error, Interrupted):
            print(f"stopped by {error}: {kept}", file=sys.stderr)
            sys.exit(128 + error.number)
        print(f"error: {error}\n{kept}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
