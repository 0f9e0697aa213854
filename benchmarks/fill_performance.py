"""Everything on docs/performance.md that a GPU run gives, from the folder it left: `benchmarks/gpu.sh a`, then `b`.

    python benchmarks/fill_performance.py FOLDER [--results benchmarks/results] [--document docs/performance.md]

The command reads decode_kernel.csv, stages.csv, kernels.csv, sdpa.csv, end_to_end*.csv and prefill*.csv. Several
end_to_end or prefill files of one preset become one file, in which later rows replace earlier ones of the same key.
Each file is written to benchmarks/results as <what>-<preset>-<cuda or cpu>.csv. Its plot, if it has one, goes next to
the document, and its table goes into the document between the marks of that name. `figures-<preset>-<cuda or cpu>` is a
table of the most important figures, computed from the others. The command names what the folder lacks and which marks
the document lacks, and fills the rest.

The page's tables are of a GPU, so a run on a CPU is refused. --allow-cpu is for trying this command.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import end_to_end_report
from page import COMMITTED, DOCUMENT, bandwidths, made, number, picture, put, share
from record import read_csv, read_text, write_csv

from llava.common.errors import UserError, exits_cleanly
from llava.common.text_table import markdown_table
from llava.eval.results.plots import COLORS, panels, save, style

KERNELS_SHOWN = 6  # kernels in the table, for each first token and each step
ADAV = "adav 144"
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Part:
    """One table of the page.

    files: pattern of its file names. column: a column that the files have. key: columns that identify a row; () for a
    part with one file. lines: makes the lines of the table from rows. draw: draws the plot of rows; None: no plot.
    shows: what the plot shows. says: makes a line about how the rows were made.
    """

    files: str
    column: str
    key: tuple[str, ...]
    lines: Callable[[list[dict]], list[tuple[str, ...]]]
    draw: Callable[[list[dict], Path], None] | None = None
    shows: str = ""
    says: Callable[[list[dict]], str] = lambda rows: f"{made(rows)}{bandwidths(rows)}."


def kernel_lines(rows: list[dict]) -> list[tuple[str, ...]]:
    lines = [("provider", "batch", "image tokens", "read", "us", "in a graph us", "MB", "GB/s", "of copy", "error")]
    for row in rows:
        lines.append(
            (row["provider"], number(row["batch"]), number(row["image_tokens"]), share(row["core_share"]))
            + (number(row["us"], 1), number(row["graph_us"], 1), number(row["mb"], 1), number(row["gb_per_s"]))
            + (share(row["of_copy"]), f"{row['error']:.1e}")
        )
    return lines


def stage_lines(rows: list[dict]) -> list[tuple[str, ...]]:
    lines = [("reads", "batch", "prepare ms", "tower", "projector", "selection", "splice", "prefill ms", "step ms")]
    lines[0] += ("on the device ms", "weights GB/s", "captured MB")
    names = ("prepare", "vision_tower", "projector", "selection", "splice", "prefill")
    for row in rows:
        lines.append(
            (row["config"], number(row["batch"]), *(number(row[f"{name}_ms"], 1) for name in names))
            + (number(row["step_ms"], 2), number(row["device_step_ms"], 2), number(row["weights_gb_per_s"]))
            + (number(row["captured_mb"]),)
        )
    return lines


def profile_lines(rows: list[dict]) -> list[tuple[str, ...]]:
    lines = [("of", "kernel", "us", "calls")]
    for label in dict.fromkeys(row["of"] for row in rows):
        here = [row for row in rows if row["of"] == label][: KERNELS_SHOWN + 1]
        # A bar would end the Markdown cell, and names of C++ templates are long.
        lines += [
            (label, f"`{row['kernel'][:70]}`".replace("|", "/"), number(row["us"], 1), number(row["calls"], 1))
            for row in here
        ]
    return lines


def sdpa_lines(rows: list[dict]) -> list[tuple[str, ...]]:
    lines = [("where", "backend", "keys", "first call ms", "later ms")]
    for row in rows:
        lines.append(
            (row["what"], row["sdpa"], number(row["length"]), number(row["new_shape_ms"], 2), number(row["ms"], 3))
        )
    return lines


def prefill_lines(rows: list[dict]) -> list[tuple[str, ...]]:
    lines = [
        ("method", "tokens", "layer mean", "prefill ms (min to max)", "of none", "choosing ms", "LLM ms", "GFLOPs")
    ]
    lines[0] += ("of none",)
    for row in rows:
        spread = " to ".join(number(row[f"prefill_ms_{end}"], 1) for end in ("min", "max"))
        tokens = row["overall_tokens"]
        lines.append(
            (row["method"], tokens if isinstance(tokens, str) else number(tokens), number(row["layer_mean_tokens"], 1))
            + (f"{number(row['prefill_ms'], 1)} ({spread})", share(row["prefill_of_none"]))
            + ("in LLM" if row["selector_ms"] is None else number(row["selector_ms"], 2), number(row["llm_ms"], 1))
            + (number(row["predicted_gflops"], 1), share(row["gflops_of_none"]))
        )
    return lines


def draw_kernel(rows: list[dict], path: Path) -> None:
    """Plot the share of copy bandwidth by provider, with one panel per batch."""
    names = list(dict.fromkeys(row["provider"] for row in rows))
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    with style():
        figure, axes = panels(1, len(batches), height=4.2, sharey=True)
        for axis, batch in zip(axes[0], batches, strict=True):
            cases = list(dict.fromkeys((r["image_tokens"], r["core_share"]) for r in rows if r["batch"] == batch))
            for place, name in enumerate(names):
                found = {(r["image_tokens"], r["core_share"]): r["of_copy"] for r in rows if r["batch"] == batch and r["provider"] == name}  # fmt: skip
                places = [n + 0.16 * (place - (len(names) - 1) / 2) for n in range(len(cases))]
                heights = [100 * (found.get(case) or 0) for case in cases]
                axis.bar(places, heights, width=0.15, color=COLORS[place % len(COLORS)], label=name)
            axis.set_xticks(range(len(cases)), [f"{tokens:,.0f}\n{part:.0%} read" for tokens, part in cases])
            axis.set_title(f"batch {batch:.0f}")
        axes[0][0].set_ylabel("of the bandwidth of a copy (%)")
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper left", ncols=len(names))
        save(
            figure, path, ("Bytes that a provider has to move over its median time.", f"{made(rows)}.".replace("`", ""))
        )


def draw_stages(rows: list[dict], path: Path) -> None:
    """Plot the first token by stage, and a decode step: by the clock, and the device's part of it."""
    names = [f"{row['config']}, batch {row['batch']:.0f}" for row in rows]
    with style():
        figure, ((left, right),) = panels(1, 2, height=1.2 + 0.42 * len(rows))
        starts = [0.0] * len(rows)
        for name, color in zip(("vision_tower", "projector", "selection", "splice", "prefill"), COLORS, strict=False):
            widths = [row[f"{name}_ms"] or 0.0 for row in rows]
            left.barh(range(len(rows)), widths, left=starts, color=color, height=0.62, label=name.replace("_", " "))
            starts = [start + width for start, width in zip(starts, widths, strict=True)]
        right.barh(
            range(len(rows)), [row["step_ms"] for row in rows], color=COLORS[5], height=0.62, label="by the clock"
        )
        known = [(place, row["device_step_ms"]) for place, row in enumerate(rows) if row["device_step_ms"] is not None]
        if known:
            right.barh(*zip(*known, strict=True), color=COLORS[0], height=0.3, label="on the device")
        for axis, title in ((left, "time to the first token (ms)"), (right, "decode step (ms)")):
            axis.set_yticks(range(len(rows)), names if axis is left else [""] * len(rows))
            axis.invert_yaxis()
            axis.grid(axis="y", visible=False)
            axis.set_title(title)
            axis.legend()
        save(figure, path, ("Medians of five requests to the engine.", f"{made(rows)}.".replace("`", "")))


def draw_prefill(rows: list[dict], path: Path) -> None:
    """Plot the time to the first token of every method."""
    names = [f"{r['method']}, {r['overall_tokens'] if isinstance(r['overall_tokens'], str) else number(r['overall_tokens'])}" for r in rows]  # fmt: skip
    with style():
        figure, ((axis,),) = panels(1, 1, height=1.2 + 0.3 * len(rows))
        axis.barh(range(len(rows)), [row["prefill_ms"] for row in rows], color=COLORS[0], height=0.62)
        ends = ([row[f"prefill_ms_{end}"] for row in rows] for end in ("min", "max"))
        axis.hlines(range(len(rows)), *ends, color="black", linewidth=1.1)
        axis.set_yticks(range(len(rows)), names)
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
        axis.set_title("time to the first token (ms), by method and vision tokens")
        save(
            figure,
            path,
            ("Medians; lines go from the fastest repetition to the slowest.", f"{made(rows)}.".replace("`", "")),
        )


PARTS = {
    "end_to_end": Part(
        "end_to_end*.csv",
        "ttft_ms",
        ("provider", "config", "batch", "new_tokens"),
        end_to_end_report.lines_of,
        end_to_end_report.draw,
        end_to_end_report.PICTURE,
        end_to_end_report.made_of,
    ),
    "decode_kernel": Part(
        "decode_kernel.csv", "of_copy", (), kernel_lines, draw_kernel, "Share of copy bandwidth by provider"
    ),
    "stages": Part(
        "stages.csv", "step_ms", (), stage_lines, draw_stages, "The first token by stage, and a decode step"
    ),
    "kernels": Part("kernels.csv", "kernel", (), profile_lines),
    "sdpa": Part("sdpa.csv", "new_shape_ms", (), sdpa_lines),
    "prefill": Part(
        "prefill*.csv",
        "prefill_of_none",
        ("method", "overall_tokens"),
        prefill_lines,
        draw_prefill,
        "Prefill by method",
    ),
}


def gather(folder: Path, part: Part) -> dict[tuple[str, str], list[dict[str, str]]]:
    """Rows (as text) of all files of a part, by (preset, backend). Later rows replace earlier ones of the same key."""
    files = [read_text(file, part.column) for file in sorted(folder.glob(part.files))]
    for rows in files:
        if "backend" not in rows[0]:
            raise UserError(f"{folder}: {part.files} has no column backend, allowed is what the benchmarks write")
    found: dict[tuple[str, str], dict[tuple, dict[str, str]]] = {}
    # By the time in the rows, not that of the files, which a copy can change.
    for rows in sorted(files, key=lambda rows: rows[-1]["written"]):
        for place, row in enumerate(rows):
            there = found.setdefault((row["preset"], row["backend"]), {})
            there[tuple(row[name] for name in part.key) or (place,)] = row
    return {where: list(rows.values()) for where, rows in found.items()}


def figures(cells: list[dict], kernel: list[dict]) -> list[tuple[str, ...]]:
    """Lines of the most important figures with their aims. cells: rows of end_to_end. kernel: rows of decode_kernel."""
    ours, published = (_cell(cells, name, 1, ADAV) for name in ("engine", "upstream"))
    plain, adaptive = _cell(cells, "transformers", 1), _cell(cells, "engine", 32, "A-VL")
    large = [row["of_copy"] for row in kernel if row["provider"] == "ours" and row["batch"] >= 8]
    return [
        ("figure", "measured", "aim"),
        ("batch 1: first token with AdaV at 144, against transformers on all", _times(plain, ours, "ttft_ms"), "6 x"),
        ("batch 1: the same, against the published way at 144", _times(published, ours, "ttft_ms"), "1.5 x"),
        ("batch 1: weights read in decoding at 144, of copy bandwidth", _share(ours, "weights_of_copy"), "85%"),
        (
            "batch 1: decoding at 144, against transformers' generate() on all",
            _times(ours, plain, "tokens_per_s"),
            "5 x",
        ),
        (
            "batch 1: the same, against generate() of the published way at 144",
            _times(ours, published, "tokens_per_s"),
            "5 x",
        ),
        ("batch 32: decoding with A-VL, of its ceiling", _share(adaptive, "of_ceiling"), "90%"),
        (
            "batches from 8 on: decode kernel, of copy bandwidth, lowest to highest",
            f"{share(min(large))} to {share(max(large))}" if large else NOT_MEASURED,
            "90%",
        ),
    ]


def _cell(cells: list[dict], provider: str, batch: int, name: str = "") -> dict:
    """First row of a provider and a batch whose label starts with `name`; {} if there is none."""
    found = (row for row in cells if row["provider"] == provider and row["batch"] == batch)
    return next((row for row in found if row["name"].startswith(name)), {})


def _times(above: dict, below: dict, name: str) -> str:
    top, bottom = above.get(name), below.get(name)
    return f"{top / bottom:.2f} x" if top and bottom else _reason(above, below)


def _share(row: dict, name: str) -> str:
    return _reason(row) if row.get(name) is None else share(row[name])


def _reason(*rows: dict) -> str:
    """Reason why there is no figure: a row's status, for example that it ran out of memory."""
    return next((row["status"] for row in rows if row.get("status") not in (None, "measured")), NOT_MEASURED)


def fill(folder: Path, results: Path, document: Path, allow_cpu: bool = False) -> list[str]:
    """Copy, plot and fill what the folder has. Returns one sentence per part that is missing or has no marks."""
    # All files are checked first, so that a refusal leaves the document as it is.
    gathered = {name: gather(folder, part) for name, part in PARTS.items()}
    for name, found in gathered.items():
        if not allow_cpu and any(backend != "cuda" for _, backend in found):
            raise UserError(f"{folder}: {PARTS[name].files} was measured on a CPU, allowed is a run on a GPU")
    lacking = [f"{folder} has no {PARTS[name].files}" for name, found in gathered.items() if not found]
    read: dict[str, dict[tuple[str, str], list[dict]]] = {name: {} for name in PARTS}
    for name, found in gathered.items():
        for where, rows in found.items():
            stem = "-".join((name, *where))
            file = results / f"{stem}.csv"
            write_csv(file, rows)
            read[name][where] = read_csv(file, PARTS[name].column)
            lacking += _fill(document, stem, PARTS[name], read[name][where])
    for preset, backend in dict.fromkeys([*read["end_to_end"], *read["stages"]]):
        kernel = [row for where, rows in read["decode_kernel"].items() if where[1] == backend for row in rows]
        table = markdown_table(figures(read["end_to_end"].get((preset, backend), []), kernel), left=1)
        lacking += _put(document, f"figures-{preset}-{backend}", table)
    return lacking


def _fill(document: Path, stem: str, part: Part, rows: list[dict]) -> list[str]:
    if part.draw is not None:
        part.draw(rows, document.with_name(f"{stem}.png"))
    table = markdown_table(part.lines(rows))
    return _put(document, stem, f"{part.says(rows)}\n\n{table}{picture(document, stem, part.shows)}")


def _put(document: Path, name: str, body: str) -> list[str]:
    """Put `body` between the marks of `name`. Returns the error as a list of one sentence, or []."""
    try:
        put(document, name, body)
    except UserError as error:
        return [str(error)]
    return []


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/fill_performance.py", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="what benchmarks/gpu.sh was given as OUT")
    parser.add_argument("--results", type=Path, default=COMMITTED, help="where CSVs go; default: benchmarks/results")
    parser.add_argument(
        "--document", type=Path, default=DOCUMENT, help="default: docs/performance.md; plots go beside it"
    )
    parser.add_argument("--allow-cpu", action="store_true", help="to try it: take what a run without a GPU left")
    args = parser.parse_args(argv)
    if not args.folder.is_dir():
        raise UserError(f"{args.folder} is no folder, allowed is the one that benchmarks/gpu.sh wrote into")
    if not args.document.is_file():
        raise UserError(f"{args.document}: there is no such file to fill")
    lacking = fill(args.folder, args.results, args.document, args.allow_cpu)
    for sentence in lacking:
        print(sentence, file=sys.stderr)
    if len(lacking) >= len(PARTS) and not any(args.folder.glob("*.csv")):
        raise UserError(f"{args.folder} has nothing that benchmarks/gpu.sh writes")
    print(f"filled {args.document}; results are in {args.results}")


if __name__ == "__main__":
    main()
