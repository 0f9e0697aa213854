"""The published tables of AdaV: seven benchmarks, and the mean of their ratios to the unpruned model.

published_tables.csv has every row of both tables as printed in the README of JiayiV/AdaV on GitHub (ACL Findings 2025,
paper 258). The table of LLaVA-1.5-7B is in an earlier version of that README, the one of LLaVA-1.6-7B in the newest.
The authors measured these numbers with their code; this project did not.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("published_tables.csv")
# Benchmark -> its column in published_tables.csv. Tables print the name with a hyphen for the underscore.
COLUMNS = {
    "gqa": "GQA",
    "sqa": "SQA_IMG",
    "textvqa": "TextVQA",
    "pope": "POPE",
    "mme": "MME",
    "mmbench": "MMB",
    "mmvet": "MM_Vet",
}
TABLE = tuple(COLUMNS)


@dataclass(frozen=True)
class PublishedRow:
    """One row of a published table.

    tokens: vision tokens per image. scores: benchmark -> percent, or points for MME. average: as printed, in percent.
    """

    model: str
    method: str
    tokens: int
    scores: dict[str, float]
    average: float

    @property
    def unpruned(self) -> bool:
        return self.method == "none"


def published_rows() -> list[PublishedRow]:
    """Return all rows of both tables, in their order."""
    with open(FILE, encoding="utf-8", newline="") as file:
        return [
            PublishedRow(
                row["model"],
                row["method"],
                int(row["tokens"]),
                {name: float(row[column]) for name, column in COLUMNS.items()},
                float(row["average_printed"]),
            )
            for row in csv.DictReader(file)
        ]


def published_models() -> list[str]:
    """Return the names of the models that have a published table."""
    return list(dict.fromkeys(row.model for row in published_rows()))


def average(scores: dict[str, float], unpruned: dict[str, float]) -> tuple[float, int] | None:
    """Return (mean of the ratios to the unpruned model in percent, number of columns); None without a common column.

    The mean is over the columns that both have. A mean over fewer than all columns is another quantity, so callers
    print the number of columns beside it.
    """
    # Ratios and not scores: MME's points are many times larger than the percentages, and would decide a plain mean.
    ratios = [scores[name] / unpruned[name] for name in TABLE if name in scores and unpruned.get(name)]
    return (100 * sum(ratios) / len(ratios), len(ratios)) if ratios else None
