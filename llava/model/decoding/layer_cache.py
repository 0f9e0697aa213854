"""The stored keys and values of one layer: slots with entries, and int32 lists of the slots that a step reads.

The slots of a row are [front | stored vision entries, in order | evictable region]. All tensors are views into the
CacheTensors of the request (cache_tensors.py). A step writes one entry and updates lists and counters in place. It
copies no cache, makes no lasting allocation and never waits for the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import CacheLayerMixin

from llava.common.errors import UserError
from llava.kernels.decode_attention import decode_attention
from llava.kernels.evict import evict
from llava.kernels.rank_core import rank_core
from llava.kernels.rotate_append import rotate_append
from llava.methods.attention_rows import RowAttention
from llava.methods.kv_cache.base import CachePolicy, LayerPlan, RowSpans
from llava.methods.kv_cache.full import Full
from llava.methods.ranking import lowest_index_topk


class Regions:
    """The places of the regions of each row, shared by all layers that see the same tokens.

    rows: the rows; starts: first slot of each row in the padded batch
    indices: per row, the positions of the text before the first image, of the vision tokens and of the text after the
        first image's start (RowSpans.regions), sent to the device in one copy; None without with_indices
    """

    def __init__(self, rows: Sequence[RowSpans], starts: Sequence[int], device: torch.device, with_indices: bool):
        self.rows, self.starts, self.indices = list(rows), list(starts), None
        if with_indices:
            parts = [row.regions() for row in rows]
            flat = torch.cat([part for row in parts for part in row])
            if device.type == "cuda":
                flat = flat.pin_memory()
            pieces = iter(flat.to(device, non_blocking=True).split([len(part) for row in parts for part in row]))
            self.indices = [tuple(next(pieces) for _ in row) for row in parts]


class _Entries(NamedTuple):
    """The entries that stay of one row.

    index [G, n]: slots of the row, in storage order; image [n]: vision tokens that stay, ascending
    core [c]: indices of the core among these; scores [G, t]: of the evictable entries, None where they are not ranked
    """

    index: Tensor
    image: Tensor
    core: Tensor
    scores: Tensor | None


GONE = (
    "the storage of this KV cache went to a later request of the same engine; read a cache before the next request, or "
    "make the engine with graphs=False"
)
# Names of the views that use_tensors binds.
TENSORS = (
    *("keys", "values", "front_len", "image_len", "core_len", "text_len", "image", "core", "text"),
    *("scores", "total", "recent", "step"),
)


class LayerCache(CacheLayerMixin):
    """Keys and values of one layer for a batch, under one policy.

    After prefill:
    keys, values [B, G, C, d]
    plans       per row, its counts
    stayed      per row, which of the vision tokens that the layer saw are stored, int32 [n] ascending; empty under
                Full, which stores all of them
    front_len, image_len, core_len int32 [B]; text_len int32 [B, G]
    image, core int32 [B, N]: slots of all stored vision entries and of the core
    text int32 [B, G, T]: slots of the evictable region, live ones first, oldest first, then the slot for the next entry
    AdaptiveCache.advance counts the entry of a step in text_len before the step writes it.
    """

    is_sliding = False

    def __init__(self, policy: CachePolicy):
        super().__init__()
        self.policy, self._scorer = policy, policy.scorer
        self.plans: Sequence[LayerPlan] = ()
        self.stayed: list[Tensor] = []
        self.side = (
            None  # the side stream that ranks the core in parallel with the next layers (AdaptiveCache.rank_beside)
        )
        self.update_step = False  # whether the current step is an update step; set by AdaptiveCache.begin_step
        self._gone = False

    # --- the tensors ---------------------------------------------------------------------------------------------

    def use_tensors(self, tensors: dict[str, Tensor], plans: Sequence[LayerPlan]) -> None:
        """Bind the views of one layer (CacheTensors.of_layer), whose lists are filled as `plans` [B] say."""
        self.plans = plans
        vars(self).update(tensors)

    def drop_tensors(self) -> None:
        """Unbind the views, which belong to a later request now."""
        for name in TENSORS:
            vars(self).pop(name, None)
        self._gone = True

    def __getattr__(self, name: str):
        if name in TENSORS and vars(self).get("_gone"):
            raise UserError(GONE)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors that a decode step reads or changes, by name."""
        return {name: getattr(self, name) for name in TENSORS if name in vars(self)}

    # --- the interface of transformers' cache layers -------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: storage is allocated before `fill`, where the numbers of entries are known."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Return the keys and values for the layer's attention.

        In prefill these are the given ones. In a decode step the new entry [B, G, 1, d] is stored and all storage
        returned.
        """
        # In prefill the policy chooses after the attention has run (fill).
        if not self.is_initialized:
            return key_states, value_states
        slot = self._newest().expand(-1, key_states.shape[1], 1, key_states.shape[-1])
        self.keys.scatter_(2, slot, key_states)
        self.values.scatter_(2, slot, value_states)
        return self.keys, self.values

    def _newest(self) -> Tensor:
        """Return the slot of the step's own entry, [B, G or 1, 1, 1]."""
        return self.text.gather(2, self.text_len[..., None].long() - 1).long()[..., None]

    def append(self, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Store the entry of a decode step and return the rotated query [B, H, 1, d].

        query [B, 1, H, d]; key, value [B, 1, G, d], before rotation; cos, sin [B, 1, d], sin with the sign of
        rotate_half
        """
        return rotate_append(query, key, value, cos, sin, self.keys, self.values, self.text, self.text_len)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0  # called in prefill only: a decode step reads lists, not a mask

    def get_seq_length(self) -> int:
        """Return the slots of a row. AdaptiveCache.get_seq_length gives the number of tokens so far."""
        return self.keys.shape[-2] if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self.keys.shape[-2] if self.is_initialized else -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise UserError("an adaptive KV cache does not go with beam search: beams cannot exchange what they evicted")

    # --- prefill -------------------------------------------------------------------------------------------------

    def fill(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, regions: Regions) -> None:
        """Store the entries of a prompt that stay.

        query [B, H, S, d]; key, value [B, G, S, d]: rotated, padded on the left or on the right
        The policy's scores are computed here, from the attention rows that it reads.
        """
        if isinstance(self.policy, Full):
            self._fill_whole(key, value, regions)
        else:
            self._fill_chosen(query, key, value, scaling, regions)
        self.is_initialized = True

    def _fill_whole(self, key: Tensor, value: Tensor, regions: Regions) -> None:
        """Store all entries of each row, without its padding, for a policy that evicts nothing."""
        if key.data_ptr() == self.keys.data_ptr():
            return  # the layer's attention has written them into the storage (AdaptiveCache.room_for)
        slots = min(key.shape[2], self.keys.shape[2])
        for storage, states in ((self.keys, key), (self.values, value)):
            if not any(regions.starts):
                # One copy for all rows. Padding behind a short row is overwritten by its new tokens before it is read.
                storage[:, :, :slots] = states[:, :, :slots]
                continue
            for b, (row, start) in enumerate(zip(regions.rows, regions.starts, strict=True)):
                storage[b, :, : row.length] = states[b, :, start : start + row.length]

    def _fill_chosen(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, regions: Regions) -> None:
        """Store the entries that the policy chooses."""
        # 1. The policy chooses row by row, each row without its padding.
        chosen = []
        for b, (plan, row, start, parts) in enumerate(
            zip(self.plans, regions.rows, regions.starts, regions.indices, strict=True)
        ):
            own = slice(start, start + row.length)
            attention = RowAttention(query[b, :, own], key[b, :, own], scaling)
            chosen.append(_choose(self.policy, plan, attention, key.shape[1], parts))
        self.stayed = [entries.image.int() for entries in chosen]
        # 2. Where all entries stay, in the order of the prompt, they are copied. Otherwise one gather stores the entries of
        # all rows. Short rows repeat slot 0 at the end, which nothing reads.
        if all(map(_stays_whole, regions.rows, chosen)):
            self._fill_whole(key, value, regions)
        else:
            index = _padded([entries.index + start for entries, start in zip(chosen, regions.starts, strict=True)])
            slots, index = index.shape[-1], index[..., None].expand(-1, -1, -1, key.shape[-1])
            self.keys[:, :, :slots] = key.gather(2, index)
            self.values[:, :, :slots] = value.gather(2, index)
        # 3. The core and the scores.
        if self.core.shape[1]:
            core = _padded([plan.front + entries.core for plan, entries in zip(self.plans, chosen, strict=True)])
            self.core[:, : core.shape[1]] = core
        if self._scorer is not None:
            scores = _padded([entries.scores for entries in chosen])
            self.scores[..., : scores.shape[2]] = scores

    # --- decoding ------------------------------------------------------------------------------------------------

    def attend(self, query: Tensor, scaling: float) -> Tensor:
        """Return the attention output [B, 1, H, d] of the new tokens, query [B, H, 1, d], over the listed entries.

        `update` or `append` has stored the new entries before. Then the layer ranks its core and evicts an entry, where
        its policy does so, by the attention of this step.
        """
        # 1. Attention. An update step reads all stored vision entries in place of the core.
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
        # 2. A new core, from the attention to all vision entries.
        if self.update_step and self.side is not None:
            self.side.wait_stream(torch.cuda.current_stream(query.device))
            with torch.cuda.stream(self.side):
                self._rank(found.core_scores)
            # Without this the allocator could reuse the scores' memory while the side stream still reads them.
            found.core_scores.record_stream(self.side)
        elif self.update_step:
            self._rank(found.core_scores)
        # 3. Eviction.
        if self._scorer is not None:
            rule, quantile = self._scorer.kernel_rule
            evict(
                *(self.scores, found.text_scores, self.text, self.text_len, self.total, self.recent, self.step),
                rule=rule,
                quantile=quantile,
            )
        return found.out[:, None]

    def _rank(self, scores: Tensor) -> None:
        """Rank the core again, by scores [B, N] of all stored vision entries."""
        rank_core(scores, self.image, self.image_len, self.core, self.core_len)

    def stored(self, row: int, step: int) -> int:
        """Return the number of entries of one row after `step` decode steps."""
        return self.plans[row].stored(step)


def _stays_whole(row: RowSpans, entries: _Entries) -> bool:
    """Return whether all entries of a row stay and storage order is the order of the prompt."""
    # Storage has the text between images behind all images.
    return entries.index.shape[1] == row.length and len(row.images) < 2


def _padded(rows: list[Tensor]) -> Tensor:
    """Stack B tensors [..., n_b] to [B, ..., n]; shorter ones are padded at the end with zeros."""
    longest = max(row.shape[-1] for row in rows)
    return torch.stack([row if row.shape[-1] == longest else pad(row, (0, longest - row.shape[-1])) for row in rows])


def _choose(
    policy: CachePolicy, plan: LayerPlan, attention: RowAttention, heads: int, regions: list[Tensor]
) -> _Entries:
    """Return the entries that stay of one row.

    regions: slots of the row (RowSpans.regions); heads: G, the KV heads
    """
    # 1. The regions. A policy over the whole sequence has one evictable region of all of them.
    before, image, text = regions
    if policy.whole:
        before, image, text = before[:0], image[:0], torch.cat(regions).sort().values
    # 2. Vision entries: ranked by the attention of the prompt's last query, mean over heads. Without a core they count
    # as part of the front (CachePolicy.plan).
    stay = plan.image if policy.interval > 0 else plan.front - len(before)
    held, core = (torch.arange(count, device=image.device) for count in (len(image), plan.core))
    if stay < len(image) or plan.core < plan.image:
        paid = attention.mean(attention.last())[image]
        best = lowest_index_topk(paid, stay)
        core = best[: plan.core].sort().values
        if stay < len(image):
            held = best.sort().values
            core = torch.searchsorted(held, core)
            image = image[held]
    # 3. Evictable entries: the protected newest ones stay, and the best of the others.
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
