"""Questions per second of an evaluation's worker on vLLM: all vision tokens against selected ones, and our own engine.

    .venv-vllm/bin/python benchmarks/vllm_throughput.py [--checkpoint playground/llava-shapes-v1.6] [--tokens 58]
        [--pictures 32] [--each 4] [--repeats 5] [--threads 1] [--device cuda] [--output FILE.csv]
    python benchmarks/vllm_throughput.py --table FILE.csv [FILE.csv ...]      # put tables of results into docs/serving.md

It runs under a Python with vLLM. The workers are llava.eval.runs.answer_on_vllm and llava.eval.runs.answer_shard, as
the launcher starts them. Loading is not counted. In every repetition the workers take turns, so that a machine that
slows down slows all of them. All caches are empty at the start of each repetition, so a repetition shares what its own
questions share: the pass of the vision tower, and in vLLM the prefix of the KV cache where the method allows it. The
answers of a method must be the same in every repetition. Figures are medians.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from importlib.metadata import packages_distributions, version
from pathlib import Path

import torch
from page import made, number, put_results
from questions import make_questions
from record import RESULTS, how, pick, write_csv

from llava.common.command_line import Parser, positive
from llava.common.errors import UserError, exits_cleanly
from llava.common.files import REPOSITORY
from llava.common.find_checkpoint import find_checkpoint
from llava.common.progress import progress_bar
from llava.common.text_table import columns, markdown_table
from llava.config import AdaVConfig
from llava.eval.runs.exported import Exported
from llava.eval.runs.run import BATCH_SIZES
from llava.eval.runs.work_order import Generation, WorkOrder

DOCUMENT = REPOSITORY / "docs" / "serving.md"
CHECKPOINT = REPOSITORY / "playground" / "llava-shapes-v1.6"
MAX_NEW_TOKENS = 8
# name -> (engine, method). The first is what the others are compared with.
WORKERS = {
    "vLLM": ("vllm", "none"),
    "vLLM + fastervlm": ("vllm", "fastervlm"),
    "vLLM + adav": ("vllm", "adav"),
    "own engine": ("llava", "none"),
    "own engine + adav": ("llava", "adav"),
}


@dataclass
class Loop:
    """A worker with its order. run() answers all samples and returns the seconds; answers: those of the last run."""

    answerer: object
    order: WorkOrder
    answers: list[str] | None = None

    def run(self, file: Path) -> float:
        start = time.perf_counter()
        self.answerer.run(replace(self.order, answers=file), threading.Event())
        seconds = time.perf_counter() - start
        rows = {tuple(row["key"]): row["answer"] for row in map(json.loads, file.read_text().splitlines())}
        answers = [rows[sample.key] for sample in self.order.samples]
        if self.answers not in (None, answers):
            raise UserError(f"method {self.order.config.method}: a repetition answers otherwise, so no figure is given")
        self.answers = answers
        return seconds


def load(order: WorkOrder, engine: str) -> Loop:
    """Start the worker of `engine` for `order`."""
    if engine == "vllm":
        from llava.eval.runs.answer_on_vllm import VllmAnswerer

        return Loop(VllmAnswerer(order), order)
    from llava.eval.runs.answer_shard import ShardAnswerer

    return Loop(ShardAnswerer(order), order)


def measure(loops: dict[str, Loop], repeats: int, folder: Path) -> dict[str, list[float]]:
    """Seconds of every repetition per worker, after one that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for repeat in progress_bar("measuring", range(repeats + 1), unit=" repetitions"):
        for name, loop in loops.items():
            took = loop.run(folder / f"{name}-{repeat}.jsonl")
            if repeat:
                seconds[name].append(took)
    return seconds


def rows_of(seconds: dict[str, list[float]], loops: dict[str, Loop], questions: int) -> list[dict]:
    """One row per worker. of_plain: its questions per second over those of plain vLLM, of the medians."""
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return [
        {
            "worker": name,
            "method": loops[name].order.config.method,
            "overall_tokens": None
            if loops[name].order.config.method == "none"
            else loops[name].order.config.overall_tokens,
            "questions_per_second": round(questions / medians[name], 3),
            "questions_per_second_min": round(questions / max(times), 3),
            "questions_per_second_max": round(questions / min(times), 3),
            "of_plain": round(medians["vLLM"] / medians[name], 3),
        }
        for name, times in seconds.items()
    ]


def lines_of(rows: list[dict]) -> list[tuple[str, ...]]:
    lines = [("worker", "vision tokens", "questions/s", "slowest", "fastest", "of plain vLLM")]
    for row in rows:
        tokens = "all" if row["overall_tokens"] is None else number(row["overall_tokens"])
        speeds = (number(row[f"questions_per_second{end}"], 1) for end in ("", "_min", "_max"))
        lines.append((row["worker"], tokens, *speeds, number(row["of_plain"], 2)))
    return lines


def fill(document: Path, results: list[Path]) -> None:
    """Put the tables of `results` into `document`, one after another, between the marks `vllm_throughput`."""

    def table(rows: list[dict]) -> str:
        what = f"{rows[0]['preset']}, {number(rows[0]['questions_per_picture'])} questions per picture"
        return f"{what}. {made(rows)}.\n\n{markdown_table(lines_of(rows))}"

    put_results(document, "vllm_throughput", results, "of_plain", table)


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python benchmarks/vllm_throughput.py", description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", default=str(CHECKPOINT), help="folder or hub name (the demo's v1.6)")
    parser.add_argument("--tokens", type=positive, help="vision tokens per image; default: that of adav_configs.json")
    parser.add_argument(
        "--workers", default=",".join(WORKERS), help="which, separated by commas; the first always runs"
    )
    parser.add_argument("--pictures", type=positive, default=32)
    parser.add_argument("--each", type=positive, default=4, help="questions per picture (4)")
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--threads", type=positive, help="CPU threads; default: torch's own choice")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU where there is one")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: bfloat16 on a GPU")
    parser.add_argument(
        "--output", type=Path, help="default: runs/benchmarks/vllm_throughput-<checkpoint>-<device>.csv"
    )
    parser.add_argument("--table", type=Path, nargs="+", metavar="CSV", help="measure nothing: fill --document")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="default: docs/serving.md")
    args = parser.parse_args(argv)
    if args.table:
        fill(args.document, args.table)
        return
    names = ["vLLM", *(name for name in WORKERS if name in args.workers.split(",") and name != "vLLM")]
    if unknown := set(args.workers.split(",")) - set(WORKERS):
        raise UserError(f'--workers has "{min(unknown)}", allowed are {", ".join(WORKERS)}')
    if "vllm" not in packages_distributions():
        raise UserError(f"{sys.executable} has no vLLM; run this with .venv-vllm/bin/python (make vllm)")
    # 1. What is answered, and by whom.
    args.device, args.dtype = pick(args.device, args.dtype)
    if args.threads:
        torch.set_num_threads(args.threads)
    checkpoint = find_checkpoint(args.checkpoint)
    args.given, args.preset = sys.argv[1:] if argv is None else argv, checkpoint.short_name
    output = args.output or RESULTS / f"vllm_throughput-{checkpoint.short_name}-{args.device}.csv"
    exported = Exported(checkpoint, None, RESULTS.parent)
    exported.write()
    budget = {"overall_tokens": args.tokens} if args.tokens else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        family = "v1.6" if checkpoint.anyres else "v1.5"
        samples = tuple(make_questions(folder, family, args.pictures, args.each))
        loops = {}
        for worker in names:
            engine, method = WORKERS[worker]
            order = WorkOrder(
                checkpoint=str(checkpoint.folder),
                model_base=None,
                config=AdaVConfig(method=method, **budget),
                generation=Generation(MAX_NEW_TOKENS, dtype=args.dtype, device=args.device),
                batch_size=BATCH_SIZES[engine],
                image_folder=folder,
                answers=folder / "answers.jsonl",
                samples=samples,
                for_vllm=str(exported.folder) if engine == "vllm" else None,
            )
            loops[worker] = load(order, engine)
        seconds = measure(loops, args.repeats, folder)
    # 2. Write and print.
    rows = rows_of(seconds, loops, len(samples))
    facts = {
        "pictures": args.pictures,
        "questions_per_picture": args.each,
        "questions": len(samples),
        "vllm": version(packages_distributions()["vllm"][0]),  # its package may have another name
        **how(args, "vllm_throughput.py", args.device),
    }
    write_csv(output, rows, facts)
    print(
        f"{columns(lines_of(rows))}\n\n{facts['device']}, {facts['threads']} threads, medians of {args.repeats}; {output}"
    )


if __name__ == "__main__":
    main()
