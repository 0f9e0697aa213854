"""Reproduction of a published table: its runs, what they need, and what they cost. Imports no torch.

Hours come from speeds that were measured on a GPU (llava.costs.measured_speed), at the sizes of the model, whatever
checkpoint runs. Sizes of files are estimates: questions and images of the data sets, times usual sizes.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from llava.common.find_checkpoint import EvalCheckpoint
from llava.common.text_table import markdown_table
from llava.config import AdaVConfig
from llava.eval.benchmarks import BENCHMARKS, Benchmark
from llava.eval.benchmarks.recipes import RECIPES
from llava.eval.results.published import TABLE, published_rows

# Tokens of a prompt beside the image, and of an answer: assumptions for the prediction. MM-Vet's answers are sentences.
TEXT_TOKENS = {"textvqa": 140, "sqa": 110, "mmbench": 120}
NEW_TOKENS = {"mmvet": 100}
USUAL_TEXT, USUAL_NEW = 80, 4


@dataclass(frozen=True)
class Family:
    """A published table. model: its name there, and the preset of its sizes. checkpoint: on the hub. gigabytes: of its
    weights, with the vision tower. tokens: budgets of the table. options: of every run, also of `none`."""

    model: str
    checkpoint: str
    gigabytes: float
    tokens: tuple[int, ...]
    options: dict

    @property
    def methods(self) -> list[str]:
        """The methods of the published table, without `none`."""
        rows = [row for row in published_rows() if row.model == self.model and not row.unpruned]
        return list(dict.fromkeys(row.method.lower() for row in rows))


FAMILIES = {
    "v1_5": Family("llava-v1.5-7b", "liuhaotian/llava-v1.5-7b", 15.3, (144, 58, 29), {}),
    # The published numbers were measured with FasterVLM's tiles.
    "v1_6": Family(
        "llava-v1.6-vicuna-7b", "liuhaotian/llava-v1.6-vicuna-7b", 14.2, (720, 288, 144), {"anyres": "fastervlm"}
    ),
}


@dataclass(frozen=True)
class Size:
    """Size of the files of a benchmark: GB that stay, and GB that --prepare downloads on the way."""

    files: float
    download: float


SIZES = {
    "gqa": Size(0.1, 0.2),
    "sqa": Size(0.3, 0.8),
    "textvqa": Size(1.2, 9.0),
    "pope": Size(0.1, 0.3),
    "mme": Size(0.9, 0.9),
    "mmbench": Size(0.2, 0.4),
    "mmvet": Size(0.1, 0.1),
}


def configurations(
    family: Family, methods: list[str], tokens: list[int], checkpoint: EvalCheckpoint
) -> list[AdaVConfig]:
    """Return the configurations of the table: `none` once, then every method at every budget."""
    # For a checkpoint of one tile, the tile rule has no effect, and would only be a word more in every row.
    options = family.options if not checkpoint.settings or checkpoint.anyres else {}
    found = [AdaVConfig(method="none", options=dict(options))]
    for method in methods:
        for budget in tokens if method not in ("none", "no_image") else []:
            found.append(AdaVConfig(method=method, overall_tokens=budget, options=dict(options)))
    return found


def questions_of(name: str, benchmark: Benchmark, subset: int | None) -> int:
    """Return how many questions a benchmark asks, or how many its data set has if its files are not here."""
    count = len(benchmark.read()) if benchmark.question_file.is_file() else RECIPES[name].parts[benchmark.split][1]
    return min(count, subset or count)


def hours(speed, family: Family, config: AdaVConfig, counts: dict[str, int]) -> float:
    """Return the predicted GPU hours of one configuration over some benchmarks. speed: a MeasuredSpeed."""
    from llava.costs.measured_speed import preset_cost

    total = 0.0
    for name, count in counts.items():
        text, new = TEXT_TOKENS.get(name, USUAL_TEXT), NEW_TOKENS.get(name, USUAL_NEW)
        total += count * speed.seconds(preset_cost(family.model, config, text), text, new)
    return total / 3600


@dataclass(frozen=True)
class Needed:
    """A benchmark of the table on this machine. missing: files that are not here. fetchable: whether --prepare makes them."""

    name: str
    benchmark: Benchmark
    questions: int
    missing: list[Path]

    @property
    def fetchable(self) -> bool:
        return self.name in RECIPES and self.benchmark.split in RECIPES[self.name].parts

    @property
    def state(self) -> str:
        if not self.missing:
            return "there"
        return "missing, --prepare fetches them" if self.fetchable else "missing, by hand"


def needs(data_root: Path, checkpoint: EvalCheckpoint | None, subset: int | None) -> list[Needed]:
    """Return what the benchmarks of the table need, in the order of the table."""
    found = []
    for name in TABLE:
        benchmark = BENCHMARKS[name](data_root, checkpoint)
        # MMBench's table has the images in it, and a run unpacks them.
        unpacked = [benchmark.image_folder] if type(benchmark).make_data is not Benchmark.make_data else []
        missing = [path for path in benchmark.needed_files() if path not in unpacked and not path.exists()]
        found.append(Needed(name, benchmark, questions_of(name, benchmark, subset), missing))
    return found


def describe(
    family_name: str,
    checkpoint: EvalCheckpoint,
    needed: list[Needed],
    configs: list[AdaVConfig],
    speed,
    gpus: int,
    flags: list[str],
) -> str:
    """Return the plan: weights, benchmarks, runs with hours, disk, and the command of each run.

    speed: a MeasuredSpeed. gpus: GPUs at hand. flags: of this command, that each run's command takes over.
    """
    family = FAMILIES[family_name]
    lines = [f"# Plan: {family.model}", ""]
    # 1. The weights.
    if checkpoint.folder:
        lines.append(f"Weights: {checkpoint.name}, in {checkpoint.folder}.")
    else:
        page = f"https://huggingface.co/{checkpoint.name}"
        lines.append(
            f"Weights: {checkpoint.name}, not here. About {family.gigabytes:g} GB from {page}; the run fetches them."
        )
    # 2. The benchmarks.
    root = needed[0].benchmark.data_root
    rows = [("benchmark", "files", "questions", "GB", "GB to download")]
    for each in needed:
        size = SIZES[each.name]
        fetched = f"{size.download:.1f}" if each.missing else "0.0"
        rows.append((each.name, each.state, f"{each.questions:,}", f"{size.files:.1f}", fetched))
    lines += ["", markdown_table(rows, left=2), ""]
    lacking = [each for each in needed if each.missing]
    lines += [f"Missing below {root}:"] if lacking else []
    for each in lacking:
        files = ", ".join(str(path.relative_to(root)) for path in each.missing)
        lines.append(f"- {each.name}: {files} ({each.benchmark.download_page})")
    # 3. The runs.
    counts = {each.name: each.questions for each in needed}
    per_run = [hours(speed, family, config, counts) for config in configs]
    rows = [("method", "tokens", "GPU hours")]
    for config, time in zip(configs, per_run, strict=True):
        rows.append((config.method, "all" if config.method == "none" else str(config.overall_tokens), f"{time:.2f}"))
    lines += ["", markdown_table(rows, left=1), ""]
    total = sum(per_run)
    lines.append(
        f"{len(configs)} x {len(needed)} runs, {len(configs) * sum(counts.values()):,} answers: about {total:.1f} GPU hours, "
        f"{total / max(1, gpus):.1f} hours on {max(1, gpus)} GPU{'s' if gpus > 1 else ''}."
    )
    lines.append(
        f"The hours are computed from speeds measured on an {speed.device} at batch {speed.batch} ({speed.source}). They "
        "leave out reading of images, loading and scoring. Sizes are estimates."
    )
    missing = [each for each in needed if each.missing]
    disk = (0 if checkpoint.folder else family.gigabytes) + sum(SIZES[each.name].files for each in missing)
    download = (0 if checkpoint.folder else family.gigabytes) + sum(SIZES[each.name].download for each in missing)
    answers = len(configs) * sum(counts.values()) * 1500 / 1e9  # a row of a shard and of merge.jsonl together
    lines.append(f"Disk: about {disk + answers:.1f} GB more; to download: up to {download:.1f} GB.")
    lines.append(
        "MM-Vet gets a score only with a judge (JUDGE_URL, docs/evaluation.md); else the average is over 6 columns."
    )
    # 4. The commands. Each can also run on another machine.
    lines += ["", "The same runs one by one:", ""]
    for config in configs:
        budget = [] if config.method == "none" else [str(config.overall_tokens)]
        options = ["--options", json.dumps(config.options)] if config.options else []
        command = ["bash", "scripts/launch.sh", "all", *budget, "--family", family_name, "--method", config.method]
        lines.append(f"    {shlex.join([*command, *options, *flags])}")
    return "\n".join(lines)
