"""Attention rows on request: computed from queries and keys of one sequence, a few rows or a chunk of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

CHUNK = 2**24  # attention values that are held at once, over all heads (64 MB in float32)


class RowAttention:
    """Post-softmax attention of one sequence (one row of a batch, without its padding) in one layer.

    query [H, Q, d]: of the last Q slots, rotated; key [G, S, d]: of all slots, rotated, G KV heads; scaling: as the
    layer's. Causal: the query of slot i sees the keys of slots 0..i. Everything is computed in float32.
    """

    def __init__(self, query: Tensor, key: Tensor, scaling: float, chunk: int = CHUNK):
        self._query, self._stored_key = query, key
        self._scaling, self._chunk = scaling, chunk
        self.length = key.shape[1]
        self._first = self.length - query.shape[1]

    @cached_property
    def _key(self) -> Tensor:
        return self._stored_key.float()

    def chunks(self, slots: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Attention rows of the queries of `slots` [R], a chunk at a time: (r of the slots, [H, r, S])."""
        heads, slots = self._query.shape[0], slots.to(self._query.device)
        for part in slots.split(max(1, self._chunk // (heads * self.length))):
            yield part, self._rows(part)

    def _rows(self, slots: Tensor) -> Tensor:
        groups, size = self._key.shape[0], self._key.shape[-1]
        heads = self._query.shape[0]
        query = self._query[:, slots - self._first].float().reshape(groups, -1, size)
        scores = (query @ self._key.transpose(-1, -2) * self._scaling).view(heads, len(slots), self.length)
        future = torch.arange(self.length, device=slots.device) > slots[:, None]
        return scores.masked_fill_(future, float("-inf")).softmax(dim=-1)

    def last(self) -> Tensor:
        """[1]: the slot of the last query. Filled on the device: a number that is sent there would wait for it."""
        return torch.full((1,), self.length - 1, device=self._query.device)

    def mean(self, slots: Tensor) -> Tensor:
        """[S]: mean over heads and over the queries of `slots` [R]."""
        total = sum(rows.mean(dim=0).sum(dim=0) for _, rows in self.chunks(slots))
        return total / len(slots)

    def head_max_sum(self, slots: Tensor) -> Tensor:
        """[S]: the maximum over heads, summed over the queries of `slots` [R]."""
        return sum(rows.amax(dim=0).sum(dim=0) for _, rows in self.chunks(slots))
