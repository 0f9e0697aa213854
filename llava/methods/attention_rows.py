"""Attention rows of one sequence, computed on request from its queries and keys.

Fused attention kernels return no probabilities, and output_attentions would store all S x S of them per layer. Methods
that score tokens by attention need only a few rows, or sums over rows. These are computed here in chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

CHUNK = 2**24  # most attention values in memory at a time, over all heads (64 MB in float32)


class RowAttention:
    """Post-softmax attention of one layer over one sequence (one batch row without its padding).

    query: [H, Q, d], queries of the last Q slots, after the rotary embedding
    key: [G, S, d], keys of all S slots, after the rotary embedding; G KV heads
    scaling: the scaling factor of the layer's attention
    chunk: most attention values that are in memory at a time

    Attention is causal: the query of slot i sees the keys of slots 0 .. i. All results are float32.
    """

    def __init__(self, query: Tensor, key: Tensor, scaling: float, chunk: int = CHUNK):
        self._query, self._stored_key = query, key
        self._scaling, self._chunk = scaling, chunk
        self.length = key.shape[1]
        self._first = self.length - query.shape[1]

    @cached_property
    def _key(self) -> Tensor:
        # Cast once and only when a row is asked for: every chunk multiplies with all keys.
        return self._stored_key.float()

    def chunks(self, slots: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the attention rows of the queries of `slots` [R] in chunks: (r of the slots, rows [H, r, S])."""
        heads, slots = self._query.shape[0], slots.to(self._query.device)
        for part in slots.split(max(1, self._chunk // (heads * self.length))):
            yield part, self._rows(part)

    def _rows(self, slots: Tensor) -> Tensor:
        groups, size = self._key.shape[0], self._key.shape[-1]
        heads = self._query.shape[0]
        # The query heads of one KV head become rows of one product, so keys are not repeated per query head.
        query = self._query[:, slots - self._first].float().reshape(groups, -1, size)
        scores = (query @ self._key.transpose(-1, -2) * self._scaling).view(heads, len(slots), self.length)
        future = torch.arange(self.length, device=slots.device) > slots[:, None]
        return scores.masked_fill_(future, float("-inf")).softmax(dim=-1)

    def last(self) -> Tensor:
        """Return the slot of the last query, [1]."""
        # torch.full fills on the device. A tensor made from a Python number is copied there, which waits for the GPU.
        return torch.full((1,), self.length - 1, device=self._query.device)

    def key_norms(self) -> Tensor:
        """Return the L1 norm of each slot's keys, summed over the query heads, [S]."""
        return self._key.abs().sum(dim=(0, 2)) * (self._query.shape[0] // self._key.shape[0])

    def mean(self, slots: Tensor) -> Tensor:
        """Return the attention that each slot receives, [S]: mean over heads and over the queries of `slots` [R]."""
        total = sum(rows.mean(dim=0).sum(dim=0) for _, rows in self.chunks(slots))
        return total / len(slots)

    def head_max_sum(self, slots: Tensor) -> Tensor:
        """Return the maximum over heads of each slot's attention, summed over the queries of `slots` [R]: [S]."""
        return sum(rows.amax(dim=0).sum(dim=0) for _, rows in self.chunks(slots))
