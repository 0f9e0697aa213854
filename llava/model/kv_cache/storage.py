"""One layer's stored keys and values: slots that are filled once, and int32 lists of those that a step reads.

Slots of a row: [front | image entries that stay, in order | evictable region]. Storage and lists are allocated when the
layer has been prefilled, for a known number of decode steps; a step writes one entry and rewrites lists and counters in
place, so it needs no copy of the cache, no allocation that lasts, and nothing from the host.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from llava.errors import UserError
from llava.kernels.decode_attention import decode_attention
from llava.model.kv_cache.base import CachePolicy, Counts, LayerPlan, RowSpans, budgets
from llava.model.kv_cache.full import Full
from llava.model.token_dropping.attention import RowAttention
from llava.model.token_selection.base import lowest_index_topk


class _Entries(NamedTuple):
    """What stays of one row: slots [G, n] of the row, in storage order; which of its image tokens [n] stay, ascending; the
    core [c] among those; scores [G, t] of the evictable ones, where they are ranked."""

    index: Tensor
    image: Tensor
    core: Tensor
    scores: Tensor | None


class LayerCache(CacheLayerMixin):
    """Keys and values of one layer for a batch, under one policy.

    multiple: slots and lists are rounded up to a multiple of it. constants: numbers that are on the device already, shared by
    the layers of a cache, which mostly have the same: sending them anew would wait for the device every time.
    After prefill: keys, values [B, G, C, d]; plans: per row, its counts; stayed: per row, which of the image tokens that
    the layer saw are stored, int32 [n] ascending (no list under Full, which stores all of them); front_len, image_len, core_len int32 [B];
    image, core int32 [B, N] slots of all stored and of the core's image entries; text int32 [B, G, T]: the slots of the
    evictable region, live ones first and oldest first, then the slot that the next entry will take; text_len int32
    [B, G].
    """

    is_sliding = False

    def __init__(self, policy: CachePolicy, steps: int, multiple: int = 1, constants: dict | None = None):
        super().__init__()
        self._constants = {} if constants is None else constants
        self.policy, self.steps, self._multiple, self._scorer = policy, steps, multiple, policy.scorer
        self.stayed: list[Tensor] = []
        self.side = (
            None  # the stream that re-ranking runs on, where it is not the step's own (AdaptiveCache.rank_beside)
        )
        self.update_step = False  # whether the step at hand re-ranks the core; set by AdaptiveCache.begin_step

    # --- what transformers asks of a cache layer -----------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: storage is allocated by `fill`, when it is known what stays."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """In prefill the keys and values as they are; in a decode step all storage, the new entry [B, G, 1, d] in it."""
        if not self.is_initialized:
            return key_states, value_states
        slot = self.text.gather(2, self.text_len[..., None].long()).long()[..., None]
        slot = slot.expand(-1, -1, 1, key_states.shape[-1])
        self.keys.scatter_(2, slot, key_states)
        self.values.scatter_(2, slot, value_states)
        self.text_len += 1
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0  # asked in prefill alone: a decode step reads lists, not a mask

    def get_seq_length(self) -> int:
        """Slots of a row. (How many tokens there have been, AdaptiveCache.get_seq_length says.)"""
        return self.keys.shape[-2] if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self.keys.shape[-2] if self.is_initialized else -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise UserError("an adaptive KV cache does not go with beam search: beams cannot exchange what they evicted")

    # --- prefill -------------------------------------------------------------------------------------------------

    def fill(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        rows: list[RowSpans],
        starts: list[int],
        entered: list[int],
    ) -> None:
        """Store what stays of a prompt: query [B, H, S, d], key, value [B, G, S, d], rotated, padded on either side.

        rows: what is in them, starts: from which slot on; entered: per row, image tokens that entered the LLM. Scores are computed here, from the
        rows of attention that the policy reads.
        """
        if self.is_initialized:
            raise UserError("an adaptive KV cache takes a prompt in one piece, but it has been prefilled already")
        regions = [row.regions() for row in rows]
        self.plans = [
            self.policy.plan(Counts(*map(len, parts), entered=n)) for parts, n in zip(regions, entered, strict=True)
        ]
        if isinstance(self.policy, Full):
            self._fill_whole(key, value, rows, starts)
            return
        chosen = []
        own = [slice(start, start + row.length) for row, start in zip(rows, starts, strict=True)]
        for b, (plan, parts) in enumerate(zip(self.plans, regions, strict=True)):
            attention = RowAttention(query[b, :, own[b]], key[b, :, own[b]], scaling)
            chosen.append(_choose(self.policy, plan, attention, key.shape[1], [part.to(key.device) for part in parts]))
        self.stayed = [entries.image.int() for entries in chosen]
        self._allocate(key)
        for b, (start, entries) in enumerate(zip(starts, chosen, strict=True)):
            slots = entries.index.shape[1]
            index = (entries.index + start)[..., None].expand(-1, -1, key.shape[-1])
            self.keys[b, :, :slots] = key[b].gather(1, index)
            self.values[b, :, :slots] = value[b].gather(1, index)
            self.core[b, : len(entries.core)] = self.plans[b].front + entries.core
            if self._scorer is not None:
                self.scores[b, :, : entries.scores.shape[1]] = entries.scores
        self.is_initialized = True

    def _fill_whole(self, key: Tensor, value: Tensor, rows: list[RowSpans], starts: list[int]) -> None:
        """Nothing is evicted, now or later: rows are stored as they are, without their padding."""
        self._allocate(key)
        total = key.shape[2]
        for storage, states in ((self.keys, key), (self.values, value)):
            if all(row.length == total for row in rows):
                storage[:, :, :total] = states
                continue
            for b, (row, start) in enumerate(zip(rows, starts, strict=True)):
                storage[b, :, : row.length] = states[b, :, start : start + row.length]
        self.is_initialized = True

    def _allocate(self, key: Tensor) -> None:
        (batch, heads, _, size), device = key.shape, key.device
        plans, steps = self.plans, self.steps
        slots = self._rounded(max(plan.slots(steps) for plan in plans))
        self.keys, self.values = (key.new_zeros(batch, heads, slots, size) for _ in range(2))

        def numbers(values: list) -> Tensor:
            key = str(values), device
            if key not in self._constants:
                self._constants[key] = torch.tensor(values, dtype=torch.int32, device=device)
            return self._constants[key].clone()

        front = [plan.front for plan in plans]
        self.front_len = numbers(front)
        self.image_len = numbers([plan.image for plan in plans])
        self.core_len = numbers([plan.core for plan in plans])
        places = torch.arange(self._rounded(max(plan.image for plan in plans)), device=device)
        self.image = (self.front_len[:, None] + places).clamp(max=slots - 1).int()
        self.core = self.image[:, : self._rounded(max(plan.core for plan in plans))].clone()
        # The evictable region. Lists are as long as the longest row's; what is past a row's own slots is never live.
        behind = numbers([plan.front + plan.image for plan in plans])[:, None, None]
        self._place = torch.arange(self._rounded(max(plan.text_slots(steps) for plan in plans)), device=device)
        self.text = (behind + self._place).clamp(max=slots - 1).int().repeat(1, heads, 1)
        self.text_len = numbers([plan.text(0) for plan in plans])[:, None].repeat(1, heads)
        if self._scorer is not None:
            self.scores = torch.zeros(self.text.shape, device=device)
            tables = [budgets(self.policy, plan.prompt, steps) for plan in plans]
            self._total = numbers([[budget.total for budget in row] for row in tables])
            self._recent = numbers([[budget.recent for budget in row] for row in tables])
            self._step = torch.zeros(1, dtype=torch.long, device=device)

    def _rounded(self, count: int) -> int:
        """A number of slots or list entries, rounded up for layers of different requests to have the same shapes."""
        return -(-count // self._multiple) * self._multiple

    # --- decoding ------------------------------------------------------------------------------------------------

    def attend(self, query: Tensor, scaling: float) -> Tensor:
        """Attention of the new tokens, query [B, H, 1, d], over what the step reads -> [B, 1, H, d].

        `update` has stored their entries. What is evicted or re-ranked is so by the attention of this very step.
        """
        asked = (self.update_step, self._scorer is not None)
        core, core_len = (self.image, self.image_len) if self.update_step else (self.core, self.core_len)
        found = decode_attention(
            query[:, :, 0],
            self.keys,
            self.values,
            self.front_len,
            core,
            core_len,
            self.text,
            self.text_len,
            scale=scaling,
            scores={(False, False): False, (True, False): "core", (False, True): "text", (True, True): True}[asked],
        )
        if self.update_step and self.side is not None:
            self.side.wait_stream(torch.cuda.current_stream(query.device))
            with torch.cuda.stream(self.side):
                self._rank(found.core_scores)
            found.core_scores.record_stream(self.side)
        elif self.update_step:
            self._rank(found.core_scores)
        if self._scorer is not None:
            self._evict(found.text_scores)
        return found.out[:, None]

    def _rank(self, scores: Tensor) -> None:
        """The core anew, from scores [B, N] of all stored image entries."""
        size, most = scores.shape[1], self.core.shape[1]
        place = torch.arange(max(size, most), device=scores.device)
        scores = scores.masked_fill(place[:size] >= self.image_len[:, None], float("-inf"))
        best = lowest_index_topk(scores, most).masked_fill(place[:most] >= self.core_len[:, None], size)
        best = best.sort(dim=1).values.clamp(max=max(size - 1, 0))
        self.core.copy_(self.image.gather(1, best))

    def _evict(self, paid: Tensor) -> None:
        """Rank the evictable region by the attention `paid` [B, G, T], and free a slot where it is over its budget.

        The freed slot goes to the end of the live list, where the next entry takes it.
        """
        self._step += 1
        place, last = self._place, self.text_len[..., None] - 1
        scores = self._scorer.add(self.scores, paid, place < last, place == last)
        total, recent = (table.index_select(1, self._step)[..., None] for table in (self._total, self._recent))
        over = last >= total
        candidate = place <= last - recent
        lowest = torch.where(candidate, scores, float("inf")).amin(dim=-1, keepdim=True)
        worst = torch.where(candidate & (scores == lowest), place, 0).amax(dim=-1, keepdim=True)
        worst = torch.where(over, worst, last)
        order = torch.where(place == last, worst, place + ((place >= worst) & (place < last)).long())
        self.text.copy_(self.text.gather(-1, order))
        self.scores.copy_(scores.gather(-1, order))
        self.text_len -= over[..., 0].int()

    def tensors(self) -> dict[str, Tensor]:
        """All that a decode step reads or changes, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def stored(self, row: int, step: int) -> int:
        """Entries of one row after `step` decode steps."""
        return self.plans[row].stored(step)


def _choose(
    policy: CachePolicy, plan: LayerPlan, attention: RowAttention, heads: int, regions: list[Tensor]
) -> _Entries:
    """What stays of one row: its regions as slots of the row (RowSpans.regions), `heads` KV heads."""
    before, image, text = regions
    if policy.whole:
        before, image, text = before[:0], image[:0], torch.cat(regions).sort().values
    stay = plan.image if policy.interval > 0 else plan.front - len(before)
    held, core = (torch.arange(count, device=image.device) for count in (len(image), plan.core))
    if stay < len(image) or plan.core < plan.image:
        paid = attention.mean(text.new_tensor([attention.length - 1]))[image]
        best = lowest_index_topk(paid, stay)
        held = best.sort().values
        core = torch.searchsorted(held, best[: plan.core].sort().values)
        image = image[held]
    scores, text = None, text.expand(heads, -1)
    if policy.scorer is not None:
        scores, count, left = policy.scorer.start(attention, heads, text[0]), text.shape[1], plan.text(0)
        if left < count:
            old = count - policy.budget(plan.prompt, plan.prompt).recent
            kept = lowest_index_topk(scores[:, :old], left - (count - old)).sort(dim=1).values
            recent = torch.arange(old, count, device=text.device).expand(heads, -1)
            kept = torch.cat([kept, recent], dim=1)
            scores, text = scores.gather(1, kept), text.gather(1, kept)
    index = torch.cat([before.expand(heads, -1), image.expand(heads, -1), text], dim=1)
    return _Entries(index, held, core, scores)
