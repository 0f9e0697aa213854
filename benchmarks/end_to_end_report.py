"""Table (text and Markdown) and plot of the rows of benchmarks/end_to_end.py."""

from __future__ import annotations

from pathlib import Path

from page import DOCUMENT, bandwidths, made, number, picture, put, share
from record import read_csv

from llava.common.text_table import columns, markdown_table
from llava.eval.results.plots import COLORS, INK, panels, save, style

__all__ = ["DOCUMENT", "draw", "fill", "read_rows", "show"]
STAGES = ("vision_tower", "projector", "selection", "prefill")
PICTURE = "Time to the first token by stage, and decoding beside its ceiling"
CAPTION = (
    "Medians of repetitions on shared random weights; whiskers go from the fastest repetition to the slowest. "
    "Left: from pixels to the first token of every row. Right: every token after the first; the black mark is the ceiling, the bytes that "
    "this configuration reads per step over the measured bandwidth of a copy."
)


def read_rows(path: Path) -> list[dict]:
    """Rows of a file of end_to_end.py. Numbers are converted, and empty cells are None."""
    return read_csv(path, "ttft_ms")


def lines_of(rows: list[dict]) -> list[tuple[str, ...]]:
    """Lines of the table. The first one is the header."""
    head = ("provider", "reads", "batch", "new", "first token ms", "tower", "projector", "selection", "prefill", "x")
    head += ("tokens/s", "x", "overhead ms", "GB/s", "ceiling", "reached", "KV MB", "peak MB")
    lines = [head]
    for row in rows:
        batch = f"{row['batch']:.0f}" + ("" if row["at_once"] == row["batch"] else " x 1")
        lines.append(
            (row["provider"], row["name"], batch, f"{row['new_tokens']:.0f}", _first(row))
            + tuple(number(row[f"{stage}_ms"]) for stage in STAGES)
            + (number(row["ttft_speedup"], 2), _spread(row, "tokens_per_s"), number(row["decode_speedup"], 2))
            + (number(row["overhead_ms"], 1), number(row["gb_per_s"], 1), number(row["ceiling_tokens_per_s"], 1))
            + (share(row["of_ceiling"]),)
            + (number(row["kv_mb"], 1), number(row["peak_mb"]))
        )
    return lines


def _first(row: dict) -> str:
    return _spread(row, "ttft_ms") if row["ttft_ms"] is not None else str(row["status"])


def _spread(row: dict, name: str) -> str:
    """Median with the smallest and the largest value, as text."""
    digits = 0 if name == "ttft_ms" else 1
    if row[name] is None:
        return "-"
    low, high = (number(row[f"{name}_{end}"], digits) for end in ("min", "max"))
    return f"{number(row[name], digits)} ({low} to {high})"


def show(rows: list[dict]) -> str:
    """Table for the screen."""
    return columns(lines_of(rows))


def fill(document: Path, results: Path) -> None:
    """Put the table of `results` into `document`, between the marks of its name (page.put).

    The plot of the same name follows the table if it is in the document's folder.
    """
    rows, name = read_rows(results), results.stem
    put(document, name, f"{made_of(rows)}\n\n{markdown_table(lines_of(rows))}{picture(document, name, PICTURE)}")


def made_of(rows: list[dict]) -> str:
    """One line about how the rows were made."""
    row = rows[0]
    return (
        f"{made(rows)}{bandwidths(rows)}; {row['vision_tokens']:,.0f} vision tokens, {row['text_tokens']:.0f} text tokens, "
        f"{row['layers']:.0f} layers; medians of {row['repeats']:.0f} (smallest to largest)."
    )


def draw(rows: list[dict], path: Path) -> None:
    """Plot two panels per batch and number of new tokens: time to the first token by stage, and tokens per second."""
    cells = list(dict.fromkeys((row["batch"], row["new_tokens"]) for row in rows))
    most = max(sum((row["batch"], row["new_tokens"]) == cell for row in rows) for cell in cells)
    with style():
        figure, axes = panels(len(cells), 2, height=1.0 + 0.42 * most)
        for cell, (left, right) in zip(cells, axes, strict=True):
            here = [row for row in rows if (row["batch"], row["new_tokens"]) == cell]
            names = [f"{row['provider']}: {row['name']}" for row in here]
            _first_token(left, here)
            _decoding(right, here)
            for axis in (left, right):
                axis.set_yticks(range(len(here)), names if axis is left else [""] * len(here))
                axis.invert_yaxis()
                axis.grid(axis="y", visible=False)
            left.set_title(f"time to the first token (ms), batch {cell[0]:.0f}")
            right.set_title(f"decoding (tokens/s), batch {cell[0]:.0f}, {cell[1]:.0f} new tokens")
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper left", ncols=len(STAGES))
        row = rows[0]
        where = f"{row['preset']}, {row['device']}, {row['threads']:.0f} threads, {row['dtype']}, torch {row['torch']}, commit {str(row['commit'])[:12]}."
        save(figure, path, (CAPTION, where))


def _first_token(axis, rows: list[dict]) -> None:
    starts = [0.0] * len(rows)
    for stage, color in zip(STAGES, COLORS, strict=False):
        widths = [row[f"{stage}_ms"] or 0.0 for row in rows]
        axis.barh(range(len(rows)), widths, left=starts, color=color, height=0.62, label=stage.replace("_", " "))
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    _whiskers(axis, rows, "ttft_ms")
    for place, row in enumerate(rows):
        if row["ttft_ms"] is None:
            _note(axis, place, 0, str(row["status"]))
            continue
        times = "" if row["ttft_speedup"] is None else f"  ({row['ttft_speedup']:.2f} x)"
        _note(axis, place, row["ttft_ms_max"], f"{row['ttft_ms']:,.0f}{times}")
    axis.set_xlim(0, 1.28 * max([row["ttft_ms_max"] for row in rows if row["ttft_ms"] is not None], default=1.0))


def _decoding(axis, rows: list[dict]) -> None:
    known = [(place, row) for place, row in enumerate(rows) if row["tokens_per_s"] is not None]
    if not known:
        axis.set_axis_off()
        return
    places, measured = zip(*known, strict=True)
    axis.barh(places, [row["tokens_per_s"] for row in measured], color=COLORS[5], height=0.62)
    _whiskers(axis, rows, "tokens_per_s")
    for place, row in known:
        axis.plot([row["ceiling_tokens_per_s"]] * 2, [place - 0.36, place + 0.36], color="black", linewidth=2.2)
        end = max(row["tokens_per_s_max"], row["ceiling_tokens_per_s"])
        _note(axis, place, end, f"{row['tokens_per_s']:,.1f}, {row['of_ceiling']:.0%} of the ceiling")
    axis.set_xlim(0, 1.55 * max(max(row["tokens_per_s_max"], row["ceiling_tokens_per_s"]) for row in measured))


def _whiskers(axis, rows, name: str) -> None:
    known = [(place, row) for place, row in enumerate(rows) if row[name] is not None]
    ends = ([row[f"{name}_{end}"] for _, row in known] for end in ("min", "max"))
    axis.hlines([place for place, _ in known], *ends, color=INK, linewidth=1.1)


def _note(axis, place: int, x: float, text: str) -> None:
    axis.annotate(text, (x, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)
