"""Scorers: they rank the entries of the evictable region by running scores per KV head, from attention.

Scores are in the order of the region's slot list (llava/model/decoding/layer_cache.py), newest entry last. The
attention of a KV head is the sum over the query heads that share it. All scores are float32.
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
    """Base of every scorer: `start` gives the scores after prefill, `rule` says how decode steps update them."""

    # How a decode step updates the scores: a rule of llava/kernels/evict.py.
    rule: ClassVar[str]

    @property
    def kernel_rule(self) -> tuple[str, float]:
        """(rule, quantile) in the form that llava/kernels/evict.py takes."""
        return self.rule, 0.0

    def rows(self, entries: int) -> int:
        """Return how many attention rows `start` reads for that many entries."""
        return entries

    @abstractmethod
    def start(self, attention: RowAttention, heads: int, slots: Tensor) -> Tensor:
        """Return the scores [G, n] of the prompt's entries at `slots` [n], ascending; heads: G, the KV heads."""


@dataclass(frozen=True)
class Summed(Scorer):
    """H2O (arXiv 2306.14048): the sum of the attention that an entry has received from the region's queries so far."""

    rule = "summed"

    def start(self, attention: RowAttention, heads: int, slots: Tensor) -> Tensor:
        total = sum(rows.sum(dim=1)[:, slots] for _, rows in attention.chunks(slots))
        return _of_kv_heads(total, heads)


@dataclass(frozen=True)
class Latest(Scorer):
    """The attention from the latest query, without history."""

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
        """Return the attention `paid` [..., N] to the older entries minus its quantile over them; 0 elsewhere."""
        # Not torch.quantile: the number of older entries differs from row to row. Infinity sorts the others to the end.
        ranked = paid.masked_fill(~older, float("inf")).sort(dim=-1).values
        rank = self.quantile * (older.sum(dim=-1, keepdim=True) - 1).clamp(min=0).float()
        below = ranked.gather(-1, rank.floor().long())
        above = ranked.gather(-1, rank.ceil().long())
        return torch.where(older, paid - torch.lerp(below, above, rank.frac()), 0)


def _of_kv_heads(values: Tensor, heads: int) -> Tensor:
    """Sum values [H, ...] of query heads over those that share one of `heads` KV heads: return [G, ...]."""
    return values.unflatten(0, (heads, len(values) // heads)).sum(dim=1)
