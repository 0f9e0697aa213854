"""Time of one decoding step's attention when only part of the KV cache is read: our kernel against three ways without it.

    python benchmarks/decode_kernel.py [--preset gpu] [--shape vicuna-7b] [--dtype bfloat16] [--output FILE.csv]

A row of the cache stores a prefix, N vision tokens and some text. A step reads the prefix, a share of the vision tokens
(A-VL's core) and the text. There is one layer and one query per row. Providers:

    ours, ours_scores   llava.kernels.decode_attention, without and with the scores of an update step
    sdpa                scaled_dot_product_attention over all stored entries: the cost without any selection
    index_select        copies the listed rows, then SDPA over the copy
    masked              SDPA over all stored entries with a mask, as in A-VL's published code

The baselines get flat row numbers and masks ready-made, and the query heads of a KV head as rows of one problem, which
is the fastest form for SDPA. mb counts the keys and values that a provider must move: the listed rows for ours, three
times as many for index_select (read, write, read), the stored rows for the other two. They are compared with the
measured bandwidth of a copy (bytes read plus bytes written). Another column has the bandwidth of reading alone.

Calls rotate over many copies of the cache, so that no copy is still in the processor's cache when it is used again. On
a GPU, us is one call from Python with its launches, between two events. graph_us is one call of a CUDA graph that has a
call per copy, so it does not include launches, and gb_per_s is computed from it. Without a GPU there is only us, and
ours is the plain reference.

Every provider is compared with the reference in higher precision before and after it is timed. A provider with wrong
output gets no row, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path

import numpy as np
import torch
from decode_providers import Case, Provider, Step, error, providers
from memory import copy_bandwidth, read_bandwidth
from record import RESULTS, how, pick, write_csv
from torch import Tensor

from llava.common.errors import UserError, exits_cleanly
from llava.common.progress import progress_bar
from llava.common.text_table import columns
from llava.kernels.decode_attention import DecodeOutput

# max |error| / max |reference|, as in the kernel's tests.
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}
SHAPES = {"vicuna-7b": (32, 32, 128), "mistral-7b": (32, 8, 128), "yi-34b": (56, 8, 128)}  # heads, KV heads, head size


@dataclass(frozen=True)
class Preset:
    """What is measured. tokens: N; shares: of the vision tokens that are read; most_copies: limit of cache copies."""

    batches: tuple[int, ...]
    tokens: tuple[int, ...]
    shares: tuple[float, ...]
    repeats: int
    most_copies: int = 128


PRESETS = {
    "gpu": Preset((1, 8, 32), (576, 2880), (0.5, 0.3, 0.1), 20),
    "cpu": Preset((1, 4), (576, 2880), (0.5, 0.1), 5, most_copies=8),
    # Runs in seconds, to see that everything works.
    "tiny": Preset((2,), (40,), (0.3,), 2, most_copies=3),
}


def time_calls(provider: Provider, steps: list[Step]) -> None:
    """Add one sample per copy of the cache to `provider`: between two events on a GPU, else by the clock."""
    if not steps[0].q.is_cuda:
        for step in steps:
            start = time.perf_counter()
            provider.call(step)
            provider.calls.append(1e6 * (time.perf_counter() - start))
        return
    # Events are made before, and read after the loop: waiting in between would add the wait to the next call.
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in steps]
    torch.cuda.synchronize()
    for step, (start, end) in zip(steps, pairs, strict=True):
        start.record()
        provider.call(step)
        end.record()
    torch.cuda.synchronize()
    provider.calls += [1e3 * start.elapsed_time(end) for start, end in pairs]


def capture(provider: Provider, steps: list[Step]) -> None:
    """Capture a CUDA graph with one call per step. The provider must have run before, so that kernels are compiled."""
    provider.graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(provider.graph):
        for step in steps:
            provider.captured = provider.call(step)


def time_replay(provider: Provider, copies: int) -> None:
    """Add one sample to `provider`: the time of a replay, divided by its number of calls."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    provider.graph.replay()
    end.record()
    torch.cuda.synchronize()
    provider.replays.append(1e3 * start.elapsed_time(end) / copies)


def measure(case: Case, args: argparse.Namespace, copy_gb: float) -> tuple[list[dict], list[str]]:
    """(one row per provider whose output is right, one sentence per provider whose output is wrong)."""
    # 1. Operands, the expected output of the last step, and the providers.
    steps = [Step(case, seed) for seed in range(case.copies(PRESETS[args.preset].most_copies))]
    expected = {everything: steps[-1].expected(everything) for everything in (False, True)}
    candidates = [p for p in providers(case, steps[0], args.splits, args.tuning) if p.name in args.providers]

    def check(provider: Provider, found: Tensor | DecodeOutput) -> None:
        provider.error = float(np.maximum(provider.error, error(found, expected[provider.everything])))  # NaN wins

    # 2. Check, then time. Providers take turns, so that a machine that slows down slows all of them.
    for provider in candidates:
        check(provider, provider.call(steps[-1]))
        if case.device == "cuda":
            capture(provider, steps)
    for _ in range(args.repeats):
        for provider in candidates:
            time_calls(provider, steps)
            if provider.graph is not None:
                time_replay(provider, len(steps))
                check(provider, provider.captured)
    # 3. Check again: a kernel that writes out of bounds can spoil later calls.
    for provider in candidates:
        check(provider, provider.call(steps[-1]))
    limit = TOLERANCE[args.dtype]
    right = [p for p in candidates if p.error <= limit]  # false for NaN
    wrong = [
        f"{p.name} at batch {case.batch}, {case.tokens} tokens, core {case.share:.0%}: its output is off by {p.error:.1e} of the "
        f"largest value, allowed is {limit:.0e}, so no time is given"
        for p in candidates
        if p not in right
    ]
    return [row(case, p, len(steps), copy_gb) for p in right], wrong


def row(case: Case, provider: Provider, copies: int, copy_gb: float) -> dict:
    """Columns of one provider in one case. us: median, 20th and 80th percentile."""
    figures = {
        "provider": provider.name,
        "batch": case.batch,
        "heads": case.heads,
        "kv_heads": case.groups,
        "head_size": case.width,
        "image_tokens": case.tokens,
        "core_share": case.share,
        "listed": case.listed,
        "stored": case.stored,
        "copies": copies,
        "error": f"{provider.error:.1e}",
    }
    for name, samples in (("us", provider.calls), ("graph_us", provider.replays)):
        for suffix, percent in (("", 50), ("_p20", 20), ("_p80", 80)):
            figures[name + suffix] = round(float(np.percentile(samples, percent)), 2) if samples else ""
    moved = case.bytes(provider.rows)
    gb = moved / (figures["graph_us"] or figures["us"]) / 1e3
    return figures | {
        "mb": round(moved / 1e6, 3),
        "gb_per_s": round(gb, 1),
        "of_copy": round(gb / copy_gb, 3),
        "copy_gb_per_s": round(copy_gb, 1),
    }


def show(rows: list[dict]) -> str:
    """Table for the screen."""
    head = ("provider", "batch", "tokens", "core", "us", "p20", "p80", "graph us", "p20", "p80", "MB", "GB/s", "of copy", "error")  # fmt: skip
    lines = [head]
    for r in rows:
        times = [f"{r[n]:,.1f}" if r[n] != "" else "-" for n in ("us", "us_p20", "us_p80", "graph_us", "graph_us_p20", "graph_us_p80")]  # fmt: skip
        lines.append(
            (r["provider"], str(r["batch"]), f"{r['image_tokens']:,}", f"{r['core_share']:.0%}", *times)
            + (f"{r['mb']:,.1f}", f"{r['gb_per_s']:,.0f}", f"{r['of_copy']:.0%}", r["error"])
        )
    return columns(lines)


def triton_version() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return ""


def arguments(argv: list[str] | None) -> argparse.Namespace:
    names = ("ours", "ours_scores", "sdpa", "index_select", "masked")
    parser = argparse.ArgumentParser(prog="python benchmarks/decode_kernel.py", description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, help="default: gpu where there is one, else cpu")
    parser.add_argument("--shape", choices=SHAPES, default="vicuna-7b")
    parser.add_argument("--providers", nargs="+", choices=names, default=names, help="default: all")
    parser.add_argument("--batches", nargs="+", type=int, help="default: the preset's")
    parser.add_argument("--tokens", nargs="+", type=int, help="image tokens that are stored; default: the preset's")
    parser.add_argument(
        "--shares", nargs="+", type=float, help="of the image tokens that are read; default: the preset's"
    )
    parser.add_argument("--repeats", type=int, help="of a call per copy of the cache; default: the preset's")
    parser.add_argument("--splits", type=int, help="programs per sequence, in place of the kernel's choice")
    parser.add_argument("--tuning", nargs=3, type=int, metavar=("BLOCK", "WARPS", "STAGES"), help="likewise")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU where there is one")
    parser.add_argument("--dtype", choices=TOLERANCE, help="default: bfloat16 on a GPU")
    parser.add_argument(
        "--output", type=Path, help="default: runs/benchmarks/decode_kernel-<preset>-<shape>-<dtype>.csv"
    )
    # Defaults that depend on other flags: the preset on the device, the sizes on the preset.
    args = parser.parse_args(argv)
    args.given = sys.argv[1:] if argv is None else argv
    args.device, args.dtype = pick(args.device, args.dtype)
    args.preset = args.preset or ("gpu" if args.device == "cuda" else "cpu")
    for name in ("batches", "tokens", "shares", "repeats"):
        setattr(args, name, getattr(args, name) or getattr(PRESETS[args.preset], name))
    if min(*args.batches, *args.tokens, args.repeats, args.splits or 1, *(args.tuning or [1])) < 1:
        raise UserError("--batches, --tokens, --repeats, --splits and --tuning are at least 1")
    if not all(0 < share <= 1 for share in args.shares):
        raise UserError("--shares are numbers above 0, up to 1")
    return args


@exits_cleanly
@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    made = {**how(args, "decode_kernel.py", args.device), "triton": triton_version()}
    output = args.output or RESULTS / f"decode_kernel-{args.preset}-{args.shape}-{args.dtype}.csv"
    copy_gb, read_gb = copy_bandwidth(args.device) / 1e9, read_bandwidth(args.device) / 1e9
    made["read_gb_per_s"] = round(read_gb, 1)
    print(
        f"{made['device']}, {args.dtype}, torch {made['torch']}, a copy moves {copy_gb:,.0f} GB/s, reading {read_gb:,.0f}"
    )
    rows, wrong = [], []
    for batch, tokens, share in progress_bar(
        "measuring", [*product(args.batches, args.tokens, args.shares)], unit=" cases"
    ):
        case = Case(batch, tokens, share, *SHAPES[args.shape], getattr(torch, args.dtype), args.device)
        right, complaints = measure(case, args, copy_gb)
        rows += right
        wrong += complaints
        if rows:
            write_csv(output, rows, made)  # after every case, so that an interrupted run keeps what it measured
        gc.collect()  # frees the CUDA graphs, which hold memory
    if rows:
        print(f"\n{show(rows)}\n\n{output}")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
