"""Seconds of the demo on an idle machine and beside a process that keeps one core busy.

    python benchmarks/busy_machine.py [--limit 100] [--repeats 3] [--settings default,one] [--output FILE.csv]
    python benchmarks/busy_machine.py --table FILE.csv        # put a table of results into docs/evaluation.md

Each run is `python -m llava.eval.demo` in a new process, on a CPU, with the start of all its workers. Settings and the two
states of the machine take turns in every repetition. Nothing else should run meanwhile. Figures are medians.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from page import made, number, put_results
from record import RESULTS, how, write_csv

from llava.common.command_line import Parser, names, positive
from llava.common.errors import UserError, exits_cleanly
from llava.common.files import REPOSITORY
from llava.common.machine import cores
from llava.common.progress import progress_bar
from llava.common.text_table import columns, markdown_table

DOCUMENT = REPOSITORY / "docs" / "evaluation.md"
# name -> (what it is, flags of the demo, environment)
SETTINGS = {
    "default": ("the launcher's choice", [], {}),
    "one": ("1 process, 1 thread", ["--shards", "1", "--threads", "1"], {}),
    "passive": (f"1 process, {cores()} threads that sleep", ["--shards", "1", "--threads", str(cores())], {}),
    "active": (
        f"1 process, {cores()} threads that spin (torch's own choice)",
        ["--shards", "1", "--threads", str(cores())],
        {"OMP_WAIT_POLICY": "ACTIVE"},
    ),
}
# What a run must not inherit: the choice of threads is what is measured.
_DECIDED = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")


@contextmanager
def one_core_busy(busy: bool):
    """Context in which another process computes all the time, if `busy`."""
    other = subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) if busy else None
    try:
        yield
    finally:
        if other is not None:
            other.kill()
            other.wait()


def run_demo(setting: str, limit: int | None) -> float:
    """Seconds of one run of the demo. UserError if it fails, with its last line."""
    _, flags, variables = SETTINGS[setting]
    flags = flags + (["--limit", str(limit)] if limit else [])
    kept = {name: value for name, value in os.environ.items() if name not in _DECIDED}
    environment = {**kept, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY), **variables}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "llava.eval.demo", "--output", folder, *flags]
        start = time.perf_counter()
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        seconds = time.perf_counter() - start
    if done.returncode:
        raise UserError(f"{' '.join(command)}: failed ({(done.stderr.splitlines() or ['nothing said'])[-1]})")
    return seconds


def measure(settings: list[str], repeats: int, limit: int | None) -> dict[tuple[str, bool], list[float]]:
    """Seconds by setting and whether a core was busy, after one short run that fills the file caches."""
    run_demo(settings[0], 20)
    turns = [(setting, busy) for setting in settings for busy in (False, True)] * repeats
    seconds: dict[tuple[str, bool], list[float]] = {}
    for setting, busy in progress_bar("measuring", turns, unit=" runs"):
        with one_core_busy(busy):
            seconds.setdefault((setting, busy), []).append(run_demo(setting, limit))
    return seconds


def rows_of(seconds: dict[tuple[str, bool], list[float]]) -> list[dict]:
    """One row per setting. busy_of_idle: ratio of the medians."""
    rows = []
    for setting in dict.fromkeys(setting for setting, _ in seconds):
        row = {"setting": setting, "what": SETTINGS[setting][0]}
        for name, busy in (("idle", False), ("busy", True)):
            times = seconds[setting, busy]
            row |= {f"{name}_s": round(statistics.median(times), 2)}
            row |= {f"{name}_s_min": round(min(times), 2), f"{name}_s_max": round(max(times), 2)}
        row["busy_of_idle"] = round(row["busy_s"] / row["idle_s"], 3)
        rows.append(row)
    return rows


def lines_of(rows: list[dict]) -> list[tuple[str, ...]]:
    lines = [("processes and threads", "idle s", "with a busy core s", "busy / idle")]
    for row in rows:
        spans = (
            f"{number(row[f'{name}_s'], 1)} ({number(row[f'{name}_s_min'], 1)} to {number(row[f'{name}_s_max'], 1)})"
            for name in ("idle", "busy")
        )
        lines.append((row["what"], *spans, number(row["busy_of_idle"], 2)))
    return lines


def fill(document: Path, results: Path) -> None:
    """Put the table of `results` into `document`, between the marks `busy_machine`."""

    def table(rows: list[dict]) -> str:
        return f"{made(rows)}; {number(rows[0]['cores'])} cores, medians of {number(rows[0]['repeats'])}.\n\n{markdown_table(lines_of(rows))}"

    put_results(document, "busy_machine", [results], "busy_of_idle", table)


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python benchmarks/busy_machine.py", description=__doc__.split("\n")[0])
    parser.add_argument("--settings", type=names, default=list(SETTINGS), help=f"of {', '.join(SETTINGS)} (all)")
    parser.add_argument("--limit", type=positive, help="questions per checkpoint and method (default: the demo's)")
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "busy_machine-cpu.csv", help="(%(default)s)")
    parser.add_argument("--table", type=Path, metavar="CSV", help="measure nothing: fill --document")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="default: docs/evaluation.md")
    args = parser.parse_args(argv)
    if args.table:
        fill(args.document, args.table)
        return
    if unknown := set(args.settings) - set(SETTINGS):
        raise UserError(f'--settings has "{min(unknown)}", allowed are {", ".join(SETTINGS)}')
    args.given, args.preset, args.dtype = sys.argv[1:] if argv is None else argv, "demo", "float32"
    rows = rows_of(measure(args.settings, args.repeats, args.limit))
    facts = {"limit": args.limit, "cores": cores(), **how(args, "busy_machine.py", "cpu")}
    write_csv(args.output, rows, {**facts, "threads": None})  # those of the runs differ
    print(f"{columns(lines_of(rows))}\n\n{facts['device']}, {cores()} cores, medians of {args.repeats}; {args.output}")


if __name__ == "__main__":
    main()
