"""The first look: what pruning costs on the two demo checkpoints, as one table and two pictures.

    python -m llava.eval.demo          (make demo)

Runs the shapes benchmark on the first questions of its test split, with the code of the launcher. All questions are
answered again each time, so the times are those of this machine now. Pictures and table also go to playground/demo/.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from llava.common.command_line import Parser, add_threads_flag, positive
from llava.common.errors import exits_cleanly
from llava.common.files import BASE, as_user_error_on_write, write_atomically
from llava.common.find_checkpoint import find_checkpoint
from llava.common.progress import progress_bar
from llava.common.scatter import BATCH_LIMIT, REASON, scatters
from llava.common.text_table import markdown_table
from llava.config import AdaVConfig
from llava.eval.benchmarks import BENCHMARKS
from llava.eval.benchmarks.questions import Sample
from llava.eval.runs.evaluate import evaluate_runs
from llava.eval.runs.run import DATA_ROOT, OUTPUT, Run
from llava.eval.runs.work_order import Generation
from llava.eval.runs.worker_processes import Interrupted, ShardFailure, device_groups
from llava.shapes.checkpoints import SCENES, Scene

FOLDER = BASE / "playground" / "demo"
CAVEAT = """\
How to read it: the demo favours text-guided selection (adav). The demo checkpoints were trained with a loss on the
similarity between patches and words, which text-guided selection reads. No real LLaVA was trained with such a loss. The
table shows that the pipeline works, and what pruning costs on this task. It does not show which method is better on real
data. The demo models know about seventy words, all about drawn shapes. They cannot answer questions about photographs."""


def make_runs(scene: Scene, output: Path, limit: int | None = None, device: str = "cpu") -> dict[str, Run]:
    """Return label -> run for one checkpoint. No run is started.

    limit: number of questions, at most those of the scene. output: folder above the run folders.
    """
    checkpoint = find_checkpoint(scene.checkpoint)
    benchmark = BENCHMARKS["shapes"](DATA_ROOT, checkpoint)
    generation = Generation(benchmark.max_new_tokens, device=device)
    limit = min(limit or scene.questions, scene.questions)
    return {
        label: Run(
            benchmark, AdaVConfig(overall_tokens=scene.tokens, **changes), checkpoint, generation, output, limit=limit
        )
        for label, changes in scene.settings.items()
    }


def table(reports: list[tuple[str, str, dict]]) -> str:
    """Return the table in Markdown. reports: (checkpoint, label, report of its run), one per line."""
    head = ("checkpoint", "method", "accuracy", "n", "tokens kept", "ms/question", "KV cache")
    lines = [head]
    for checkpoint, label, report in reports:
        tokens, score = report["vision_tokens_per_image"], report["score"]
        # Seconds of the stages, summed over shards: time of one question on one shard, without loading.
        milliseconds = 1000 * sum(report["seconds_per_stage"].values()) / report["answered"]
        lines.append(
            (
                checkpoint,
                label,
                f"{100 * score['accuracy']:.1f} %",
                str(score["questions"]),
                f"{tokens['after']:.1f} of {tokens['before']:.1f}",
                f"{milliseconds:.1f}" + (" (scatters)" if scatters(report["prefill_spread"], BATCH_LIMIT) else ""),
                f"{report['kv_bytes_live']['mean'] / 1000:,.0f} kB",
            )
        )
    return markdown_table(lines)


def draw(runs: dict[str, Run]) -> Path:
    """Draw which tokens of one image each method kept, side by side; return the path of the picture.

    runs: the finished runs of one checkpoint. The question is the first that the model with all tokens gets right.
    """
    # Imported here: they import torch, and the measurements run in worker processes.
    from llava.eval.runs.image_reader import read_image
    from llava.inference.loaded_checkpoint import LoadedCheckpoint
    from llava.mm_utils import tile_plan
    from llava.overlay.page import draw_overlay

    # 1. The question.
    first = next(iter(runs.values()))
    answers = {label: _answers(run) for label, run in runs.items()}
    sample = _first_right(first.samples, answers["none"], first)
    # 2. What each method keeps of its image.
    generation = first.generation
    loaded = LoadedCheckpoint(
        str(first.checkpoint.folder), config=first.config, device=generation.device, dtype=generation.dtype
    )
    image = read_image(first.benchmark.image_folder / sample.image)
    # The picture has one division into tiles, so runs with another one cannot be drawn in it.
    official = {label: run for label, run in runs.items() if run.config.option("anyres") == "official"}
    selections = {
        label: loaded.prepare([sample.prompt], [image], run.config).selections[0][0] for label, run in official.items()
    }
    # 3. The picture.
    picture = draw_overlay(
        image,
        tile_plan(image.size, loaded.model.config),
        loaded.model.get_vision_tower().num_patches_per_side,
        selections,
        {label: answers[label][sample.key] for label in official},
        title=sample.text.splitlines()[0],
    )
    path = FOLDER / f"{first.checkpoint.short_name}.png"
    with as_user_error_on_write(path):
        FOLDER.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    return path


def _answers(run: Run) -> dict[tuple, str]:
    """Return key -> answer of a finished run."""
    rows = [json.loads(line) for line in (run.folder / "merge.jsonl").read_text().splitlines()]
    return {sample.key: row["text"] for sample, row in zip(run.samples, rows, strict=True)}


def _first_right(samples: list[Sample], answers: dict[tuple, str], run: Run) -> Sample:
    """Return the first sample with a right answer, or the first of all if there is none."""
    labels = run.benchmark.labels()
    right = (s for s in samples if answers[s.key].strip().lower() == labels[s.question_id]["answer"].lower())
    return next(right, samples[0])


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m llava.eval.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--limit", type=positive, help="fewer questions per checkpoint, for a quick try")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where run folders go (default: runs/)")
    parser.add_argument("--shards", type=positive, help="processes (default: as llava.eval.launch)")
    add_threads_flag(parser)
    args = parser.parse_args(argv)
    begun = time.monotonic()
    devices = device_groups()
    # 1. Measure both checkpoints.
    measured, everything = [], []
    for scene in SCENES:
        runs = make_runs(scene, args.output, args.limit, "cuda" if devices else "cpu")
        try:
            reports = evaluate_runs(
                list(runs.values()),
                args.shards,
                devices,
                scene.batch,
                fresh=True,
                title=Path(scene.checkpoint).name,
                threads=args.threads,
            )
        except (ShardFailure, Interrupted) as error:
            stopped = isinstance(error, Interrupted)
            print(f"{'stopped by' if stopped else 'error:'} {error}", file=sys.stderr)
            sys.exit(128 + error.number if stopped else 1)
        name = Path(scene.checkpoint).name
        measured += [(name, label, report) for label, report in zip(runs, reports, strict=True)]
        everything.append(runs)
    # 2. Draw and print.
    pictures = [draw(runs) for runs in progress_bar("pictures", everything, unit=" pictures")]
    text = table(measured)
    write_atomically(FOLDER / "table.md", text + "\n")
    print(f"\n{text}\n\n{CAVEAT}\n")
    session = measured[-1][2]["sessions"][-1]
    print(
        "tokens kept and KV cache are means per image and per question; times are of "
        f"{session['shards']} processes side by side, {session['threads']} threads each"
    )
    if "(scatters)" in text:
        print(f"a time that scatters: {REASON}")
    for path in pictures:
        print(f"picture: {path}")
    print(f"{time.monotonic() - begun:.0f} s in all")


if __name__ == "__main__":
    main()
