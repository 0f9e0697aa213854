"""The tensors of one KV cache: all layers in few allocations, with sizes that are known before prefill.

Keys and values of all layers are in one allocation, with a capacity per layer. Consecutive layers of equal sizes form a
run. One operation fills the slots or lists of a run. Numbers that only the host knows go to the device in one copy per
request. A captured CUDA graph refers to these tensors by address, so the same tensors serve one request after another.

Letters: L layers, B rows, G KV heads, C slots of a layer, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from llava.methods.kv_cache.base import CachePolicy, LayerPlan, budgets, rounded_up


class LayerSizes(NamedTuple):
    """Sizes of one layer: slots per row, and entries of the lists of vision slots, core slots and evictable slots."""

    slots: int
    image: int
    core: int
    text: int


@dataclass(frozen=True)
class CacheLayout:
    """Sizes and initial values of the tensors of one batch. Two caches with equal `key` fit the same tensors.

    plans: [L][B]; steps: decode steps that there is room for; multiple: slots and lists are rounded up to it
    numbering: [L] index of the shift that is subtracted from a layer's positions
    """

    policy: CachePolicy
    plans: tuple[tuple[LayerPlan, ...], ...]
    steps: int
    multiple: int
    numbering: tuple[int, ...]

    @property
    def batch(self) -> int:
        return len(self.plans[0])

    @property
    def sizes(self) -> tuple[LayerSizes, ...]:
        # Most layers share one tuple of plans. The identity of the tuple is a cheap key, so each is computed once.
        known: dict[int, LayerSizes] = {}
        for plans in self.plans:
            if id(plans) not in known:
                known[id(plans)] = self._sizes(plans)
        return tuple(known[id(plans)] for plans in self.plans)

    def _sizes(self, plans: Sequence[LayerPlan]) -> LayerSizes:
        def most(counts) -> int:
            return rounded_up(max(counts), self.multiple)

        return LayerSizes(
            most(plan.slots(self.steps) for plan in plans),
            most(plan.image for plan in plans),
            most(plan.core for plan in plans),
            0 if self.policy.contiguous else most(plan.text_slots(self.steps) for plan in plans),
        )

    @property
    def table_of(self) -> tuple[int, ...]:
        """[L] index of the budget table of each layer. Layers with equally many evictable prompt tokens share one."""
        if self.policy.scorer is None:
            return (0,) * len(self.plans)
        numbers: dict[tuple, int] = {}
        return tuple(numbers.setdefault(_prompts(plans), len(numbers)) for plans in self.plans)

    @property
    def key(self) -> tuple:
        """Everything that shapes and captured steps depend on."""
        return self.policy, self.batch, self.steps, self.sizes, self.table_of, self.numbering

    def counts(self) -> Tensor:
        """Return the numbers of entries per region, int32 [4, L, B] on the host.

        The regions are: entries that every step reads, stored vision entries, core entries, evictable entries. A
        contiguous layer has only the first, which counts all of its entries.
        """
        rows: dict[int, list] = {}
        for plans in self.plans:
            if id(plans) not in rows:
                rows[id(plans)] = [self._counts(plan) for plan in plans]
        return torch.tensor([rows[id(plans)] for plans in self.plans], dtype=torch.int32).permute(2, 0, 1)

    def _counts(self, plan: LayerPlan) -> tuple[int, int, int, int]:
        if self.policy.contiguous:
            return plan.front + plan.text(0), 0, 0, 0
        return plan.front, plan.image, plan.core, plan.text(0)

    def tables(self) -> Tensor:
        """Return the budget tables, int32 [U, 2, B, 1 + steps] on the host.

        They hold the size of the evictable region and of its protected part after each step, for each of the U kinds of
        layers (`table_of`). They are empty for a policy that evicts nothing.
        """
        if self.policy.scorer is None:
            return torch.empty(0, 2, self.batch, 1 + self.steps, dtype=torch.int32)
        kinds = dict.fromkeys(_prompts(plans) for plans in self.plans)
        tables = torch.tensor([[budgets(self.policy, prompt, self.steps) for prompt in kind] for kind in kinds])
        return tables.permute(0, 3, 1, 2).to(torch.int32)


def _prompts(plans: Sequence[LayerPlan]) -> tuple[int, ...]:
    return tuple(plan.prompt for plan in plans)


class Run:
    """Tensors of L consecutive layers of equal sizes.

    kv [2, L, B, G, C, d]: keys and values
    image [L, B, N], core [L, B, M], text [L, B, G, T]: int32 lists of slots
    scores float32 [L, B, G, T]: of the evictable entries; None where they are not ranked
    """

    def __init__(self, sizes: LayerSizes, first: int, count: int, kv: Tensor, batch: int, ranked: bool):
        self.sizes, self.layers = sizes, range(first, first + count)
        heads, device = kv.shape[3], kv.device
        ints = {"dtype": torch.int32, "device": device}
        self.kv = kv
        self.image = torch.empty(count, batch, sizes.image, **ints)
        self.core = torch.empty(count, batch, sizes.core, **ints)
        self.text = torch.empty(count, batch, heads, sizes.text, **ints)
        # Zeros: scores behind the live entries must be 0 (llava/kernels/evict.py).
        self.scores = torch.zeros(self.text.shape, dtype=torch.float32, device=device) if ranked else None

    def tensors(self) -> list[Tensor]:
        """Return all tensors of the run."""
        return [tensor for tensor in (self.kv, self.image, self.core, self.text, self.scores) if tensor is not None]

    def begin(self, counts: Tensor) -> None:
        """Fill the lists with their initial slots, in the order front, image, evictable. counts [4, L, B]."""
        slots = torch.arange(max(self.sizes), dtype=torch.int32, device=counts.device)
        front, image, _, _ = counts
        last = self.sizes.slots - 1  # list entries behind a row's own are never read, but must be valid slots
        if self.sizes.image:
            self.image.copy_((front[..., None] + slots[: self.sizes.image]).clamp_(max=last))
            self.core.copy_(self.image[..., : self.sizes.core])
        if self.sizes.text:
            behind = (front + image)[..., None, None]
            self.text.copy_((behind + slots[: self.sizes.text]).clamp_(max=last))


class CacheTensors:
    """All tensors that the decode steps of a batch read and change. They are allocated once and never moved.

    kv: the one allocation of all keys and values
    front_len, image_len, core_len int32 [L, B]; text_len int32 [L, B, G]: entries per region
    tables int32 [U, 2, B, 1 + steps]: see CacheLayout.tables
    positions int64 [B, 1]: of the newest token, counted in the whole prompt
    shifts int64 [N, B, 1]: see AdaptiveCache.end_prefill
    step int64 [1]: decode steps so far

    like: keys [B, G, S, d] of the batch in prefill; they give dtype, device, heads and head size
    """

    def __init__(self, layout: CacheLayout, like: Tensor):
        # 1. Keys and values: one allocation, split into runs.
        self.key = layout.key
        batch, heads, _, size = like.shape
        device, layers = like.device, len(layout.plans)
        self.dtype, ranked = like.dtype, layout.policy.scorer is not None
        groups = [(sizes, len(list(same))) for sizes, same in groupby(layout.sizes)]
        numbers = [2 * count * batch * heads * sizes.slots * size for sizes, count in groups]
        self.kv = like.new_empty(sum(numbers))
        self.runs: list[Run] = []
        for (sizes, count), part in zip(groups, self.kv.split(numbers), strict=True):
            kv = part.view(2, count, batch, heads, sizes.slots, size)
            first = self.runs[-1].layers.stop if self.runs else 0
            self.runs.append(Run(sizes, first, count, kv, batch, ranked))
        # 2. Counts and tables: one tensor, filled from a pinned buffer, because other copies are not asynchronous.
        self._counts_shape = (4, layers, batch)
        self._tables_shape = (len(set(layout.table_of)) if ranked else 0, 2, batch, 1 + layout.steps)
        self._host = torch.empty(prod(self._counts_shape) + prod(self._tables_shape), dtype=torch.int32)
        if device.type == "cuda":
            self._host = self._host.pin_memory()
        ints = self._host.to(device, copy=True)
        counts, tables = ints.split([prod(self._counts_shape), prod(self._tables_shape)])
        self._ints, self._counts, self.tables = ints, counts.view(self._counts_shape), tables.view(self._tables_shape)
        self.front_len, self.image_len, self.core_len = self._counts[:3].unbind()
        # 3. Counters that the device advances.
        self.text_len = torch.empty(layers, batch, heads, dtype=torch.int32, device=device)
        longs = {"dtype": torch.long, "device": device}
        self.positions = torch.zeros(batch, 1, **longs)
        self.shifts = torch.zeros(1 + max(layout.numbering), batch, 1, **longs)
        self.step = torch.zeros(1, **longs)
        # The region that new entries enter. A contiguous layer has no lists, so its front grows.
        self._grows = self.front_len if layout.policy.contiguous else self.text_len
        self._copied: torch.cuda.Event | None = None
        self.table_of = layout.table_of

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        small = [self._ints, self.text_len, self.positions, self.shifts, self.step]
        return sum(t.nbytes for run in self.runs for t in run.tensors()) + sum(t.nbytes for t in small)

    def begin(self, layout: CacheLayout, positions: Tensor) -> None:
        """Start a request: fill in its counts, lists and tables. positions [B, 1]: of each row's last prompt token."""
        if self._copied is not None:
            self._copied.synchronize()  # the copy of an earlier request may still be reading this buffer
        self._host.copy_(torch.cat([layout.counts().flatten(), layout.tables().flatten()]))
        self._ints.copy_(self._host, non_blocking=True)
        if self._ints.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()
        self.text_len.copy_(self._counts[3][..., None].expand_as(self.text_len))
        for run in self.runs:
            run.begin(self._counts[:, run.layers.start : run.layers.stop])
        self.positions.copy_(positions)
        self.shifts.zero_()
        self.step.zero_()

    def advance(self) -> Tensor:
        """Begin a decode step on the device: every layer gets one more entry per row.

        Returns the positions [N, B, 1] of the new tokens, one for each of the N ways in which layers count them.
        """
        # In place: a CUDA graph replays on the same addresses.
        self._grows += 1
        self.step += 1
        self.positions += 1
        return self.positions - self.shifts

    def of_layer(self, layer: int) -> dict[str, Tensor]:
        """Return the views of one layer, by their names in LayerCache."""
        run = next(run for run in self.runs if layer in run.layers)
        at = layer - run.layers.start
        found = {"keys": run.kv[0, at], "values": run.kv[1, at]}
        found |= {"front_len": self.front_len[layer], "image_len": self.image_len[layer]}
        found |= {"core_len": self.core_len[layer], "text_len": self.text_len[layer]}
        found |= {"image": run.image[at], "core": run.core[at], "text": run.text[at]}
        if run.scores is not None:
            total, recent = self.tables[self.table_of[layer]]
            found |= {"scores": run.scores[at], "total": total, "recent": recent, "step": self.step}
        return found
