"""Text about runs: what the launcher would do (--plan), and the result of a finished run. Imports no torch."""

from __future__ import annotations

import shlex

from llava.common.scatter import BATCH_LIMIT, REASON, scatters
from llava.eval.runs.division import divide
from llava.eval.runs.run import Run
from llava.eval.runs.shard_count import shard_threads, shards_to_start
from llava.eval.runs.worker_processes import device_of, worker_command, worker_settings


def describe_plan(runs: list[Run], shards: int | None, devices: list[str], threads: int | None = None) -> str:
    """Return a text with the runs and the exact command of each shard, from the answers that are on disk now.

    shards, threads: as the user asked; None leaves the choice to llava.eval.runs.shard_count.
    No run is opened: nothing is locked or written.
    """
    lines = []
    # 1. The runs.
    for run in runs:
        benchmark, generation = run.benchmark, run.generation
        run.refresh()
        # tokens is "all" or "0" for the methods without a budget.
        budget = f", {run.tokens} tokens" if run.tokens.isdigit() else ""
        lines.append(
            f"{benchmark.name} ({benchmark.split}), {run.checkpoint.name}, method {run.config.method}{budget}:"
        )
        part = f" ({benchmark.partial})" if benchmark.partial else ""
        images = len({name for sample in run.samples for name in sample.images})
        lines.append(f"  {len(run.samples):,} questions{part} of {benchmark.question_file}")
        lines.append(f"  {images:,} images in {benchmark.image_folder}")
        conversation = generation.conversation or "the checkpoint's own"
        lines.append(
            f"  conversation template: {conversation}; at most {generation.max_new_tokens} new tokens; dtype {generation.dtype}"
        )
        if run.engine.version:
            lines.append(f"  engine: {run.engine.name} {run.engine.version}, which loads {run.exported.folder}")
        lines.append(f"  {len(run.answered):,} answered already, {len(run.todo()):,} to do")
        fetched = "" if run.checkpoint.folder else " (DIGEST is known once the checkpoint is fetched)"
        lines.append(f"  {run.folder}{fetched}")
    # 2. The shards. The division must be the one of evaluate_runs, or the printed commands are not those that run.
    missing, python = [run.todo() for run in runs], runs[0].engine.python
    shards, threads = shards_to_start(runs, missing, shards, devices), shard_threads(runs, threads, devices)
    pieces = [divide(samples, shards) for samples in missing]
    for shard in range(shards):
        orders = [run.order_of(shard) for run, parts in zip(runs, pieces, strict=True) if parts[shard]]
        if orders:
            samples = [sample for parts in pieces for sample in parts[shard]]
            images = len({name for sample in samples for name in sample.images})
            settings = worker_settings(device_of(shard, devices), shards, threads)
            command = shlex.join(
                [f"{name}={value}" for name, value in settings.items()] + worker_command(orders, python)
            )
            lines.append(f"shard {shard}: {len(samples):,} questions about {images:,} images\n  {command}")
    return "\n".join(lines)


def describe_run(run: Run, report: dict) -> str:
    """Return a few lines about a finished run: score, vision tokens, KV cache, FLOPs and time."""
    # The last session is this start of the command. Earlier sessions may have answered a part of the questions.
    session, tokens = report["sessions"][-1], report["vision_tokens_per_image"]
    lines = [f"{run.benchmark.name} ({run.benchmark.split}), {run.checkpoint.short_name}, method {run.config.method}:"]
    number = "{:.2f}".format if run.benchmark.points else (lambda share: f"{100 * share:.1f} %")
    for name, value in report["score"].items():
        parts = value.items() if isinstance(value, dict) else [(None, value)]
        shown = ", ".join((f"{k} " if k else "") + (number(v) if isinstance(v, float) else str(v)) for k, v in parts)
        lines.append(f"  {name.replace('_', ' ')}: {shown}")
    if tokens["images"]:
        # The layer mean differs from the number of selected tokens only for a method that drops tokens in the LLM.
        layers = f", {tokens['layer_mean']:.1f} over layers" if tokens["layer_mean"] != tokens["after"] else ""
        lines.append(
            f"  vision tokens per image: {tokens['before']:.1f} -> {tokens['after']:.1f}{layers} (mean of {tokens['images']})"
        )
    if "kv_bytes_live" in report:  # vLLM's cache is one pool for all requests
        lines.append(
            f"  KV cache per sample: {report['kv_bytes_live']['mean']:,.0f} bytes live, {report['kv_bytes_allocated']['mean']:,.0f} allocated"
        )
    flops = report["prefill_flops_predicted"]["mean"]
    if flops is not None:
        lines.append(f"  predicted prefill per question: {flops / 1e9:,.3f} GFLOPs")
    if "vllm" in report:
        measured = report["vllm"]
        lines.append(
            f"  vLLM: {measured['seconds_to_first_token']['mean']:.3f} s to the first token, "
            f"{measured['seconds_queued']['mean']:.3f} s of them in the queue; {measured['cached_prompt_tokens']['share']:.0%} of the "
            "prompt tokens came from its prefix cache"
        )
    reused = f", {session['reused']} from before" if session["reused"] else ""
    lines.append(f"  {session['answered']} questions answered in {session['wall_seconds']:.1f} s{reused}")
    if scatters(report["prefill_spread"], BATCH_LIMIT):
        lines.append(f"  note: the time per question scatters: {REASON}")
    lines.append(f"  {run.folder}")
    return "\n".join(lines)
