"""Evaluation of runs: answer the missing questions, merge the answers, score them, and write run.json."""

from __future__ import annotations

import shlex
import sys
import time
from contextlib import suppress
from pathlib import Path

from llava.common.errors import UserError
from llava.common.machine import code_digest, commit
from llava.eval.runs.division import divide
from llava.eval.runs.machines import Ranks
from llava.eval.runs.run import Run
from llava.eval.runs.shard_count import batch_size_of, shard_threads, shards_to_start
from llava.eval.runs.worker_processes import Interrupted, ShardFailure, run_shards, threads_of_each


def evaluate_runs(
    runs: list[Run],
    shards: int | None,
    devices: list[str],
    batch_size: int | None,
    fresh: bool = False,
    title: str = "",
    partial: bool = False,
    ranks: Ranks | None = None,
    threads: int | None = None,
) -> list[dict]:
    """Answer, merge and score runs of one checkpoint; return the report of each run.

    All runs have the same engine and share its worker processes, so the checkpoint is loaded once per shard.
    shards, threads, batch_size: processes, CPU threads of each, samples of a batch; None leaves the choice to
        llava.eval.runs.shard_count.
    devices: one entry per device or device group; [] is the CPU. title: shown in the line of progress.
    partial: if images are unreadable, score the other questions and say so in the score.
    ranks: the ranks that have joined, of which this process is rank 0; `shards` then counts the shards of all ranks.
    Raises ShardFailure or Interrupted, with all finished answers on disk, and UserError for bad input.
    """
    # 1. Lock the folders, and find out what is missing.
    try:
        for run in runs:
            run.open(fresh)
        missing = [run.todo() for run in runs]
        shards, threads = shards_to_start(runs, missing, shards, devices), shard_threads(runs, threads, devices)
        batch_size = batch_size_of(runs, batch_size, devices)
        # 2. Facts about this start of the command, for run.json.
        session = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": shlex.join([Path(sys.executable).name, *sys.argv]),
            "commit": commit(),
            "code": code_digest(runs[0].engine.name),
            "shards": shards,
            "threads": threads_of_each(shards, threads),
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
            # A warning, no error: most changes of the code leave answers as they are.
            if run.note_code(session["code"]):
                text = (
                    f"warning: {len(run.answered)} answers came from another version of the code; --fresh answers anew"
                )
                print(text, file=sys.stderr)
        # 3. Answer what is missing.
        try:
            if any(missing):
                _answer(runs, missing, shards, threads, devices, batch_size, title, ranks)
        # BaseException, because KeyboardInterrupt is no Exception: run.json should record that end too.
        except BaseException as error:
            # If the disk is full, writing run.json fails too. The first error is the one to report.
            with suppress(UserError):
                for run, before in zip(runs, reused, strict=True):
                    run.refresh()
                    record(run, before, f"{type(error).__name__}: {error}", None)
            raise
        # 4. Merge, score and record each run.
        reports, failed = [], []
        for run, before in zip(runs, reused, strict=True):
            try:
                reports.append(record(run, before, "finished", run.finish(partial)))
            except UserError as error:
                # Go on: the other runs are complete and can be scored.
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
    threads: int | None,
    devices: list[str],
    batch_size: int,
    title: str,
    ranks: Ranks | None,
) -> None:
    """Write the work orders of all shards, and run the shards here or over all ranks."""
    engine = runs[0].engine
    if engine.name == "vllm":
        runs[0].exported.write()
    # A shard gets one order per run, and answers them one after another with the same loaded checkpoint.
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
        "threads": threads,
    }
    if ranks:
        ranks.lead(**work, folders=[run.folder for run in runs])
    else:
        run_shards(**work, devices=devices, python=engine.python)


def follow_rank_zero(ranks: Ranks) -> None:
    """Answer the shards that rank 0 gives to this rank. Exit codes are those of rank 0."""
    try:
        ranks.follow()
    except ShardFailure as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except Interrupted as error:
        sys.exit(128 + error.number)


def evaluate_or_exit(runs: list[Run], *arguments, **settings) -> list[dict]:
    """Call `evaluate_runs`; on failure, print the reason and how many answers are kept, and exit.

    Exit codes: 1 if a shard died, 128 + n if signal n stopped the launcher.
    """
    try:
        return evaluate_runs(runs, *arguments, **settings)
    except (ShardFailure, Interrupted) as error:
        answered, all_ = sum(len(run.answered) for run in runs), sum(len(run.samples) for run in runs)
        kept = f"{answered} of {all_} questions are answered and kept; the same command continues from there"
        if isinstance(error, Interrupted):
            print(f"stopped by {error}: {kept}", file=sys.stderr)
            sys.exit(128 + error.number)
        print(f"error: {error}\n{kept}", file=sys.stderr)
        sys.exit(1)
