"""Time to the first token and speed of decoding, side by side with transformers and with the way of the published code.

    python benchmarks/end_to_end.py                                  # preset `cpu`, a few minutes on two cores
    python benchmarks/end_to_end.py --preset llava-v1.6-vicuna-7b    # real shapes, bfloat16, on a GPU
    python benchmarks/end_to_end.py --preset llava-v1.6-vicuna-7b --quick --batches 8 --append    # one more batch
    python benchmarks/end_to_end.py --config "method=none" --config "method=fastv overall_tokens=288"
    python benchmarks/end_to_end.py --table benchmarks/results/end_to_end-cpu-cpu.csv    # into docs/performance.md

Weights are random and shared by all providers (providers.py). Prompts are the same, and answers are greedy and exactly
as long as asked for. The time to the first token starts with pixels on the device and ends with a token of every row.
It is divided into vision tower, projector, selection and prefill, which is all the rest. Decoding is every token after
the first. It is limited by memory, so two numbers stand beside its speed. The ceiling is the speed at which the bytes
that this configuration reads per step (weights, and the KV entries of its policy) move at the bandwidth of a copy, the
fastest in the same run. The overhead is the time of a step beyond its products with weights, which are measured alone
in the same run.

Before anything is timed, answers are compared. With all tokens kept, ours is compared with transformers' model. With
selected tokens, it is compared with the published way, which must keep the same tokens. The bytes of every KV cache are
compared with the prediction. In float32, the logits of the first token are compared, and all tokens if decoding reads
the whole cache. In half precision, a float32 twin with fewer layers is compared in this way, and the logits are
compared to within the noise of the dtype. A wrong provider gets no row, and the exit code is 1.

Every provider has answered at least twice before it is timed. On a CPU, providers take turns in every repetition. On a
GPU, each has the memory to itself, and its row is written when it has finished. Figures are medians. A provider that
runs out of memory gets a row that says so. One that fails is named, and the others continue.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from dataclasses import fields, replace
from pathlib import Path

import torch
from end_to_end_bench import Bench, Entry
from end_to_end_report import DOCUMENT, draw, fill, read_rows, show
from memory import OUT_OF_MEMORY, ceiling, free_memory, step_bytes
from providers import PROVIDERS
from record import RESULTS, how, pick, read_text, write_csv
from shapes import PRESETS, Prompts

from llava.common.errors import UserError, exits_cleanly
from llava.config import AdaVConfig, ConfigError
from llava.costs.flops import Cost

CONFIGS = ("method=none", "method=adav overall_tokens=144")
STAGES = ("vision_tower", "projector", "selection")
# Default batches and new tokens by preset. REAL is for real shapes; the others run in minutes.
SIZES = {"cpu": ([1], [32]), "tiny": ([1, 2], [4])}
REAL = ([1, 8, 32], [64, 512])
QUICK = {"new_tokens": [64], "repeats": 3, "check_batch": 2}  # defaults under --quick
TWIN = (2, 8)  # LLM layers and new tokens of the float32 model that checks half precision
# DECODING: columns that are empty if an answer has one token. FIGURES: columns that are empty if it ran out of memory.
DECODING = [f"tokens_per_s{end}" for end in ("", "_min", "_max")]
DECODING += ["step_ms", "overhead_ms", "mb_per_step", "gb_per_s", "copy_gb_per_s", "read_gb_per_s", "weights_of_copy"]
DECODING += ["ceiling_tokens_per_s", "of_ceiling"]
FIGURES = [f"ttft_ms{end}" for end in ("", "_min", "_max")] + [f"{stage}_ms" for stage in (*STAGES, "prefill")]
FIGURES += [*DECODING, "kv_mb", "peak_mb"]


def rows_of(entries: list[Entry], bench: Bench, prompts: Prompts, new_tokens: int) -> list[dict]:
    """One row per entry, for one batch and one number of new tokens."""
    rows, batch = [], len(prompts.ids)
    for entry in entries:
        config, at_once = entry.provider.config, batch if entry.provider.side_by_side else 1
        cost = bench.cost(config, prompts)
        row = {
            "provider": entry.provider.name,
            "name": entry.label,
            "config": _settings(config),
            "status": OUT_OF_MEMORY if entry.out_of_memory else "measured",
            "layers": prompts.shape.layers,
            "batch": batch,
            "at_once": at_once,
            "new_tokens": new_tokens,
            "vision_tokens": prompts.image.tokens,
            "layer_mean_tokens": round(cost.layer_mean, 1),
            "text_tokens": sum(prompts.text),
        }
        row |= dict.fromkeys(FIGURES, "") if entry.out_of_memory else _figures(entry, bench, cost, at_once)
        row["compared_with"] = entry.reference.name if entry.reference else ""
        row["same_tokens"] = "" if entry.same_tokens is None else round(entry.same_tokens, 4)
        rows.append(row | {"ttft_speedup": "", "decode_speedup": ""})  # with_speedups fills them from the other rows
    return rows


def _figures(entry: Entry, bench: Bench, cost: Cost, at_once: int) -> dict:
    """Measured columns of one entry, in the order of FIGURES."""
    row = _spread("ttft_ms", [1e3 * answer.first for answer in entry.answers])
    for stage in STAGES:
        row[f"{stage}_ms"] = _median([1e3 * answer.stages.get(stage, 0.0) for answer in entry.answers])
    row["prefill_ms"] = _median([1e3 * (a.first - sum(a.stages.values())) for a in entry.answers])
    row |= _decoding(entry, bench, cost, at_once)
    row["kv_mb"] = round(entry.answers[0].kv / 1e6, 2)
    row["peak_mb"] = round(max(entry.peaks) / 1e6, 1) or ""
    return row


def with_speedups(rows: list[dict]) -> list[dict]:
    """Rows with their speedup over transformers at the same batch and number of new tokens. Cells may be text.

    The cell is empty if there is no row of transformers to compare with.
    """

    def cell(row):
        return int(row["batch"]), int(row["new_tokens"])

    plain = {cell(row): row for row in rows if row["provider"] == "transformers"}
    for row in rows:
        other = plain.get(cell(row), {})
        for name, figure, better in (("ttft", "ttft_ms", -1), ("decode", "tokens_per_s", 1)):
            known = other.get(figure, "") != "" and row[figure] != ""
            row[f"{name}_speedup"] = round((float(row[figure]) / float(other[figure])) ** better, 3) if known else ""
    return rows


def _decoding(entry: Entry, bench: Bench, cost: Cost, at_once: int) -> dict:
    """Columns about decoding: speed, overhead, bandwidth, and the ceiling that memory allows."""
    batch, steps = entry.answers[0].tokens.shape[0], entry.answers[0].tokens.shape[1] - 1
    row = dict.fromkeys(DECODING, "")
    if not steps:
        return row
    rates = [batch * steps / answer.decode for answer in entry.answers]
    kv = [cost.read_bytes(bench.dtype.itemsize, step) for step in range(1, steps + 1)]
    read = step_bytes(bench.weights, kv, at_once)
    most, rate = ceiling(read, bench.bandwidth, at_once), statistics.median(rates)
    row |= _spread("tokens_per_s", rates)
    row |= {
        "step_ms": round(1e3 * at_once / rate, 3),
        "overhead_ms": round(1e3 * (at_once / rate - bench.bare[at_once]), 3),
        "mb_per_step": round(read / 1e6, 1),
        "gb_per_s": round(read * rate / at_once / 1e9, 2),
        "copy_gb_per_s": round(bench.bandwidth / 1e9, 2),
        "read_gb_per_s": round(bench.reading / 1e9, 2),
        "weights_of_copy": round(bench.weights * rate / at_once / bench.bandwidth, 4),
        "ceiling_tokens_per_s": round(most, 2),
        "of_ceiling": round(rate / most, 4),
    }
    return row


def _median(values: list[float]) -> float:
    return round(statistics.median(values), 3)


def _spread(name: str, values: list[float]) -> dict[str, float]:
    return {name: _median(values), f"{name}_min": round(min(values), 3), f"{name}_max": round(max(values), 3)}


def read_config(text: str) -> tuple[str, AdaVConfig]:
    """(label, configuration) of a text like `NAME: method=adav overall_tokens=144`. Other keys have their defaults.

    Without NAME, the label is made from the method and the other keys. Values are JSON, or words. ConfigError for a
    part that is not KEY=VALUE with a known key.
    """
    name, colon, rest = text.partition(":")
    if not colon or "=" in name:  # the colon belongs to a value
        name, rest = "", text
    known, values = [f.name for f in fields(AdaVConfig)], {}
    for part in shlex.split(rest):
        key, equals, value = part.partition("=")
        if not equals or key not in known:
            raise ConfigError(
                f'--config "{text}": found "{part}", allowed is KEY=VALUE with a key of {", ".join(known)}'
            )
        try:
            values[key] = json.loads(value)
        except json.JSONDecodeError:
            values[key] = value
    config = AdaVConfig(**values)
    return name.strip() or _name(config), config


def _name(config: AdaVConfig) -> str:
    parts = [config.method]
    if config.method_class.uses_budget or config.method_class.resizes:
        parts.append(str(config.overall_tokens))
    parts += [f"+ {config.cache_policy}"] * (config.cache_policy != "full") + ["+ filter"] * config.prefill_filter_flag
    return " ".join(parts)


def _settings(config: AdaVConfig) -> str:
    """Keys of a configuration that differ from the defaults, in the form that --config reads."""
    plain, values = AdaVConfig(method="none").to_dict(), config.to_dict()
    return " ".join(
        shlex.quote(f"{key}={value if isinstance(value, str) else json.dumps(value)}")
        for key, value in values.items()
        if key == "method" or value != plain[key]
    )


def twin_complaints(args: argparse.Namespace, configs: dict[str, AdaVConfig]) -> dict[tuple[str, str], str]:
    """What is wrong in float32, with fewer layers and rows, by (provider, configuration)."""
    # In half precision, a real mistake can hide in rounding noise. In float32 it cannot.
    layers = min(TWIN[0], PRESETS[args.preset].llm[1])
    twin = Bench(PRESETS[args.preset], layers, args.device, torch.float32, args.seed, args.providers, configs)
    right, complaints = twin.right(twin.prompts(min(2, max(args.batches))), min(TWIN[1], max(args.new_tokens)))
    print("\n".join(complaints), file=sys.stderr, end="\n" if complaints else "")
    kept = {entry.key for entry in right}
    return {entry.key: "wrong in float32" for entry in twin.entries if entry.key not in kept}


def run(args: argparse.Namespace, configs: dict[str, AdaVConfig]) -> list[str]:
    """Measure every batch and number of new tokens, and return what was wrong. Writes the rows after each group."""
    # 1. Earlier rows, the float32 twin, and the model.
    dtype = getattr(torch, args.dtype)
    earlier = _earlier(args) if args.append else []
    refused = {} if dtype == torch.float32 or args.no_twin else twin_complaints(args, configs)
    free_memory(args.device)  # that of the twin
    bench = Bench(PRESETS[args.preset], args.layers, args.device, dtype, args.seed, args.providers, configs)
    bench.entries = [entry for entry in bench.entries if entry.key not in refused]
    complaints = [f"{provider} ({label}): {why}, so it gets no time" for (provider, label), why in refused.items()]
    rows, made = [], how(args, "end_to_end.py", args.device)
    print(f"{made['device']}, {made['threads']} threads, {args.dtype}, torch {made['torch']}", flush=True)

    def complain(wrong: list[str]) -> None:
        complaints.extend(wrong)
        print("\n".join(wrong), file=sys.stderr, end="\n" if wrong else "", flush=True)

    # 2. Check and time. Rows are written after each group, so that an interrupted run keeps what it measured.
    checks = Checks(bench, args.check_batch)
    for batch in args.batches:
        prompts = bench.prompts(batch)
        for new_tokens in args.new_tokens:
            entries, wrong = checks(entries_of(bench, batch, args.quick), prompts, new_tokens)
            complain(wrong)
            before, done = rows, []
            for group in bench.groups(entries):
                complain(bench.measure(group, prompts, new_tokens, args.repeats))
                done += group
                rows = before + [row | made for row in rows_of(done, bench, prompts, new_tokens)]
                if rows:
                    write_csv(args.output, with_speedups(merged(earlier, rows)))
    # 3. Plot and print what the file has now, with the rows of earlier runs.
    if rows:
        written = read_rows(args.output)
        draw(written, args.plot)
        print(f"a copy moves up to {bench.bandwidth / 1e9:,.1f} GB/s (read plus written)")
        print(f"reading alone goes at up to {bench.reading / 1e9:,.1f} GB/s\n")
        print(f"{show(written)}\n\n{args.output}\n{args.plot}")
    return complaints


def entries_of(bench: Bench, batch: int, quick: bool) -> list[Entry]:
    """Entries that are timed at a batch. quick: without those that answer row by row, except at batch 1."""
    return [entry for entry in bench.entries if batch == 1 or entry.provider.side_by_side or not quick]


class Checks:
    """Compares entries before they are timed, each once per number of rows and new tokens.

    rows: number of rows that are compared. None: as many as are timed, but at most two if an entry is compared with a
    provider that answers row by row and is not timed itself.
    """

    def __init__(self, bench: Bench, rows: int | None):
        self.bench, self.rows = bench, rows
        self._right: dict[tuple, Entry] = {}
        self._seen: set[tuple] = set()

    def __call__(self, entries: list[Entry], prompts: Prompts, new_tokens: int) -> tuple[list[Entry], list[str]]:
        """(entries that may be timed, each as a new object; what is wrong with entries that were compared now)."""
        rows = self._rows(entries, len(prompts.ids))
        keys = {(rows, new_tokens, *entry.key): entry for entry in entries}
        new = [entry for key, entry in keys.items() if key not in self._seen]
        some = prompts if rows == len(prompts.ids) else self.bench.prompts(rows)
        right, complaints = self.bench.right(some, new_tokens, new) if new else ([], [])
        self._seen |= keys.keys()
        self._right |= {(rows, new_tokens, *entry.key): entry for entry in right}
        found = [self._right[key] for key in keys if key in self._right]
        # New objects, because measuring changes them, and a check can serve several measurements.
        return [replace(entry, answers=list(entry.answers), peaks=[]) for entry in found], complaints

    def _rows(self, entries: list[Entry], batch: int) -> int:
        if self.rows is not None:
            return min(self.rows, batch)
        timed = {id(entry.provider) for entry in entries}
        others = (entry.reference for entry in entries if entry.reference and id(entry.reference) not in timed)
        return batch if all(other.side_by_side for other in others) else min(2, batch)


def merged(earlier: list[dict], rows: list[dict]) -> list[dict]:
    """Earlier rows of a file and new rows, sorted by batch and number of new tokens.

    A new row replaces an earlier one with the same provider, configuration, batch and number of new tokens.
    """

    def key(row):
        return row["provider"], row["config"], int(row["batch"]), int(row["new_tokens"])

    new = {key(row) for row in rows}
    both = [dict(row) for row in earlier if key(row) not in new] + [dict(row) for row in rows]
    return sorted(both, key=lambda row: key(row)[2:])


def _earlier(args: argparse.Namespace) -> list[dict[str, str]]:
    """Rows of the file that --append adds to, [] if there is no file yet. UserError for another preset or dtype."""
    if not args.output.exists():
        return []
    rows = read_text(args.output, "ttft_ms")
    for name in ("preset", "dtype"):
        for row in rows:
            if row[name] != getattr(args, name):
                raise UserError(
                    f'{args.output}: --append found rows with {name} "{row[name]}", allowed is "{getattr(args, name)}", as now'
                )
    return rows


def arguments(argv: list[str] | None) -> tuple[argparse.Namespace, dict[str, AdaVConfig]]:
    parser = argparse.ArgumentParser(prog="python benchmarks/end_to_end.py", description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--layers", type=int, help="of the LLM; default: the preset's")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument(
        "--config",
        action="append",
        metavar='"[NAME:] KEY=VALUE ..."',
        help=f"repeatable; default: {' and '.join(CONFIGS)}",
    )
    parser.add_argument("--batches", nargs="+", type=int, help="default: 1 8 32; presets cpu 1, tiny 1 2")
    parser.add_argument("--new-tokens", nargs="+", type=int, help="default: 64 512; presets cpu 32, tiny 4")
    parser.add_argument("--repeats", type=int, help="default: 5")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="64 new tokens, 3 repeats, comparisons on 2 rows, the published way at batch 1 alone",
    )
    parser.add_argument("--check-batch", type=int, metavar="N", help="compare on N rows, however many are timed")
    parser.add_argument("--no-twin", action="store_true", help="half precision without the comparison in float32")
    parser.add_argument("--append", action="store_true", help="add to --output; the same cells are replaced")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU where there is one")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: bfloat16 on a GPU")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="default: runs/benchmarks/end_to_end-<preset>-<device>.csv")
    parser.add_argument("--plot", type=Path, help="default: beside --output")
    parser.add_argument(
        "--table", type=Path, metavar="CSV", help="measure nothing: put this file's table into --document"
    )
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="default: docs/performance.md")
    # 1. Defaults, first those of --quick: a flag that is given has priority over both.
    args = parser.parse_args(argv)
    args.given = sys.argv[1:] if argv is None else argv
    for name, value in QUICK.items() if args.quick else ():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.repeats = 5 if args.repeats is None else args.repeats
    batches, new_tokens = SIZES.get(args.preset, REAL)
    args.batches, args.new_tokens = args.batches or batches, args.new_tokens or new_tokens
    # 2. Numbers.
    counts = [("--repeats", args.repeats), ("--layers", args.layers), ("--check-batch", args.check_batch)]
    counts += [("--batches", n) for n in args.batches] + [("--new-tokens", n) for n in args.new_tokens]
    for flag, count in counts:
        if count is not None and count < 1:
            raise UserError(f"{flag} is {count}, allowed is at least 1")
    # 3. Device, files and configurations. Labels are columns of the table, so they must differ.
    args.device, args.dtype = pick(args.device, args.dtype)
    args.output = args.output or RESULTS / f"end_to_end-{args.preset}-{args.device}.csv"
    args.plot = args.plot or args.output.with_suffix(".png")
    configs: dict[str, AdaVConfig] = {}
    for name, config in map(read_config, args.config or CONFIGS):
        if name in configs:
            raise UserError(f'two configurations are called "{name}": give them names, --config "NAME: KEY=VALUE ..."')
        configs[name] = config
    return args, configs


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    args, configs = arguments(argv)
    if args.table:
        fill(args.document, args.table)
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    complaints = run(args, configs)
    if complaints:
        sys.exit("\n".join(complaints))


if __name__ == "__main__":
    main()
