"""Files of a comparison: compare.csv, and the table of compare.md."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from llava.common.errors import UserError
from llava.common.files import write_atomically
from llava.common.text_table import markdown_table

SPLIT = "downsample"  # the method whose answers split the questions into two groups (arXiv 2510.07143)

OWN_CAVEAT = """\
How to read it: intervals are 95 % bootstrap intervals over images: questions about one image are drawn together. They cover
the draw of the questions. They do not cover other questions, other prompts, or the training of the checkpoint."""

READS_COSINES = "t2i, mix, adav, adav_cover, adav_zoom, cdpruner, mmtok"
CAVEAT = f"""\
How to read it: the demo favours methods that read the question ({READS_COSINES}). The
demo checkpoints were trained with a loss on the cosine between patches and words, which these methods read. No real LLaVA was
trained with such a loss. The comparison shows that the pipeline works, and what pruning costs on this task. It does not show
which method is better on real data. Intervals are 95 % bootstrap intervals over images: questions about one image are drawn
together. They describe this checkpoint and this task only."""

# Columns with text. All other columns of compare.csv are numbers.
_TEXT = (
    *("checkpoint", "method", "seed", "options", "configuration", "run", "commit", "code"),
    *("python", "torch", "transformers", "numpy", "benchmark", "headline"),
)
# Columns before and after those of the kinds of questions.
_FIRST = (
    *("checkpoint", "method", "budget_percent", "budget_tokens", "seed", "questions", "pictures"),
    *("accuracy", "accuracy_low", "accuracy_high", "accuracy_worst_seed", "accuracy_best_seed"),
    *("difference", "difference_low", "difference_high"),
    *(f"{SPLIT}_{group}_{of}" for group in ("right", "wrong") for of in ("questions", "accuracy", "low", "high")),
    *("tokens_before", "tokens_after", "layer_mean", "prefill_flops", "kv_bytes"),
)
_LAST = _TEXT[3:]
# Columns that table and plot need. They must not be empty in any row.
_ALWAYS = (
    "checkpoint",
    "method",
    "questions",
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "layer_mean",
    "prefill_flops",
)


def write_rows(rows: list[dict], path: Path) -> None:
    """Write compare.csv. Accuracies are shares from 0 to 1; a field is empty if the number does not apply."""
    categories = sorted({name for row in rows for name in row} - {*_FIRST, *_LAST})
    text = io.StringIO()
    writer = csv.DictWriter(text, [*_FIRST, *categories, *_LAST], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: round(v, 6) if isinstance(v, float) else v for name, v in row.items()})
    write_atomically(path, text.getvalue())


def column_of(kind: str) -> str:
    """Return the column of the accuracy of one kind of questions."""
    name = f"accuracy_{kind}"
    return f"accuracy_of_{kind}" if name in _FIRST else name


def caveat(rows: list[dict]) -> str:
    """Return what a reader of the table has to know."""
    return CAVEAT if on_demo(rows) else OWN_CAVEAT


def on_demo(rows: list[dict]) -> bool:
    """Return whether the rows are of the demo task. Files from before there was another task do not name theirs."""
    return rows[0].get("benchmark") in (None, "shapes")


def read_rows(path: Path) -> list[dict]:
    """Return the rows of a compare.csv: text or float per field, None for an empty one.

    Raises UserError if the file is missing or is no compare.csv.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            for name, value in row.items():
                row[name] = None if value == "" else value if name in _TEXT else float(value)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a comparison without --plot-only writes it") from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: is no compare.csv ({error})") from None
    if not rows or any(row.get(name) is None for row in rows for name in _ALWAYS):
        raise UserError(f"{path}: is no compare.csv, allowed is one row or more with {', '.join(_ALWAYS)}")
    return rows


def summary(rows: list[dict]) -> list[dict]:
    """Return one row per checkpoint, method and budget: a row of a mean over seeds replaces those of its seeds."""
    drawn = {_place(row) for row in rows if row["seed"] == "mean"}
    return [row for row in rows if row["seed"] == "mean" or _place(row) not in drawn]


def _place(row: dict) -> tuple:
    return row["checkpoint"], row["method"], row["budget_percent"]


def markdown(rows: list[dict]) -> str:
    """Return one table per checkpoint in Markdown: first the ends of the scale, then by budget, best accuracy first."""
    rows, parts = summary(rows), []
    for checkpoint in dict.fromkeys(row["checkpoint"] for row in rows):
        here = [row for row in rows if row["checkpoint"] == checkpoint]
        here.sort(key=lambda row: (-(row["budget_percent"] or 100), -row["accuracy"]))
        flops = next((row["prefill_flops"] for row in here if row["method"] == "none"), float("nan"))
        parts.append(
            f"**{checkpoint}**, {here[0]['questions']:.0f} questions about {here[0]['pictures']:.0f} pictures\n\n"
            + markdown_table([_head(here[0]), *(_line(row, flops) for row in here)])
        )
        split = [row for row in here if row.get(f"{SPLIT}_right_questions") is not None]
        if split:
            parts.append(f"{_SPLIT_TEXT}\n\n" + markdown_table([_SPLIT_HEAD, *map(_split_line, split)]))
    return "\n\n".join(parts)


def shown_headline(name: str) -> str:
    """Return the name of a score as tables and plots print it: accuracy, mean F1, ANLS."""
    return name.upper() if name == "anls" else name.replace("_", " ")


def headline_of(row: dict) -> str:
    """Return the name of the score of a row."""
    return shown_headline(row.get("headline") or "accuracy")


def _head(row: dict) -> tuple[str, ...]:
    return (
        *("budget", "method", f"{headline_of(row)} [95 %]", "minus adav [95 %]"),
        *("tokens into the LLM", "layer mean", "prefill FLOPs", "KV cache"),
    )


_SPLIT_TEXT = (
    f"The same, split by the answers of `{SPLIT}` at the same budget. It answers the questions of one group right and those of "
    "the other wrong, so its own accuracies are 100 and 0."
)
_SPLIT_HEAD = ("budget", "method", f"{SPLIT} right [95 %]", "questions", f"{SPLIT} wrong [95 %]", "questions")


def _split_line(row: dict) -> tuple[str, ...]:
    """Return the cells of a row of the split."""
    cells = list(_line(row, 1.0)[:2])
    for group in ("right", "wrong"):
        name = f"{SPLIT}_{group}"
        ends = [row.get(f"{name}_{of}") for of in ("accuracy", "low", "high")]
        cells.append("" if None in ends else "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * end for end in ends)))
        cells.append(f"{row[f'{name}_questions']:.0f}")
    return tuple(cells)


def _line(row: dict, whole: float) -> tuple[str, ...]:
    """Return the cells of a row. whole: FLOPs of `none`, which the column of FLOPs is relative to."""
    seed = {None: "", "mean": ", mean of seeds"}.get(row["seed"], f", seed {row['seed']}")
    against = row["difference"] is not None and row["method"] != "adav"
    return (
        "" if row["budget_percent"] is None else f"{row['budget_percent']:g} %",
        row["method"] + seed,
        _interval(row, "accuracy", "{:.1f} [{:.1f}, {:.1f}]"),
        _interval(row, "difference", "{:+.1f} [{:+.1f}, {:+.1f}]") if against else "",
        f"{row['tokens_after']:.1f}",
        f"{row['layer_mean']:.1f}",
        f"{100 * row['prefill_flops'] / whole:.1f} %",
        f"{row['kv_bytes'] / 1000:,.0f} kB",
    )


def _interval(row: dict, name: str, text: str) -> str:
    """Return value, low and high of a column in percent, in the format `text`."""
    return text.format(*(100 * row[name + end] for end in ("", "_low", "_high")))
