"""The published tables of AdaV: seven benchmarks, and the mean of their ratios to the unpruned model.

published_tables.csv has every row of both tables as printed in the README of JiayiV/AdaV on GitHub (ACL Findings 2025,
paper 258): LLaVA-1.5-7B in an earlier version of it, LLaVA-1.6-7B in the newest. They are numbers of the authors, made with
their code; this project did not measure them.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("published_tables.csv")
# Benchmark -> its column in published_tables.csv; how tables print it is the same with a hyphen.
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
    """scores: benchmark -> percent, or points for MME. tokens: vision tokens per image; average as printed."""

    model: str
    method: str
    tokens: int
    scores: dict[str, float]
    average: float

    @property
    def unpruned(self) -> bool:
        return self.method == "none"


def published_rows() -> list[PublishedRow]:
    """All rows of both tables, in their order."""
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
    return list(dict.fromkeys(row.model for row in published_rows()))


def average(scores: dict[str, float], unpruned: dict[str, float]) -> tuple[float, int] | None:
    """Mean in percent of the ratios to the unpruned model, over the columns that both have, and how many those are.

    None where there is no such column. A mean over fewer than all columns is another quantity: say so beside it.
    """
    ratios = [scores[name] / unpruned[name] for name in TABLE if name in scores and unpruned.get(name)]
    return (100 * sum(ratios) / len(ratios), len(ratios)) if ratios else None
