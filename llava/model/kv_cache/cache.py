"""Caching, the part of a prepared request that says how its keys and values are kept; and the cache that it makes."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from llava.errors import UserError
from llava.model.kv_cache.base import CachePolicy, RowSpans
from llava.model.kv_cache.contiguous import ContiguousLayer
from llava.model.kv_cache.full import Full
from llava.model.kv_cache.storage import LayerCache


class Caching:
    """How the keys and values of one request are kept. Made by llava_arch.prepare; holds nothing that decoding changes.

    policy, layers: of the LLM; prompts: per row, its tokens and images as they enter the LLM; next_positions [B, 1]:
    the position of each row's first new token.
    """

    def __init__(self, policy: CachePolicy, layers: int, prompts: list[RowSpans], next_positions: Tensor):
        self.policy, self.layers, self.prompts, self.next_positions = policy, layers, prompts, next_positions

    @property
    def adaptive(self) -> bool:
        """Whether anything is evicted or left unread; if not, transformers' own cache does in generate()."""
        return not isinstance(self.policy, Full)

    def cache(self, steps: int, multiple: int = 1) -> AdaptiveCache:
        """An empty cache for one prefill of the prompts and up to `steps` decode steps of one token per row.

        multiple: capacities are rounded up to a multiple of it, so that requests of similar length get equal shapes.
        It is what `past_key_values` has to be, in prefill and in every step; generate() makes it by itself.
        """
        if steps < 0:
            raise UserError(f"a cache was asked for {steps} decode steps, allowed are 0 and more")
        return AdaptiveCache(self, steps, multiple)


class AdaptiveCache(Cache):
    """Keys and values of one generation under a policy: one LayerCache per layer of the LLM.

    A decode step is begin_step() on the host, which counts it and says whether it re-ranks the core, and then work on
    device tensors that are updated in place, of the same shapes at every step: a step that re-ranks and one that does
    not can each be captured as a graph.
    """

    def __init__(self, caching: Caching, steps: int, multiple: int = 1):
        layer = ContiguousLayer if caching.policy.contiguous else LayerCache
        constants: dict = {}
        super().__init__(layers=[layer(caching.policy, steps, multiple, constants) for _ in range(caching.layers)])
        self.caching, self.limit = caching, steps
        self.steps = 0  # decode steps so far
        self._side: torch.cuda.Stream | None = None
        self.update_step = False  # whether the step at hand re-ranks the core
        self.length = 0  # tokens of the padded prompt
        self.rows: list[RowSpans] = []  # what the layer at hand sees of each row, while prefill goes on
        self.numbering = [0] * caching.layers  # per layer: which of `shifts` its positions lie below the whole prompt's

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that there have been in the padded batch, whatever has been evicted of them."""
        return self.length + self.steps if self.layers[-1].is_initialized else 0

    def reset(self) -> None:
        """Forget everything: the cache is as new."""
        self.__init__(self.caching, self.limit)

    def begin_prefill(self, batch: int, length: int, right: bool = False) -> None:
        """Prefill of a padded batch begins; sampling several answers at once repeats each row.

        right: rows are padded on the right, not on the left.
        """
        prompts = self.caching.prompts
        times, rest = divmod(batch, len(prompts))
        if rest or not times or length != max(prompt.length for prompt in prompts):
            raise UserError(
                f"prefill got a batch of {batch} x {length} tokens, but the prompt that the adaptive KV cache was made "
                f"for has {len(prompts)} x {max(prompt.length for prompt in prompts)}; it is prefilled in one piece"
            )
        self.rows = [prompt for prompt in prompts for _ in range(times)]
        self._entered = [sum(count for _, count in row.images) for row in self.rows]
        self._positions = (self.caching.next_positions - 1).repeat_interleave(times, dim=0)
        self.shifts = torch.zeros(1, batch, 1, dtype=torch.long, device=self._positions.device)
        self.length, self._right = length, right

    def end_prefill(self, numbering: list[int], shifts: list[Tensor]) -> None:
        """Layers count positions anew: layer l of a row lies shifts[numbering[l]] [B] below the whole prompt's."""
        self.numbering, self.shifts = numbering, torch.stack(shifts)[..., None].to(self._positions.device)

    def fill(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        """Store what stays of the prompt in one layer, whose attention has just seen it (LayerCache.fill)."""
        starts = [0 if self._right else key.shape[2] - row.length for row in self.rows]
        self.layers[layer].fill(query, key, value, scaling, self.rows, starts, self._entered)

    def begin_step(self, tokens: int) -> None:
        """A decode step with `tokens` new tokens per row begins: the host's part of it."""
        if tokens != 1:
            raise UserError(f"a decode step got {tokens} tokens per row, but an adaptive KV cache takes one at a time")
        if self.steps == self.limit:
            raise UserError(
                f"the adaptive KV cache was made for {self.limit} decode steps, which have all been taken; "
                "ask for more with caching.cache(steps)"
            )
        self.steps += 1
        self.update_step = self.caching.policy.updates(self.steps)
        for layer in self.layers:
            layer.update_step = self.update_step

    def next_positions(self) -> Tensor:
        """[N, B, 1] positions of the step's new tokens, in each of the N ways in which layers count them (`numbering`)."""
        self._positions += 1
        return self._positions - self.shifts

    def rank_beside(self) -> None:
        """Re-rank on a side stream of the GPU, beside the layers that follow: the new core is not read before the next
        step, and by its end every step has waited for it."""
        self._side = torch.cuda.Stream(self._positions.device)
        for layer in self.layers:
            layer.side = self._side

    def end_step(self) -> None:
        """All of a step is under way but what runs beside it: wait for that too."""
        if self.update_step and self._side is not None:
            torch.cuda.current_stream(self._positions.device).wait_stream(self._side)

    # --- the same storage for one request after another ------------------------------------------------------------

    def shape(self) -> tuple:
        """Equal for caches that can take each other's place under a captured graph (after prefill)."""
        tensors = tuple((name, tuple(t.shape), t.dtype) for layer in self.layers for name, t in layer.tensors().items())
        return self.caching.policy, tuple(self.numbering), tuple(self.shifts.shape), self.limit, tensors

    def take_over(self, other: AdaptiveCache) -> None:
        """Become `other`, a prefilled cache of the same shape: its contents are copied into the tensors that are here."""
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            for name, tensor in theirs.tensors().items():
                getattr(mine, name).copy_(tensor)
            mine.plans, mine.stayed = theirs.plans, theirs.stayed
        self._positions.copy_(other._positions)
        self.shifts.copy_(other.shifts)
        self.caching, self.steps, self.length, self.rows = other.caching, other.steps, other.length, other.rows
