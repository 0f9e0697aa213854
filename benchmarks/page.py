"""Puts tables and plots into a page, between a pair of marks that the page has already."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from record import read_csv

from llava.common.errors import UserError
from llava.common.files import REPOSITORY, write_atomically

DOCUMENT = REPOSITORY / "docs" / "performance.md"
COMMITTED = REPOSITORY / "benchmarks" / "results"  # the CSVs behind its tables


def put(document: Path, name: str, body: str) -> None:
    """Replace the text of `document` between `<!-- NAME -->` and `<!-- end of NAME -->`.

    UserError if the document cannot be read or does not have exactly one such pair.
    """
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    try:
        text = document.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{document}: cannot be read ({error})") from None
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise UserError(f"{document}: found no one place for this table, allowed is one {begin} and after it one {end}")
    before, after = text[: text.index(begin)], text[text.index(end) + len(end) :]
    write_atomically(document, f"{before}{begin}\n{body}\n{end}{after}")


def picture(document: Path, name: str, what: str) -> str:
    """Markdown that shows the plot NAME.png if it is in the document's folder, else an empty string."""
    plot = document.with_name(f"{name}.png")
    return f"\n\n![{what}]({plot.name})" if plot.exists() else ""


def made(rows: list[dict]) -> str:
    """How the rows of a file were made, as one line without a full stop: commands, commit, time, hardware, versions.

    Everything except the commands is taken from the first row. Without `threads` in it, none are named.
    """
    row, commands = rows[0], dict.fromkeys(f"`{row['command']}`" for row in rows)
    threads = "" if row["threads"] is None else f"{row['threads']:.0f} threads, "
    return (
        f"{' and '.join(commands)} at commit {str(row['commit'])[:12]}, {row['written']}: {row['device']}, "
        f"{threads}{row['dtype']}, torch {row['torch']}, transformers {row['transformers']}"
    )


def bandwidths(rows: list[dict]) -> str:
    """Memory bandwidths of the run, as text that continues made()."""
    figures = (("a copy moves", "copy_gb_per_s"), ("reading alone goes at", "read_gb_per_s"))
    known = ((what, [row[name] for row in rows if row.get(name) is not None]) for what, name in figures)
    return "".join(f", {what} {max(values):,.1f} GB/s" for what, values in known if values)


def number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def put_results(
    document: Path, mark: str, results: list[Path], column: str, table: Callable[[list[dict]], str]
) -> None:
    """Put the tables of several CSVs into `document`, one after another, between the marks `mark`.

    column: a column that the CSVs have. table: function from the rows of a CSV to its table, with a line about it.
    """
    put(document, mark, "\n\n".join(table(read_csv(path, column)) for path in results))
