"""How entries of the evictable region are ranked: running scores per KV head, from attention that was paid anyway.

Scores lie in the order of the region's slot list (storage.py), newest entry last. The attention of a KV head is the sum
over the query heads that share it. Everything is float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava.methods.attention_rows import RowAttention


@dataclass(frozen=True)
class Scorer(ABC):
    """One way of ranking."""

    # What a decode step does to the scores: the rule of llava/kernels/evict.py.
    rule: ClassVar[str]

    @property
    def kernel_rule(self) -> tuple[str, float]:
        """(rule, quantile) as llava/kernels/evict.py takes them."""
        return self.rule, 0.0

    def rows(self, entries: int) -> int:
        """How many rows of attention `start` reads for so many entries."""
        return entries

    @abstractmethod
    def start(self, attention: RowAttention, heads: int, slots: Tensor) -> Tensor:
        """[G, n]: scores of the prompt's entries at `slots` [n], ascending; heads: G KV heads."""


@dataclass(frozen=True)
class Summed(Scorer):
    """H2O (arXiv 2306.14048): all attention that an entry has received from the queries of the region so far."""

    rule = "summed"

    def start(self, attention: RowAttention, heads: int, slots: Tensor) -> Tensor:
        total = sum(rows.sum(dim=1)[:, slots] for _, rows in attention.chunks(slots))
        return _of_kv_heads(total, heads)


@dataclass(frozen=True)
class Latest(Scorer):
    """The attention that the latest query pays, without history."""

    rule = "latest"

    def rows(self, entries: int) -> int:
        return 1

    def start(self, attention: RowAttention, heads: int, slots: Tensor) -> Tensor:
        ((_, rows),) = attention.chunks(attention.last())
        return _of_kv_heads(rows[:, 0, slots], heads)


@dataclass(frozen=True)
class Centred(Scorer):
    """A-VL's history (arXiv 2409.14846): what an entry receives above the `quantile` of what the region receives.

    An entry starts at the attention that it pays itself; each later query adds what it pays to the entry less the
    quantile (linear between ranks) of what it pays to the entries of the region. As in A-VL's public code these are, for
    a query of the prompt, the older entries alone, and in a decode step all entries, the query's own included.
    """

    rule = "centred"

    quantile: float

    @property
    def kernel_rule(self) -> tuple[str, float]:
        return self.rule, self.quantile

    def start(self, attention: RowAttention, heads: int, slots: Tensor) -> Tensor:
        total = torch.zeros(heads, len(slots), device=slots.device)
        for part, rows in attention.chunks(slots):
            paid = _of_kv_heads(rows[:, :, slots], heads)
            older, own = slots < part[:, None], slots == part[:, None]
            total += (self._above(paid, older.expand_as(paid)) + torch.where(own, paid, 0)).sum(dim=1)
        return total

    def _above(self, paid: Tensor, older: Tensor) -> Tensor:
        """`paid` [..., N] to the older entries less its quantile over them; 0 elsewhere."""
        ranked = paid.masked_fill(~older, float("inf")).sort(dim=-1).values
        rank = self.quantile * (older.sum(dim=-1, keepdim=True) - 1).clamp(min=0).float()
        below = ranked.gather(-1, rank.floor().long())
        above = ranked.gather(-1, rank.ceil().long())
        return torch.where(older, paid - torch.lerp(below, above, rank.frac()), 0)


def _of_kv_heads(values: Tensor, heads: int) -> Tensor:
    """[H, ...] of query heads, summed over those that share one of `heads` KV heads: [G, ...]."""
    return values.unflatten(0, (heads, len(values) // heads)).sum(dim=1)
