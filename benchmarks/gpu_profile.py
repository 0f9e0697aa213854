"""Where the time of a request goes on a GPU: stages of the first token, kernels of a decode step, SDPA's backends.

    python benchmarks/gpu_profile.py [--preset llava-v1.6-vicuna-7b] [--out FOLDER]    # about 90 seconds on an H100

The command writes three files and prints them:

    stages.csv    Per batch and configuration, milliseconds by the clock of prepare() and its stages, of prefill, and of
                  a decode step of the engine. device_step_ms is the time of a captured step that is replayed without
                  pause, so the difference to step_ms is the host's time. weights_gb_per_s is the LLM's weights divided
                  by device_step_ms, or by step_ms if nothing was captured.
    kernels.csv   At the first batch, microseconds and calls of the kernels of one first token and one decode step, by
                  torch.profiler, longest first. The row "all" is their sum. On a CPU: operations, not kernels.
    sdpa.csv      On a GPU, milliseconds of scaled_dot_product_attention by backend, in the shapes of vision tower,
                  prefill and decoding: of the first call at a shape, for which cuDNN builds a plan, and of later calls.

The model has random weights. An engine answers three times before it is timed: without graphs, capturing, replaying.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from memory import attempt, decode_weight_bytes, free_memory
from record import RESULTS, how, pick, write_csv
from shapes import PRESETS, Prompts, random_model
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from llava.common.errors import UserError, exits_cleanly
from llava.common.text_table import columns
from llava.config import AdaVConfig
from llava.model.decoding.engine import CapturedSteps, Engine
from llava.model.decoding.prepared import PreparedPrompt
from llava.model.decoding.sampling import Sampling

_AVL = "vision_adaptive_attention"
CONFIGS = {
    "none": AdaVConfig(method="none"),
    "adav 144": AdaVConfig(method="adav", overall_tokens=144),
    "A-VL, interval 16": AdaVConfig(
        method="none", **{_AVL: True, f"{_AVL}_compute_rate": 0.89, f"{_AVL}_update_interval": 16}
    ),
}
STAGES = ("vision_tower", "projector", "selection", "splice")
# Answers stop after STEPS. The cache then still has slots for the replays, which write entries, too.
NEW_TOKENS, STEPS, REPLAYS = 64, 40, 10
TOP, SHOWN = 30, 8  # kernels that are written and printed, for each first token and each step
# Shapes of LLaVA-1.6-7B: heads, head size, queries (None: as many as keys), keys, causal, rows.
SDPA_SHAPES = {
    "tower": (16, 64, None, (577,), False, 5),
    "prefill": (32, 128, None, (2944, 3008, 3072), True, 1),
    "decode": (32, 128, 1, (3009, 3010, 3011, 3012), False, 1),
}
BACKENDS = {"default": None, "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


@dataclass
class Profiler:
    """Profiles one model on one device."""

    model: torch.nn.Module
    device: str

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def record(self):
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.cuda
        return profile(activities=activities)

    def one(self, prompts: Prompts, name: str, with_kernels: bool) -> tuple[dict, list[dict]]:
        """(row of stages.csv, rows of kernels.csv) of one configuration."""
        engine = Engine(self.model)
        engine.ends = set()  # no end token: every answer has the same number of steps

        def ask() -> PreparedPrompt:
            return self.model.prepare(prompts.ids, prompts.pixels, prompts.sizes, config=CONFIGS[name])

        for _ in range(3):
            engine.generate(ask(), Sampling(NEW_TOKENS))
        stages = self._stages(engine, ask)
        alone = self._alone(engine)
        seconds = (alone or stages["step_ms"]) / 1e3
        rate = decode_weight_bytes(self.model) / seconds / 1e9
        row = {"batch": len(prompts.ids), "config": name, **stages}
        row |= {"device_step_ms": round(alone, 3) if alone else "", "weights_gb_per_s": round(rate, 1)}
        captured = engine.captured_sets()
        row["captured_mb"] = round(sum(steps.nbytes for steps in captured) / 1e6, 1)
        return row, self._kernels(engine, ask, name) if with_kernels else []

    def _stages(self, engine: Engine, ask: Callable[[], PreparedPrompt]) -> dict:
        """Milliseconds of prepare() and its stages, of prefill and of a step: medians of five requests."""
        rows = []
        for _ in range(5):
            begin = self.now()
            prepared = ask()
            ready = self.now()
            generation = engine.stream(prepared, Sampling(NEW_TOKENS))
            next(generation)
            first, steps = self.now(), []
            for _ in range(STEPS):
                at = time.perf_counter()
                next(generation)  # returns the step's tokens, so it waits for the device
                steps.append(time.perf_counter() - at)
            row = {"prepare": ready - begin, "prefill": first - ready, "step": statistics.median(steps)}
            rows.append(row | {stage: prepared.seconds.get(stage, 0.0) for stage in STAGES})
        return {f"{key}_ms": round(1e3 * statistics.median(row[key] for row in rows), 3) for key in rows[0]}

    def _alone(self, engine: Engine) -> float | None:
        """Milliseconds of an ordinary step on the device; None if no step was captured."""
        # graphs[False] is the step that does not rank a core anew.
        graph = next((kept.graphs[False] for kept in _last(engine) if False in kept.graphs), None)
        if graph is None:
            return None
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / REPLAYS

    def _kernels(self, engine: Engine, ask: Callable[[], PreparedPrompt], name: str) -> list[dict]:
        with self.record() as prefill:
            generation = engine.stream(ask(), Sampling(NEW_TOKENS))
            next(generation)
            self.now()
        for _ in range(3):
            next(generation)
        with self.record() as steps:
            for _ in range(5):
                next(generation)
            self.now()
        return self._top(prefill, f"{name}: first token", 1) + self._top(steps, f"{name}: step", 5)

    def _top(self, recorded, label: str, times: int) -> list[dict]:
        rows = []
        for event in recorded.key_averages():
            if self.cuda and event.device_type != DeviceType.CUDA:
                continue  # an operation's device time is that of its kernels, and would count twice
            spent = event.self_device_time_total if self.cuda else event.self_cpu_time_total
            if spent > 0:
                rows.append({"of": label, "us": spent / times, "calls": event.count / times, "kernel": event.key[:110]})
        rows.sort(key=lambda row: -row["us"])
        total = {"of": label, "us": sum(row["us"] for row in rows), "calls": sum(row["calls"] for row in rows)}
        rows = [total | {"kernel": "all"}, *rows[:TOP]]
        return [row | {"us": round(row["us"], 2), "calls": round(row["calls"], 1)} for row in rows]


def _last(engine: Engine) -> list[CapturedSteps]:
    """Captured steps of the last request, as a list of one; [] if there are none."""
    return engine.captured_sets()[-1:]


def sdpa_rows(now: Callable[[], float]) -> list[dict]:
    """One row per shape and backend. The figures are empty if the backend does not support the shape."""
    rows = []
    for what, (heads, width, queries, lengths, causal, batch) in SDPA_SHAPES.items():
        for name, backend in BACKENDS.items():
            for length in lengths:
                k, v = (torch.randn(batch, heads, length, width, device="cuda").bfloat16() for _ in "kv")
                q = k if queries is None else k[:, :, :queries].contiguous()
                row = {"what": what, "length": length, "sdpa": name, "new_shape_ms": "", "ms": ""}
                try:
                    start = now()
                    _attend(q, k, v, causal, backend)
                    row["new_shape_ms"] = round(1e3 * (now() - start), 3)
                    start = now()
                    for _ in range(20):
                        _attend(q, k, v, causal, backend)
                    row["ms"] = round(50 * (now() - start), 4)
                except RuntimeError as error:  # torch raises it if a backend does not support these operands
                    print(f"{what}, {name}: {str(error).splitlines()[0]}", file=sys.stderr)
                rows.append(row)
    return rows


def _attend(q, k, v, causal: bool, backend: SDPBackend | None):
    with nullcontext() if backend is None else sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, is_causal=causal)


def show(rows: list[dict]) -> str:
    if not rows:
        return ""
    return columns([tuple(rows[0]), *(tuple(str(value) for value in row.values()) for row in rows)])


@exits_cleanly
@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/gpu_profile.py", description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="llava-v1.6-vicuna-7b")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="kernels are those of the first (1 8)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU where there is one")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: bfloat16 on a GPU")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the three files; default: runs/benchmarks")
    args = parser.parse_args(argv)
    args.given, args.repeats = sys.argv[1:] if argv is None else argv, 5
    args.device, args.dtype = pick(args.device, args.dtype)
    if min(args.batches) < 1:
        raise UserError(f"--batches is {min(args.batches)}, allowed is at least 1")
    made = how(args, "gpu_profile.py", args.device)
    preset = PRESETS[args.preset]
    model = random_model(preset.model_config(newline=True), args.device, getattr(torch, args.dtype), seed=0)
    profiler, stages, kernels, failures = Profiler(model, args.device), [], [], []
    # 2. Stages and kernels.
    for batch in args.batches:
        prompts = Prompts.random(preset, model.config, model.lm_head.weight, batch, seed=0)
        for name in CONFIGS:
            found, failure = attempt(lambda p=prompts, n=name: profiler.one(p, n, len(p.ids) == args.batches[0]))
            free_memory(args.device)
            if failure:
                failures.append(f"batch {batch}, {name}: {failure}")
                continue
            row, top = found
            stages.append(row)
            kernels += top
            # After each configuration, so that an interrupted run keeps what it measured.
            write_csv(args.out / "stages.csv", stages, made)
            if kernels:
                write_csv(args.out / "kernels.csv", kernels, made)
    if stages:
        labels = list(dict.fromkeys(row["of"] for row in kernels))
        longest = [row for label in labels for row in [row for row in kernels if row["of"] == label][: SHOWN + 1]]
        print(f"{show(stages)}\n\n{show(longest)}")
    # 3. SDPA's backends.
    if args.device == "cuda":
        rows = sdpa_rows(profiler.now)
        write_csv(args.out / "sdpa.csv", rows, made)
        print(f"\n{show(rows)}")
        print(f"\npeak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
