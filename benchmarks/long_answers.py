"""What cache policies, and methods before the LLM, change in answers of 43 to 79 tokens.

    python benchmarks/long_answers.py [--pictures 400]

The benchmark shapes_captions asks the demo's captions checkpoint for captions: one forward pass reads the prompt, and 43
to 79 decode steps write the answer. Every setting below is a run of the launcher on the same pictures, so the command
continues after an interruption, and finished runs cost nothing. Per setting:

f1, precision, recall, exact, tally  as in llava/eval/benchmarks/shapes_captions.py; f1 and exact with intervals
f1_difference   f1 minus that of the first setting (all tokens, full cache), picture by picture, with its interval
changed         share of captions that are not those of the first setting, word for word
new_tokens      tokens of an answer
vision_tokens   vision tokens that enter the LLM
kept, read      bytes of the KV cache at the end of the answer, and that a decode step reads in the mean, as shares of
                the first setting's

Intervals are 95 % bootstrap intervals over pictures (10,000 resamples). Writes a CSV and prints it as a table. No time is
measured.
"""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path

import numpy as np
from page import put
from record import RESULTS, write_csv

from llava.common.command_line import positive
from llava.common.errors import UserError, exits_cleanly
from llava.common.files import BASE
from llava.common.find_checkpoint import find_checkpoint
from llava.common.machine import commit
from llava.common.text_table import markdown_table
from llava.config import AdaVConfig
from llava.eval.benchmarks import BENCHMARKS
from llava.eval.benchmarks.questions import read_lines
from llava.eval.benchmarks.shapes_captions import MEASURES
from llava.eval.runs.evaluate import evaluate_or_exit
from llava.eval.runs.run import DATA_ROOT, OUTPUT, Run
from llava.eval.runs.work_order import Generation
from llava.eval.scoring.bootstrap import cluster_intervals

DOCUMENT = BASE / "docs" / "adaptive_cache.md"
MARK = "long answers"
CHECKPOINT = "playground/llava-shapes-captions"
BATCH = 100
# Of the 144 vision tokens: 25 and 10 %.
BUDGETS = (36, 14)


def vision(rate: float, compute_rate: float, interval: int) -> dict:
    """Configuration keys of A-VL's vision rule."""
    return {
        "vision_adaptive_attention": True,
        "vision_adaptive_attention_rate": rate,
        "vision_adaptive_attention_compute_rate": compute_rate,
        "vision_adaptive_attention_update_interval": interval,
    }


def text(rate: float, rule: str = "h2o") -> dict:
    """Configuration keys of A-VL's text rule. The rule keeps at least 20 entries."""
    return {"text_pruning_flag": True, "text_pruning_rate": rate, "text_rule": rule}


def h2o(heavy: float, recent: float) -> dict:
    """Configuration keys of H2O with a fixed size."""
    return {"h2o_heavy_share": heavy, "h2o_recent_share": recent}


FULL = "all tokens, full cache"
# An interval of 99 is longer than any answer: the core that prefill chose stays.
NEVER = 99
PUBLISHED = vision(0.5, 0.7, 3) | text(0.4)
SETTINGS = {
    FULL: {},
    **{
        f"{method}, {tokens} tokens": {"method": method, "overall_tokens": tokens}
        for tokens in BUDGETS
        for method in ("adav", "fastervlm", "random")
    },
    "A-VL, published setting": PUBLISHED,
    "A-VL, vision 0.5 / 0.5": vision(0.5, 0.5, -1),
    "A-VL, vision 0.8 / 0.8": vision(0.8, 0.8, -1),
    "A-VL, vision 0.9 / 0.9": vision(0.9, 0.9, -1),
    "A-VL, vision 0.5 / 0.7, interval 3": vision(0.5, 0.7, 3),
    "A-VL, vision 0.5 / 0.9, interval 3": vision(0.5, 0.9, 3),
    "A-VL, vision 0.5 / 0.9, interval 10": vision(0.5, 0.9, 10),
    "A-VL, vision 0.5 / 0.9, never again": vision(0.5, 0.9, NEVER),
    "A-VL, text 0.4": text(0.4),
    "A-VL, text 0.6": text(0.6),
    "A-VL, text 0.8": text(0.8),
    "A-VL, text 0.6, history": text(0.6, "history"),
    "A-VL, text 0.6, direct": text(0.6, "direct"),
    "H2O, growing 50 %": {"all_use_h2o": True},
    "H2O, heavy 40 % + recent 10 %": h2o(0.4, 0.1),
    "H2O, heavy 25 % + recent 25 %": h2o(0.25, 0.25),
    "H2O, heavy 10 % + recent 40 %": h2o(0.1, 0.4),
    "H2O, heavy 10 % + recent 10 %": h2o(0.1, 0.1),
    "adav, 36 tokens, and A-VL, published setting": {"method": "adav", "overall_tokens": 36} | PUBLISHED,
}


def rows_of(runs: dict[str, Run], reports: dict[str, dict]) -> list[dict]:
    """One row per setting, in the order of `runs`, whose first one is the reference."""
    # 1. Per setting and measure, one number per picture.
    texts, values = {}, {}
    for name, run in runs.items():
        answers = [row for _, row in read_lines(run.merged)]
        judged = run.benchmark.judged(run.samples, answers)
        texts[name] = [row["text"] for row in answers]
        values[name] = {measure: np.array([float(getattr(one, measure)) for one in judged]) for measure in MEASURES}
    # 2. One bootstrap over all columns, so that all use the same draws.
    pictures = [sample.image for sample in next(iter(runs.values())).samples]
    first = next(iter(runs))
    columns = {}
    for name, found in values.items():
        columns[name, "f1"], columns[name, "exact"] = found["f1"], found["exact"]
        columns[name, "f1_difference"] = found["f1"] - values[first]["f1"]
    intervals = cluster_intervals(np.stack([*columns.values()], axis=1), pictures)
    interval = dict(zip(columns, zip(*intervals, strict=True), strict=True))
    # 3. The rows.
    rows, whole = [], reports[first]
    for name, run in runs.items():
        report = reports[name]
        row = {"setting": name, "configuration": run.config.digest, "pictures": len(pictures)}
        row |= {measure: values[name][measure].mean() for measure in MEASURES}
        for column in ("f1", "exact", "f1_difference"):
            mean, low, high = interval[name, column]
            row |= {column: mean, f"{column}_low": low, f"{column}_high": high}
        row["changed"] = float(np.mean([one != other for one, other in zip(texts[name], texts[first], strict=True)]))
        row["new_tokens"] = report["new_tokens"]["mean"]
        row["vision_tokens"] = report["vision_tokens_per_image"]["after"]
        row["kept"] = report["kv_bytes_live"]["mean"] / whole["kv_bytes_live"]["mean"]
        row["read"] = report["kv_bytes_read"]["mean"] / whole["kv_bytes_read"]["mean"]
        rows.append({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
    return rows


def table(rows: list[dict]) -> str:
    """Markdown table of the rows."""
    head = ("setting", "F1 [95 %]", "minus full [95 %]", "exact", "tally", "changed", "kept", "read per step")
    lines = [head]
    for row in rows:
        f1, low, high = (100 * row[name] for name in ("f1", "f1_low", "f1_high"))
        less, least, most = (100 * row[f"f1_difference{end}"] for end in ("", "_low", "_high"))
        lines.append(
            (
                row["setting"],
                f"{f1:.1f} [{low:.1f}, {high:.1f}]",
                "" if row["setting"] == FULL else f"{less:+.1f} [{least:+.1f}, {most:+.1f}]",
                *(f"{row[name]:.0%}" for name in ("exact", "tally", "changed", "kept", "read")),
            )
        )
    return markdown_table(lines, left=1)


@exits_cleanly
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=positive, default=400, help="the first so many of the test split (400)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where run folders go (default: runs/)")
    parser.add_argument("--out", type=Path, default=RESULTS / "long-answers.csv", help="the CSV")
    parser.add_argument("--page", action="store_true", help="also put the table into docs/adaptive_cache.md")
    args = parser.parse_args()
    # 1. All settings are runs of one checkpoint, so one process answers them all.
    checkpoint = find_checkpoint(CHECKPOINT)
    benchmark = BENCHMARKS["shapes_captions"](DATA_ROOT, checkpoint)
    if args.pictures > benchmark.questions:
        raise UserError(f"--pictures is {args.pictures}, allowed are 1 to {benchmark.questions}")
    generation = Generation(benchmark.max_new_tokens, device="cpu")
    runs = {
        name: Run(
            benchmark, AdaVConfig(**{"method": "none"} | keys), checkpoint, generation, args.output, limit=args.pictures
        )
        for name, keys in SETTINGS.items()
    }
    reports = dict(zip(runs, evaluate_or_exit([*runs.values()], 1, [], BATCH, False, "long answers"), strict=True))
    # 2. The CSV and the table.
    packages = next(iter(reports.values()))["environment"]["packages"]
    versions = ", ".join(
        [f"Python {platform.python_version()}", *(f"{name} {packages[name]}" for name in ("torch", "transformers"))]
    )
    made = {
        "command": " ".join(["python", "benchmarks/long_answers.py", *sys.argv[1:]]),
        "hardware": f"{platform.machine()} CPU, float32",
        "versions": versions,
        "commit": commit(),
    }
    rows = rows_of(runs, reports)
    write_csv(args.out, rows, made)
    shown = table(rows)
    print(f"{shown}\n\nwritten to {args.out}")
    if args.page:
        put(DOCUMENT, MARK, shown)


if __name__ == "__main__":
    main()
