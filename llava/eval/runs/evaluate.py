"""Evaluate runs: answer what is missing, merge, score, and record how it went."""

from __future__ import annotations

import shlex
import sys
import time
from contextlib import suppress
from pathlib import Path

from llava.common.errors import UserError
from llava.common.machine import code_digest, commit
from llava.eval.runs.division import divide, useful_shards
from llava.eval.runs.machines import Ranks
from llava.eval.runs.run import Run
from llava.eval.runs.worker_processes import Interrupted, ShardFailure, run_shards


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
