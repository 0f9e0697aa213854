"""Evaluate a checkpoint on a benchmark: shards over the devices, resumes, merges, scores.

    python -m llava.eval.launch BENCHMARK [TOKENS] --family demo|v1_5|v1_6|v1_6_34B [--shards N] [flags]

The scripts below scripts/ are this command with a family. The same command goes on after any interruption, also with
another number of shards. Imports no torch: whatever is wrong with the input shows before a model is loaded.
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
from pathlib import Path

from llava.config import AdaVConfig, add_config_flags, config_overrides
from llava.errors import UserError, exits_cleanly
from llava.eval.arguments import Parser, positive
from llava.eval.benchmarks import BENCHMARKS
from llava.eval.checkpoints import find_checkpoint
from llava.eval.environment import code_digest, commit
from llava.eval.files import REPOSITORY
from llava.eval.run import Generation, Run
from llava.eval.shards import Interrupted, ShardFailure, device_groups, run_shards

FAMILIES = {
    "demo": "playground/llava-shapes-v1.5",
    "v1_5": "liuhaotian/llava-v1.5-7b",
    "v1_6": "liuhaotian/llava-v1.6-vicuna-7b",
    "v1_6_34B": "liuhaotian/llava-v1.6-34b",
}
DATA_ROOT = REPOSITORY / "playground" / "data" / "eval"
OUTPUT = REPOSITORY / "runs"
BATCH_SIZE = 8


def split(items: list, parts: int) -> list[list]:
    """`parts` runs of neighbours, sizes differing by at most one (some are empty where there are too few items)."""
    size, longer = divmod(len(items), parts)
    ends = [i * size + min(i, longer) for i in range(parts + 1)]
    return [items[a:b] for a, b in zip(ends, ends[1:], strict=False)]


def carry_out(
    runs: list[Run], shards: int, devices: list[str], batch_size: int, fresh: bool = False, title: str = ""
) -> list[dict]:
    """Answer, merge and score runs of one checkpoint, which share the worker processes. Returns each run's report.

    Raises ShardFailure or Interrupted with everything that was answered on disk, UserError for bad input.
    """
    try:
        for run in runs:
            run.open(fresh)
        missing = [run.todo() for run in runs]
        shards = max(1, min(shards, max(map(len, missing))))
        session = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": shlex.join([Path(sys.executable).name, *sys.argv]),
            "commit": commit(),
            "code": code_digest(),
            "shards": shards,
            "devices": devices or ["cpu"],
            "batch_size": batch_size,
        }
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
                _answer(runs, missing, shards, devices, batch_size, title)
            scores = [run.finish() for run in runs]
        except BaseException as error:
            with suppress(UserError):  # a full disk must not hide what went wrong first
                for run, before in zip(runs, reused, strict=True):
                    run.refresh()
                    record(run, before, f"{type(error).__name__}: {error}", None)
            raise
        return [record(run, before, "finished", score) for run, before, score in zip(runs, reused, scores, strict=True)]
    finally:
        for run in runs:
            run.close()


def _answer(runs: list[Run], missing: list[list], shards: int, devices: list[str], batch_size: int, title: str) -> None:
    orders: list[list[Path]] = [[] for _ in range(shards)]
    for run, samples in zip(runs, missing, strict=True):
        for shard, part in enumerate(split(samples, shards)):
            if part:
                orders[shard].append(run.write_order(shard, part, batch_size))
    run_shards(
        orders,
        answers=[run.answers_of(shard) for run in runs for shard in range(shards)],
        devices=devices,
        locks=[run.lock for run in runs],
        logs=[runs[0].shards / f"shard-{shard}.log" for shard in range(shards)],
        title=title,
        todo=sum(map(len, missing)),
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    env = os.environ
    parser = Parser(prog="python -m llava.eval.launch", description=__doc__.split("\n")[0])
    parser.add_argument("benchmark", help=", ".join(BENCHMARKS))
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
        "--data-root", type=Path, default=env.get("DATA_ROOT"), help="default: $DATA_ROOT, else playground/data/eval"
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
    parser.add_argument("--limit", type=positive, help="only the first N questions")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "float16", "bfloat16"),
        help="auto: float32 on CPU, the checkpoint's own on GPU",
    )
    parser.add_argument("--fresh", action="store_true", help="forget what this very run has answered already")
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


def plan(args: argparse.Namespace) -> tuple[Run, list[str]]:
    """The run that the command line asks for and the devices it may use, every input checked."""
    if args.benchmark not in BENCHMARKS:
        raise UserError(f'unknown benchmark "{args.benchmark}", allowed are {", ".join(BENCHMARKS)}')
    config = configuration(args)
    name = args.checkpoint or (args.family and FAMILIES[args.family])
    if not name:
        raise UserError("no checkpoint is named; give --family, --checkpoint or CKPT=")
    if args.conv_mode is not None:
        from llava.conversation import get_conversation

        get_conversation(args.conv_mode)
    devices = device_groups(args.gpus_per_model)
    checkpoint = find_checkpoint(name)
    model_base = find_checkpoint(args.model_base) if args.model_base else None
    benchmark = BENCHMARKS[args.benchmark](Path(args.data_root or DATA_ROOT), checkpoint)
    generation = Generation(
        max_new_tokens=args.max_new_tokens or benchmark.max_new_tokens,
        conversation=args.conv_mode,
        dtype=args.dtype,
        device="cuda" if devices else "cpu",
    )
    return Run(benchmark, config, checkpoint, generation, args.output, model_base, args.limit), devices


def describe(run: Run, report: dict) -> str:
    """A finished run in a few lines."""
    session, tokens = report["sessions"][-1], report["vision_tokens_per_image"]
    lines = [f"{run.benchmark.name}, {run.checkpoint.short_name}, method {run.config.method}:"]
    for name, value in report["score"].items():
        parts = value.items() if isinstance(value, dict) else [(None, value)]
        shown = ", ".join(
            (f"{k} " if k else "") + (f"{100 * v:.1f} %" if isinstance(v, float) else str(v)) for k, v in parts
        )
        lines.append(f"  {name.replace('_', ' ')}: {shown}")
    if tokens["images"]:
        layers = f", {tokens['layer_mean']:.1f} over layers" if tokens["layer_mean"] != tokens["after"] else ""
        lines.append(
            f"  vision tokens per image: {tokens['before']:.1f} -> {tokens['after']:.1f}{layers} (mean of {tokens['images']})"
        )
    lines.append(
        f"  KV cache per sample: {report['kv_bytes_live']['mean']:,.0f} bytes live, {report['kv_bytes_allocated']['mean']:,.0f} allocated"
    )
    flops = report["prefill_flops_predicted"]["mean"]
    if flops is not None:
        lines.append(f"  predicted prefill per question: {flops / 1e9:,.3f} GFLOPs")
    reused = f", {session['reused']} from before" if session["reused"] else ""
    lines.append(f"  {session['answered']} questions answered in {session['wall_seconds']:.1f} s{reused}")
    lines.append(f"  {run.folder}")
    return "\n".join(lines)


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    try:
        run, devices = plan(args)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    title = f"{run.benchmark.name} {run.folder.name}"
    try:
        (report,) = carry_out([run], args.shards or max(1, len(devices)), devices, args.batch_size, args.fresh, title)
    except (ShardFailure, Interrupted) as error:
        kept = f"{len(run.answered)} of {len(run.samples)} questions are answered and kept; the same command goes on from there"
        if isinstance(error, Interrupted):
            print(f"stopped by {error}: {kept}", file=sys.stderr)
            sys.exit(128 + error.number)
        print(f"error: {error}\n{kept}", file=sys.stderr)
        sys.exit(1)
    print(describe(run, report))


if __name__ == "__main__":
    main()
