"""Time to the first token of every method, on a model with random weights.

    python benchmarks/prefill.py [--preset cpu] [--methods adav fastv] [--shares 0.05 0.25] [--crops 1 2] [--output FILE.csv]

Prefill here is everything from pixels on the device to the first token on the host: vision tower, projector, selection,
and one pass of the LLM over the remaining tokens. The engine runs it, as in evaluation and serving: on a GPU with fused
kernels and CUDA graphs, on a CPU without graphs. A selector costs time before the LLM (selector_ms) and saves time in
the LLM (llm_ms). A dropper does both within llm_ms. prefill_ms is measured by the clock. On a GPU it can exceed the sum
of the stages, because a stage is timed on the device, and the device may wait for the host between stages. With random
weights, the choice of tokens means nothing, but its cost is the same as with trained weights.

All methods run one after another in every repetition, so that a machine that slows down slows all of them. After each
pass, logits must be finite, and each layer's cache must have the predicted number of entries. Otherwise the method gets
no time and is named, and the exit code is 1. Times are medians. On a CPU, they include the first repetition, which
warms up. On a GPU, three extra repetitions warm up: kernels are compiled in the first, graphs are captured up to the
end of the second, and the third allocates the memory that captures released. FLOPs are predicted (llava.costs.flops).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from memory import attempt, free_memory
from record import RESULTS, how, pick, write_csv
from shapes import PRESETS, Preset, Prompts, random_model
from torch import Tensor

from llava.common.errors import UserError, exits_cleanly
from llava.common.progress import progress_bar
from llava.common.text_table import columns
from llava.config import AdaVConfig
from llava.costs.flops import Cost, predict
from llava.methods.before_llm import SELECTORS
from llava.methods.inside_llm import DROPPERS
from llava.model.decoding.adaptive_cache import AdaptiveCache
from llava.model.decoding.engine import Engine
from llava.model.decoding.prepared import PreparedPrompt, StageClock

# Untimed repetitions where graphs are captured. A shape is captured when it comes for the second time, and each capture
# first gives the free memory of torch's allocator back to the device. The third repetition allocates it again.
WARM_UPS = 3


@dataclass
class Entry:
    """One line of the table: a method at a budget, its predicted cost, and the times of each pass (see Pass)."""

    config: AdaVConfig
    cost: Cost
    times: list[dict[str, float]]

    @property
    def name(self) -> str:
        return f"{self.method} at {self.config.overall_tokens}"

    @property
    def method(self) -> str:
        """The method with its options, such as adav_zoom crops=2."""
        return " ".join([self.config.method, *(f"{name}={value}" for name, value in self.config.options.items())])

    def median(self, *stages: str) -> float:
        """Median in milliseconds of the sum of some stages. A stage that did not run counts 0."""
        return statistics.median(sum(one.get(stage, 0.0) for stage in stages) for one in self.times)

    def row(self, plain: Entry) -> dict:
        """Columns of this entry. plain: the entry of method none."""
        everything, of = [one["prefill"] for one in self.times], plain.median("prefill")
        # A dropper works within the LLM's pass, so its own time cannot be measured separately.
        selector = None if self.config.method in DROPPERS else self.median("selection")
        return {
            "method": self.method,
            "overall_tokens": self.config.overall_tokens if self is not plain else "all",
            "layer_mean_tokens": round(self.cost.layer_mean, 1),
            "prefill_ms": round(self.median("prefill"), 2),
            "prefill_ms_min": round(min(everything), 2),
            "prefill_ms_max": round(max(everything), 2),
            "prefill_of_none": round(self.median("prefill") / of, 4),
            "vision_ms": round(self.median("vision_tower", "projector"), 2),
            "selector_ms": "" if selector is None else round(selector, 2),
            "selector_of_none": "" if selector is None else round(selector / of, 4),
            "llm_ms": round(self.median("llm"), 2),
            "predicted_gflops": round(self.cost.total / 1e9, 3),
            "gflops_of_none": round(self.cost.total / plain.cost.total, 4),
        }


@dataclass
class Pass:
    """One prefill.

    times: milliseconds of each stage, and of the whole pass as "prefill"
    logits [1, V]: of the first token, valid until the next pass
    seen [L]: tokens that each layer's attention saw
    cached [L]: entries of each layer's KV cache that a decode step would read
    """

    times: dict[str, float]
    logits: Tensor
    seen: tuple[int, ...]
    cached: tuple[int, ...]

    @classmethod
    def of(cls, times: dict[str, float], logits: Tensor, prepared: PreparedPrompt, cache: AdaptiveCache) -> Pass:
        dropping, tensors = prepared.dropping, cache.tensors
        if dropping is None:
            seen = prepared.lengths * len(cache.layers)
        else:
            seen = [dropping.stages[stage].lengths[0] for stage in dropping.stage_of]
        # Not the shape of the keys: the engine rounds capacities up.
        cached = tensors.front_len + tensors.image_len + tensors.text_len[..., 0]
        return cls(times, logits, tuple(seen), tuple(cached[:, 0].tolist()))


class Bench:
    """A model with random weights and its engine, and one prompt with one image of noise."""

    def __init__(self, preset: Preset, device: str, dtype: torch.dtype, seed: int):
        # Neither newline tokens nor unpadding: five whole tiles.
        self.model = random_model(preset.model_config(), device, dtype, seed)
        self.prompts = Prompts.random(preset, self.model.config, self.model.lm_head.weight, batch=1, seed=seed)
        self.device = torch.device(device)
        # One engine for all entries, as a server has one for requests of any method. A model's vision tower keeps its
        # graphs with the engine that was made last, so engines of other entries would not own theirs. In one engine,
        # methods share the graphs of the tower and of prompts that are padded to one length. The graphs' memory has no
        # limit: entries take turns, so the graph that was used longest ago, which a limit frees, is the next one.
        self.engine = Engine(self.model, graph_bytes=sys.maxsize)

    def cost(self, config: AdaVConfig) -> Cost:
        prompts = self.prompts
        return predict(prompts.shape, config, [prompts.image], sum(prompts.text), [prompts.text[1]])

    @torch.inference_mode()
    def prefill(self, config: AdaVConfig) -> Pass:
        """Run one prefill and check nothing."""
        # The parts of a generation, not Engine.stream(): where memory runs out, that frees the graphs of all entries
        # and tries again, which would count in this entry's time and slow the others.
        clock, prompts = StageClock(self.device), self.prompts
        start = self._now()
        prepared = self.model.prepare(prompts.ids, prompts.pixels, prompts.sizes, config=config)
        with clock.stage("llm"):
            cache = self.engine.cache_for(prepared, steps=0)
            logits = self.engine.prefill(prepared, cache)
            logits.argmax(dim=-1).tolist()  # the first token, on the host
        seconds = {"prefill": self._now() - start, **prepared.seconds, **clock.seconds}
        return Pass.of({stage: 1000 * s for stage, s in seconds.items()}, logits, prepared, cache)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def repeat(self, entry: Entry) -> str:
        """Time one entry once more. Returns what is wrong with its output, or "". Wrong output gets no time."""
        found, expected = self.prefill(entry.config), entry.cost.cached
        if not torch.isfinite(found.logits).all():
            return "its logits are not finite"
        if found.cached != expected:
            return f"its layers cache {found.cached} entries, expected are {expected}"
        # No entry is evicted here. Storage is allocated by the schedule, so what a dropper has kept is compared, too.
        if found.seen != expected:
            return f"its layers see {found.seen} tokens, expected are {expected}"
        entry.times.append(found.times)
        return ""


def configurations(methods: list[str], budgets: list[int], crops: list[int]) -> list[AdaVConfig]:
    """All configurations, `none` first. A method that zooms has one for each number of crops."""
    found = [AdaVConfig(method="none")]
    for method in methods:
        if method != "none":
            options = [{"crops": n} for n in crops] if AdaVConfig(method=method).make_method().zooms else [{}]
            found += [AdaVConfig(method=method, overall_tokens=k, options=o) for k in budgets for o in options]
    return found


def run(
    bench: Bench,
    methods: list[str],
    shares: list[float],
    repeats: int,
    save: Callable[[list[dict]], None],
    crops: list[int],
) -> list[str]:
    """Measure all methods at all budgets, and return what was wrong. A wrong method has no row.

    shares: budgets as shares of the vision tokens. crops: numbers of crops of methods that zoom. save: called after
    every repetition with all rows, `none` first.
    """
    budgets = [max(1, int(share * bench.prompts.image.tokens + 1e-6)) for share in shares]
    entries = [Entry(config, bench.cost(config), []) for config in configurations(methods, budgets, crops)]
    plain, complaints = entries[0], []
    # Compiling kernels and capturing graphs belongs to no method.
    rounds = [False] * (WARM_UPS if bench.engine.graphs else 0) + [True] * repeats
    with progress_bar("measuring", total=len(rounds) * len(entries), unit=" prefills") as shown:
        for timed in rounds:
            for entry in list(entries):
                wrong, failure = attempt(lambda e=entry: bench.repeat(e))
                if wrong or failure:
                    complaints.append(f"{entry.name}: {wrong or failure}, so no time is given")
                    entries = [other for other in entries if other is not entry]  # equal ones stay
                    free_memory(bench.device.type)
                shown.update()
            if not timed:
                for entry in entries:
                    entry.times.clear()
            elif plain in entries:  # all rows are relative to it
                save([entry.row(plain) for entry in entries])
    return complaints


def show(rows: list[dict]) -> str:
    """Table for the screen. A dropper has no time of its own, so its cell says "in LLM"."""
    head = (
        "method",
        "tokens",
        "layer mean",
        "prefill ms",
        "of none",
        "selector ms",
        "of none",
        "LLM ms",
        "GFLOPs",
        "of none",
    )
    lines = [head]
    for row in rows:
        selector = row["selector_ms"] != ""
        lines.append(
            (
                row["method"],
                str(row["overall_tokens"]),
                f"{row['layer_mean_tokens']:,.1f}",
                f"{row['prefill_ms']:,.1f}",
                f"{row['prefill_of_none']:.1%}",
                f"{row['selector_ms']:,.1f}" if selector else "in LLM",
                f"{row['selector_of_none']:.1%}" if selector else "",
                f"{row['llm_ms']:,.1f}",
                f"{row['predicted_gflops']:,.1f}",
                f"{row['gflops_of_none']:.1%}",
            )
        )
    return columns(lines)


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    budgeted = [name for name, method in SELECTORS.items() if method.uses_budget]
    known = ["none", *budgeted, *DROPPERS]
    parser = argparse.ArgumentParser(prog="python benchmarks/prefill.py", description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--methods", nargs="+", default=known, help="default: all that use a budget")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.05], help="of the image's tokens (0.05)")
    parser.add_argument("--crops", nargs="+", type=int, default=[1, 2], help="of methods that zoom (1 2)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU where there is one")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: bfloat16 on a GPU")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="default: runs/benchmarks/prefill-<preset>-<device>.csv")
    args = parser.parse_args(argv)
    args.given = sys.argv[1:] if argv is None else argv
    for method in args.methods:
        if method not in known:
            raise UserError(f'--methods names "{method}", allowed are {", ".join(known)}')
    if args.repeats < 1 or not all(0 < share < 1 for share in args.shares):
        raise UserError("--repeats is at least 1, and --shares are numbers between 0 and 1")
    if min(args.crops) < 0:
        raise UserError(f"--crops has {min(args.crops)}, allowed are whole numbers of at least 0")
    if args.threads:
        torch.set_num_threads(args.threads)
    # 2. Measure. Rows are written after every repetition, so that an interrupted run keeps them.
    device, args.dtype = pick(args.device, args.dtype)
    bench = Bench(PRESETS[args.preset], device, getattr(torch, args.dtype), args.seed)
    made = how(args, "prefill.py", device)
    output = args.output or RESULTS / f"prefill-{args.preset}-{device}.csv"
    rows: list[dict] = []

    def save(found: list[dict]) -> None:
        rows[:] = found
        write_csv(output, rows, made)

    wrong = run(bench, args.methods, args.shares, args.repeats, save, args.crops)
    # 3. Print.
    prompts = bench.prompts
    print(
        f"{prompts.image.tokens:,} vision tokens of {len(prompts.image.patches)} tiles, {sum(prompts.text)} text tokens; "
        f"medians of {args.repeats}"
    )
    print(f"{made['device']}, {made['threads']} threads, {args.dtype}, torch {made['torch']}\n")
    if rows:
        print(f"{show(rows)}\n\n{output}")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
