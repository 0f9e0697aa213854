"""The table of A-VL (arXiv 2409.14846) through lmms-eval: its data sets, configurations, plan and table. Imports no torch.

The paper's numbers are in no file of this project, so the table has our rows alone, and the numbers of all tokens that
FastV's README states for two of the data sets.
"""

from __future__ import annotations

import csv
import io
import math
import shlex
from dataclasses import dataclass, field

from llava.common.errors import UserError
from llava.common.find_checkpoint import EvalCheckpoint
from llava.common.text_table import markdown_table
from llava.config import AdaVConfig
from llava.eval.results.reproduction import Family
from llava.eval.runs.lmms_eval import LmmsRun
from llava.methods.index import method_names

FAMILY = Family("llava-v1.5-7b", "llava-hf/llava-1.5-7b-hf", 14.1, (288,), {})
METHODS = ("fastv", "h2o", "avl")
# Cache policies that keep every vision token before the LLM. `avl` is the one working point in the scripts of A-VL's
# repository; `h2o` is its baseline, half of the sequence.
POLICIES = {
    "avl": {
        "vision_adaptive_attention": True,
        "vision_adaptive_attention_rate": 0.5,
        "vision_adaptive_attention_compute_rate": 0.7,
        "vision_adaptive_attention_update_interval": 3,
        "text_pruning_flag": True,
        "text_pruning_rate": 0.4,
        "text_init_cache": 20,
        "text_rule": "h2o",
        "text_heavy_share": 0.7,
    },
    "h2o": {"all_use_h2o": True},
}


@dataclass(frozen=True)
class Task:
    """A task of lmms-eval.

    title: of its column. metric: in lmms-eval's results. scale: of the score in the table. data: its data set on the hub.
    documents, gigabytes: size of its split, and of the download (an estimate). text, new: tokens of a prompt beside the
    image, and of an answer (assumed). mean: whether the score is the mean of a score per document. key: the key of that
    score in a dictionary per document, if it is one.
    """

    title: str
    metric: str
    scale: float
    data: str
    documents: int
    gigabytes: float
    text: int
    new: int
    mean: bool = True
    key: str | None = None

    def of_document(self, row: dict) -> float:
        """Return the score of one document from its logged row."""
        value = row[self.metric]
        return float(value[self.key] if self.key else value)


TASKS = {
    "nocaps_val": Task("Nocaps CIDEr", "nocaps_CIDEr", 100, "lmms-lab-encoder/NoCaps", 4500, 5, 60, 20, mean=False),
    "flickr30k_test": Task(
        "Flickr30k CIDEr", "flickr_CIDEr", 100, "lmms-lab-encoder/flickr30k", 31783, 5, 60, 20, mean=False
    ),
    "docvqa_val": Task("DocVQA ANLS", "anls", 100, "lmms-lab-encoder/DocVQA", 5349, 10, 75, 8),
    "textvqa_val": Task("TextVQA accuracy", "exact_match", 100, "lmms-lab-encoder/textvqa", 5000, 9, 70, 5),
    "ocrbench": Task("OCRBench", "ocrbench_accuracy", 1000, "echo840/OCRBench", 1000, 0.1, 60, 10, key="score"),
    "vqav2_val": Task("VQAv2 accuracy", "exact_match", 100, "lmms-lab-encoder/VQAv2", 214354, 40, 70, 3),
}
# The five of the paper. vqav2_val is in the scripts of lmms-eval only.
USUAL = tuple(name for name in TASKS if name != "vqav2_val")
# All tokens of LLaVA-1.5-7B, as FastV's README states them (lmms-eval).
STATED = {"nocaps_val": 105.5, "flickr30k_test": 74.9}


def configurations(methods: list[str], tokens: list[int]) -> list[tuple[str, AdaVConfig]]:
    """Return (label, configuration): `none` once, each policy of POLICIES, and every other method at every budget.

    UserError for a name that is neither.
    """
    found = [("none", AdaVConfig(method="none"))]
    for method in methods:
        if method in POLICIES:
            found.append((method, AdaVConfig(method="none", **POLICIES[method])))
        elif method not in method_names():
            allowed = ", ".join(sorted({*POLICIES, *method_names()}))
            raise UserError(f'--methods: "{method}" is no method, allowed are {allowed}')
        elif method != "none":
            found += [(f"{method}-{budget}", AdaVConfig(method=method, overall_tokens=budget)) for budget in tokens]
    return found


def described(
    checkpoint: EvalCheckpoint, runs: list[LmmsRun], speed, gpus: int, installed: bool, arguments: str
) -> str:
    """Return the plan: weights, data sets, runs with hours, and the command of each run.

    speed: a MeasuredSpeed. gpus: GPUs at hand. installed: whether lmms-eval is. arguments: what the user gave.
    """
    from llava.costs.measured_speed import preset_cost

    lines = ["# Plan: A-VL's data sets through lmms-eval", ""]
    # 1. What must be here.
    if checkpoint.folder:
        lines.append(f"Weights: {checkpoint.name}, in {checkpoint.folder}.")
    else:
        lines.append(
            f"Weights: {checkpoint.name}, not here. About {FAMILY.gigabytes:g} GB from https://huggingface.co/"
            f"{checkpoint.name}; the run fetches them."
        )
    lines.append(f"lmms-eval: {'installed' if installed else 'not installed; make lmms-eval installs it'}.")
    # 2. The data sets. lmms-eval fetches each of them when its first run begins.
    tasks = list(dict.fromkeys(run.task for run in runs))
    counts = {name: min(TASKS[name].documents, runs[0].limit or TASKS[name].documents) for name in tasks}
    rows = [("task", "documents", "GB to download", "page")]
    for name in tasks:
        page = f"https://huggingface.co/datasets/{TASKS[name].data}"
        rows.append((name, f"{counts[name]:,}", f"{TASKS[name].gigabytes:g}", page))
    lines += [
        "",
        markdown_table(rows, left=1),
        "",
        "lmms-eval fetches a data set when its first run begins; sizes are estimates.",
    ]
    # 3. The runs.
    labels = list(dict.fromkeys(run.label for run in runs))
    rows, total = [("run", *tasks, "GPU hours")], 0.0
    for label in labels:
        own = {run.task: run for run in runs if run.label == label}
        hours = 0.0
        for name, run in own.items():
            cost = preset_cost(FAMILY.model, run.config, TASKS[name].text)
            hours += counts[name] * speed.seconds(cost, TASKS[name].text, TASKS[name].new) / 3600
        total += hours
        states = ("done" if own[name].results() is not None else "to do" for name in tasks)
        rows.append((label, *states, f"{hours:.2f}"))
    lines += ["", markdown_table(rows, left=1), ""]
    lines.append(
        f"{len(labels)} x {len(tasks)} runs, {len(labels) * sum(counts.values()):,} answers: about {total:.1f} GPU hours, "
        f"{total / max(1, gpus):.1f} hours on {max(1, gpus)} GPU{'s' if gpus > 1 else ''}."
    )
    lines.append(
        f"The hours are computed from speeds measured on an {speed.device} at batch {speed.batch} ({speed.source}). They "
        "leave out reading of images, loading, scoring, and what a cache policy saves."
    )
    lines.append("A finished run is never repeated, and an interrupted one continues.")
    if any(not TASKS[name].mean for name in tasks):
        lines.append("CIDEr needs Java: the machine's, or the one that make lmms-eval installs (docs/lmms_eval.md).")
    # 4. The same runs one by one.
    lines += ["", "One data set at a time:", ""]
    lines += [f"    bash scripts/reproduce.sh avl {arguments}--tasks {name}" for name in tasks]
    return "\n".join(lines)


@dataclass
class Score:
    """Score of a finished run in the table's scale. by_document: the scores whose mean it is; empty for CIDEr."""

    value: float
    by_document: dict[str, float] = field(default_factory=dict)


def score_of(run: LmmsRun) -> Score | None:
    """Return the score of a run; None where it is not finished. UserError for results without the metric."""
    results, task = run.results(), TASKS[run.task]
    if results is None:
        return None
    if task.mean:
        # The mean of what was asked: lmms-eval's OCRBench divides by a thousand, however few documents there are.
        each = {number: task.scale * task.of_document(row) for number, row in run.documents().items()}
        return Score(sum(each.values()) / len(each), each)
    value = results.get(f"{task.metric},none")
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{run.folder}: lmms-eval's results of {run.task} have no {task.metric}")
    return Score(task.scale * value)


def table_rows(runs: list[LmmsRun]) -> list[dict]:
    """Return one row per finished run: its score, and the difference to `none`, with 95 % bootstrap intervals.

    Documents are drawn, and both runs of a difference use the same draws. CIDEr has no intervals: it is no mean of
    scores of documents that lmms-eval logs.
    """
    import numpy as np

    from llava.eval.scoring.bootstrap import cluster_intervals

    rows = []
    for task in dict.fromkeys(run.task for run in runs):
        own = {run.label: score for run in runs if run.task == task and (score := score_of(run)) is not None}
        whole = own.get("none")
        for label, score in own.items():
            row = dict.fromkeys(_COLUMNS) | {"task": task, "run": label, "score": score.value}
            if whole:
                row["difference"] = score.value - whole.value
            if score.by_document:
                row["documents"] = len(score.by_document)
                shared = [number for number in score.by_document if whole and number in whole.by_document]
                mine = np.array([[score.by_document[number]] for number in score.by_document])
                _, (row["low"],), (row["high"],) = cluster_intervals(mine, list(score.by_document))
                if shared and label != "none":
                    pairs = np.array([[score.by_document[n] - whole.by_document[n]] for n in shared])
                    _, (row["difference_low"],), (row["difference_high"],) = cluster_intervals(pairs, shared)
            rows.append(row)
    return rows


_COLUMNS = ("task", "run", "score", "low", "high", "difference", "difference_low", "difference_high", "documents")


def as_csv(rows: list[dict]) -> str:
    """Return the rows as CSV. What is unknown is an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()})
    return text.getvalue()


def as_markdown(rows: list[dict], labels: list[str], tasks: list[str], checkpoint: EvalCheckpoint) -> str:
    """Return two tables: one column per task, and the intervals. labels, tasks: in the order of the plan."""
    found = {(row["run"], row["task"]): row["score"] for row in rows}
    head = ("run", *(TASKS[task].title for task in tasks))
    lines = [head]
    for label in labels:
        lines.append((label, *(f"{found[label, task]:.1f}" if (label, task) in found else "" for task in tasks)))
    if checkpoint.short_name == FAMILY.checkpoint.rpartition("/")[2] and not STATED.keys().isdisjoint(tasks):
        lines.append(("none, stated by FastV", *(f"{STATED[task]:.1f}" if task in STATED else "" for task in tasks)))
    text = [markdown_table(lines, left=1), "", "Difference to `none`, 95 % bootstrap over documents:", ""]
    changes = [("run", "task", "score", "difference", "low", "high")]
    for row in rows:
        if row["run"] != "none" and row["difference"] is not None:
            ends = ("" if row[name] is None else f"{row[name]:+.2f}" for name in ("difference_low", "difference_high"))
            changes.append((row["run"], row["task"], f"{row['score']:.2f}", f"{row['difference']:+.2f}", *ends))
    text += [markdown_table(changes, left=2)] if len(changes) > 1 else ["no run beside `none` is finished"]
    text += ["", "The paper's numbers are in no file of this project. CIDEr has no interval."]
    return "\n".join(text)


def arguments_of(argv: list[str]) -> str:
    """Return the user's flags as text for the commands of a plan, without --plan and --tasks."""
    kept, skip = [], False
    for word in argv[1:]:
        if skip or word in ("--plan", "--tasks"):
            skip = word == "--tasks"
        elif not word.startswith("--tasks="):
            kept.append(word)
    return f"{shlex.join(kept)} " if kept else ""
