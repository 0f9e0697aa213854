"""Caching, the settings of a request's KV cache, and AdaptiveCache, the cache that decoding uses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from llava.common.errors import UserError
from llava.methods.kv_cache.base import CachePolicy, Counts, LayerPlan, RowSpans
from llava.methods.kv_cache.full import Full
from llava.model.decoding.cache_tensors import CacheLayout, CacheTensors
from llava.model.decoding.contiguous_layer import ContiguousLayer
from llava.model.decoding.layer_cache import GONE, LayerCache, Regions


class Caching:
    """Settings of the KV cache of one request. llava_arch.prepare makes it, and decoding changes nothing in it.

    policy: the cache policy; layers: L, the layers of the LLM
    prompts: per row, its tokens and images as they enter the LLM
    next_positions [B, 1]: position of each row's first new token
    image_counts: [L][B] vision tokens of each row that each layer's attention sees; None where every layer sees all
    numbering: [L] the number of the way in which each layer counts positions; None where there is only one
    one_device: whether all layers are on one device, so that their keys and values can be in one allocation
    """

    def __init__(
        self,
        policy: CachePolicy,
        layers: int,
        prompts: list[RowSpans],
        next_positions: Tensor,
        image_counts: Sequence[Sequence[int]] | None = None,
        numbering: Sequence[int] | None = None,
        one_device: bool = True,
    ):
        self.policy, self.layers, self.prompts, self.next_positions = policy, layers, prompts, next_positions
        self.numbering = tuple(numbering) if numbering is not None else (0,) * layers
        self.one_device, self._image_counts = one_device, image_counts

    @property
    def adaptive(self) -> bool:
        """Whether entries are evicted or not read. If not, generate() uses the cache of transformers."""
        return not isinstance(self.policy, Full)

    def plans(self, times: int = 1) -> tuple[tuple[LayerPlan, ...], ...]:
        """Return the policy's plan for each row in each layer, [L][B x times]; every row is repeated `times`.

        Layers that see the same number of vision tokens share one tuple. Later code compares these by identity.
        """
        entered = tuple(sum(count for _, count in prompt.images) for prompt in self.prompts)
        known: dict[tuple[int, ...], tuple[LayerPlan, ...]] = {}
        found = []
        for layer in range(self.layers):
            seen = entered if self._image_counts is None else tuple(self._image_counts[layer])
            if seen not in known:
                rows = [self.policy.plan(_counts(*row)) for row in zip(self.prompts, entered, seen, strict=True)]
                known[seen] = tuple(plan for plan in rows for _ in range(times))
            found.append(known[seen])
        return tuple(found)

    def cache(self, steps: int, multiple: int = 1) -> AdaptiveCache:
        """Return an empty cache for one prefill of the prompts and up to `steps` decode steps of one token per row.

        multiple: capacities are rounded up to it (rounded_up), so that requests of similar length get equal shapes
        Prefill and every step need this cache as `past_key_values`; generate() makes it by itself. UserError for a
        negative number of steps.
        """
        if steps < 0:
            raise UserError(f"a cache was asked for {steps} decode steps, allowed are 0 and more")
        return AdaptiveCache(self, steps, multiple)


def _counts(prompt: RowSpans, entered: int, seen: int) -> Counts:
    """Return what one layer sees of a row: `entered` vision tokens entered the LLM, `seen` of them reach the layer."""
    before = prompt.images[0][0] if prompt.images else prompt.length
    return Counts(before, seen, prompt.length - entered - before, entered)


class AdaptiveCache(Cache):
    """KV cache of one generation under a policy: one LayerCache per layer of the LLM.

    A decode step has two parts. begin_step() runs on the host: it counts the step and decides whether it is an update
    step. All other work updates device tensors in place, with the same shapes at every step. Update steps and other
    steps can therefore each be captured as a CUDA graph. The first layer that is prefilled allocates the tensors
    (CacheTensors), unless the engine has lent them before (use_tensors).
    """

    def __init__(self, caching: Caching, steps: int, multiple: int = 1):
        layer = ContiguousLayer if caching.policy.contiguous else LayerCache
        super().__init__(layers=[layer(caching.policy) for _ in range(caching.layers)])
        self.caching, self.limit, self._multiple = caching, steps, multiple
        self.steps = 0  # decode steps so far
        self._side: torch.cuda.Stream | None = None
        self._gone = False  # whether a later request has the tensors now
        self.update_step = False  # whether the current step is an update step
        self.length = 0  # tokens of the padded prompt
        self.rows: list[RowSpans] = []  # what the current layer sees of each row, during prefill
        self.numbering = caching.numbering  # per layer: index of the shift that is subtracted from its positions
        self.layout = self._layout(1)
        # One CacheTensors for all layers, or one per layer where layers are on several devices.
        self._parts: list[CacheTensors] = []
        self._lent: CacheTensors | None = None
        self._regions: dict[tuple, Regions] = {}

    def _layout(self, times: int) -> CacheLayout:
        caching = self.caching
        return CacheLayout(caching.policy, caching.plans(times), self.limit, self._multiple, self.numbering)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens so far in the padded batch, evicted ones included."""
        # transformers derives position ids from it, so it must not shrink when entries are evicted.
        return self.length + self.steps if self.layers[-1].is_initialized else 0

    def reset(self) -> None:
        """Make the cache empty again."""
        self.__init__(self.caching, self.limit, self._multiple)

    # --- the tensors -----------------------------------------------------------------------------------------------

    def use_tensors(self, tensors: CacheTensors) -> None:
        """Prefill into the tensors of an earlier request with an equal layout."""
        assert tensors.key == self.layout.key
        self._lent = tensors

    def give_up_tensors(self) -> None:
        """Give the tensors to another request. Any later use of this cache raises UserError."""
        self._gone = True
        for layer in self.layers:
            layer.drop_tensors()

    @property
    def tensors(self) -> CacheTensors | None:
        """The tensors of all layers after prefill; None where each layer has its own.

        UserError after give_up_tensors.
        """
        if self._gone:
            raise UserError(GONE)
        return self._parts[0] if len(self._parts) == 1 and self.caching.one_device else None

    @property
    def kv_nbytes(self) -> int:
        """Allocated bytes of keys and values."""
        return sum(part.kv.nbytes for part in self._parts)

    def room(self, like: Tensor) -> None:
        """Prepare the tensors of all layers for a prefill whose keys are like `like` [B, G, S, d]."""
        if self._parts or not self.caching.one_device:
            return
        tensors = self._lent or CacheTensors(self.layout, like)
        tensors.begin(self.layout, self._last_positions)
        self._parts = [tensors]
        for number, layer in enumerate(self.layers):
            layer.use_tensors(tensors.of_layer(number), self.layout.plans[number])

    def _room_of_layer(self, number: int, like: Tensor) -> None:
        """Allocate the tensors of one layer on its own device."""
        plans = self.layout.plans[number]
        layout = CacheLayout(self.caching.policy, (plans,), self.limit, self._multiple, self.numbering)
        tensors = CacheTensors(layout, like)
        tensors.begin(layout, self._last_positions)
        self._parts.append(tensors)
        self.layers[number].use_tensors(tensors.of_layer(0), plans)

    # --- prefill ---------------------------------------------------------------------------------------------------

    def begin_prefill(self, batch: int, length: int, right: bool = False) -> None:
        """Start the prefill of a padded batch of `batch` rows of `length` tokens.

        batch: the number of prompts, or a multiple of it: transformers repeats rows to sample several answers
        right: rows are padded on the right, not on the left
        UserError for a batch of another shape; a prompt is prefilled in one piece.
        """
        prompts = self.caching.prompts
        times, rest = divmod(batch, len(prompts))
        if rest or not times or length != max(prompt.length for prompt in prompts):
            raise UserError(
                f"prefill got a batch of {batch} x {length} tokens, but the prompt that the adaptive KV cache was made "
                f"for has {len(prompts)} x {max(prompt.length for prompt in prompts)}; it is prefilled in one piece"
            )
        if times > 1:
            self.layout = self._layout(times)
        self.rows = [prompt for prompt in prompts for _ in range(times)]
        self._last_positions = (self.caching.next_positions - 1).repeat_interleave(times, dim=0)
        self.length, self._right = length, right

    def end_prefill(self, shifts: list[Tensor]) -> None:
        """Store the shifts of layers that count positions anew: layer l subtracts shifts[numbering[l]] [B]."""
        for part in self._parts:
            part.shifts.copy_(torch.stack(shifts[: len(part.shifts)])[..., None])

    def fill(self, number: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        """Store the prompt's entries that stay in one layer, right after its attention (LayerCache.fill)."""
        layer = self.layers[number]
        if layer.is_initialized:
            raise UserError("an adaptive KV cache takes a prompt in one piece, but it has been prefilled already")
        self.room(key)
        if not self.caching.one_device:
            self._room_of_layer(number, key)
        layer.fill(query, key, value, scaling, self._regions_of(key))

    def room_for(self, number: int, key: Tensor) -> Sequence[Tensor]:
        """Return tensors [B, G, >= S, d] for a layer's rotated keys and its values in prefill.

        key [B, S, G, d]: its keys before rotation. Where every entry stays, the tensors are the storage itself, which
        saves a copy.
        """
        self.room(key.transpose(1, 2))
        if not self.caching.adaptive and self.tensors is not None and self._right:
            layer = self.layers[number]
            return layer.keys, layer.values
        return key.new_empty(2, key.shape[0], *key.shape[2:0:-1], key.shape[3])

    def fill_all(self, kv: Tensor) -> bool:
        """Store keys and values kv [2, L, B, G, S, d] of all layers in one copy; rows are padded on the right.

        Returns False, and does nothing, unless every layer keeps all entries and all layers have one size.
        """
        self.room(kv[0, 0])
        if self.caching.adaptive or self.tensors is None or len(self.tensors.runs) > 1:
            return False
        storage = self.tensors.runs[0].kv
        slots = min(kv.shape[4], storage.shape[4])
        storage[..., :slots, :].copy_(kv[..., :slots, :])
        for layer in self.layers:
            layer.is_initialized = True
        return True

    def _regions_of(self, key: Tensor) -> Regions:
        """Return the rows as the current layer sees them. Layers that see the same share one copy of the indices."""
        known = tuple((row.length, tuple(row.images)) for row in self.rows), key.device
        if known not in self._regions:
            starts = [0 if self._right else key.shape[2] - row.length for row in self.rows]
            self._regions[known] = Regions(self.rows, starts, key.device, with_indices=self.caching.adaptive)
        return self._regions[known]

    # --- decoding --------------------------------------------------------------------------------------------------

    def begin_step(self, tokens: int) -> None:
        """Do the host's part of a decode step with `tokens` new tokens per row.

        UserError for more than one token per row, and for more steps than the cache was made for.
        """
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

    def advance(self) -> Tensor:
        """Do the device's part of the beginning of a step: every layer gets one more entry.

        Returns the positions [N, B, 1] of the new tokens, one for each of the N ways to count them (`numbering`).
        """
        if self._gone:
            raise UserError(GONE)
        first, *others = (part.advance() for part in self._parts)
        return first

    def rank_beside(self) -> None:
        """Rank the core on a side stream of the GPU, in parallel with the layers that follow.

        No step reads the new core before the next one, and end_step waits for the side stream before that.
        """
        self._side = torch.cuda.Stream(self._last_positions.device)
        for layer in self.layers:
            layer.side = self._side

    def end_step(self) -> None:
        """Let the current stream wait for the ranking on the side stream; called at the end of each step."""
        if self.update_step and self._side is not None:
            torch.cuda.current_stream(self._last_positions.device).wait_stream(self._side)
