"""What is shown of the rows of benchmarks/end_to_end.py: a table on the screen and in Markdown, and a plot."""

from __future__ import annotations

import csv
from pathlib import Path

from llava.errors import UserError
from llava.eval.files import REPOSITORY, write_atomically
from llava.eval.plots import COLORS, INK, panels, save, style
from llava.eval.tables import columns, markdown_table

DOCUMENT = REPOSITORY / "docs" / "performance.md"
STAGES = ("vision_tower", "projector", "selection", "prefill")
CAPTION = (
    "Medians of interleaved repetitions on shared random weights; whiskers go from the fastest repetition to the slowest. "
    "Left: from pixels to the first token of every row. Right: every token after the first; the black mark is the ceiling, the bytes that "
    "this configuration reads per step over the measured bandwidth of a copy."
)


def read_csv(path: Path) -> list[dict]:
    """Rows of a results file: numbers where a cell is one, None where it is empty."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [{name: _value(cell) for name, cell in row.items()} for row in csv.DictReader(file)]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not rows or "ttft_ms" not in rows[0]:
        raise UserError(f"{path}: found no rows with a column ttft_ms, allowed is what benchmarks/end_to_end.py writes")
    return rows


def _value(cell: str):
    if cell == "":
        return None
    try:
        return float(cell)
    except ValueError:
        return cell


def _lines(rows: list[dict]) -> list[tuple[str, ...]]:
    head = ("provider", "reads", "batch", "new", "first token ms", "tower", "projector", "selection", "prefill", "x")
    head += ("tokens/s", "x", "overhead ms", "GB/s", "ceiling", "reached", "KV MB", "peak MB")
    lines = [head]
    for row in rows:
        batch = f"{row['batch']:.0f}" + ("" if row["at_once"] == row["batch"] else " x 1")
        lines.append(
            (row["provider"], row["name"], batch, f"{row['new_tokens']:.0f}", _spread(row, "ttft_ms"))
            + tuple(_number(row[f"{stage}_ms"]) for stage in STAGES)
            + (_number(row["ttft_speedup"], 2), _spread(row, "tokens_per_s"), _number(row["decode_speedup"], 2))
            + (_number(row["overhead_ms"], 1), _number(row["gb_per_s"], 1), _number(row["ceiling_tokens_per_s"], 1))
            + ("-" if row["of_ceiling"] is None else f"{row['of_ceiling']:.0%}",)
            + (_number(row["kv_mb"], 1), _number(row["peak_mb"]))
        )
    return lines


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _spread(row: dict, name: str) -> str:
    """Median, and the smallest and largest."""
    digits = 0 if name == "ttft_ms" else 1
    if row[name] is None:
        return "-"
    low, high = (_number(row[f"{name}_{end}"], digits) for end in ("min", "max"))
    return f"{_number(row[name], digits)} ({low} to {high})"


def show(rows: list[dict]) -> str:
    """The table that is printed."""
    return columns(_lines(rows))


def fill(document: Path, results: Path) -> None:
    """Put the table of `results` into `document`, between its own pair of marks: `<!-- NAME -->`, `<!-- end of NAME -->`,
    and the plot of that name where one lies beside the document."""
    rows, name = read_csv(results), results.stem
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    try:
        text = document.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{document}: cannot be read ({error})") from None
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise UserError(f"{document}: found no one place for this table, allowed is one {begin} and after it one {end}")
    before, after = text[: text.index(begin)], text[text.index(end) + len(end) :]
    plot = document.with_name(f"{name}.png")
    picture = (
        f"\n![Time to the first token by stage, and decoding beside its ceiling]({plot.name})\n"
        if plot.exists()
        else ""
    )
    table = markdown_table(_lines(rows))
    write_atomically(document, f"{before}{begin}\n{_made(rows[0])}\n\n{table}\n{picture}{end}{after}")


def _made(row: dict) -> str:
    """How the rows were made, in one line."""
    copy = "" if row["copy_gb_per_s"] is None else f", a copy moves {row['copy_gb_per_s']:,.1f} GB/s"
    return (
        f"`{row['command']}` at commit {str(row['commit'])[:12]}, {row['written']}: {row['device']}, "
        f"{row['threads']:.0f} threads, {row['dtype']}, torch {row['torch']}, transformers {row['transformers']}{copy}; "
        f"{row['vision_tokens']:,.0f} vision tokens, {row['text_tokens']:.0f} text tokens, "
        f"{row['layers']:.0f} layers; medians of {row['repeats']:.0f} (smallest to largest)."
    )


def draw(rows: list[dict], path: Path) -> None:
    """A pair of panels for every batch and length: time to the first token by stage, and tokens per second."""
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
        made = f"{row['preset']}, {row['device']}, {row['threads']:.0f} threads, {row['dtype']}, torch {row['torch']}, commit {str(row['commit'])[:12]}."
        save(figure, path, (CAPTION, made))


def _first_token(axis, rows: list[dict]) -> None:
    starts = [0.0] * len(rows)
    for stage, color in zip(STAGES, COLORS, strict=False):
        widths = [row[f"{stage}_ms"] for row in rows]
        axis.barh(range(len(rows)), widths, left=starts, color=color, height=0.62, label=stage.replace("_", " "))
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    _whiskers(axis, rows, "ttft_ms")
    for place, row in enumerate(rows):
        times = "" if row["ttft_speedup"] is None else f"  ({row['ttft_speedup']:.2f} x)"
        _note(axis, place, row["ttft_ms_max"], f"{row['ttft_ms']:,.0f}{times}")
    axis.set_xlim(0, 1.28 * max(row["ttft_ms_max"] for row in rows))


def _decoding(axis, rows: list[dict]) -> None:
    known = [(place, row) for place, row in enumerate(rows) if row["tokens_per_s"] is not None]
    if not known:
        axis.set_axis_off()
        return
    places, rows = zip(*known, strict=True)
    axis.barh(places, [row["tokens_per_s"] for row in rows], color=COLORS[5], height=0.62)
    _whiskers(axis, rows, "tokens_per_s", places)
    for place, row in known:
        axis.plot([row["ceiling_tokens_per_s"]] * 2, [place - 0.36, place + 0.36], color="black", linewidth=2.2)
        end = max(row["tokens_per_s_max"], row["ceiling_tokens_per_s"])
        _note(axis, place, end, f"{row['tokens_per_s']:,.1f}, {row['of_ceiling']:.0%} of the ceiling")
    axis.set_xlim(0, 1.55 * max(max(row["tokens_per_s_max"], row["ceiling_tokens_per_s"]) for row in rows))


def _whiskers(axis, rows, name: str, places=None) -> None:
    places = range(len(rows)) if places is None else places
    axis.hlines(
        places, [row[f"{name}_min"] for row in rows], [row[f"{name}_max"] for row in rows], color=INK, linewidth=1.1
    )


def _note(axis, place: int, x: float, text: str) -> None:
    axis.annotate(text, (x, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)
