"""Caching, the part of a prepared request that says how its keys and values are kept; and the cache that it makes."""

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
    """How the keys and values of one request are kept. Made by llava_arch.prepare; holds nothing that decoding changes.

    policy, layers: of the LLM; prompts: per row, its tokens and images as they enter the LLM; next_positions [B, 1]:
    the position of each row's first new token.
    image_counts: [L][B] image tokens that each layer's attention sees of each row; None where every layer sees all.
    numbering: [L] in which of several ways each layer counts positions; None where there is one.
    one_device: whether all layers are on one device, so that their keys and values can lie in one allocation.
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
        """Whether anything is evicted or left unread; if not, transformers' own cache does in generate()."""
        return not isinstance(self.policy, Full)

    def plans(self, times: int = 1) -> tuple[tuple[LayerPlan, ...], ...]:
        """[L][B] what the policy makes of each row in each layer, every row repeated `times`.

        Layers that see the same number of image tokens share one tuple.
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
        """An empty cache for one prefill of the prompts and up to `steps` decode steps of one token per row.

        multiple: capacities are rounded up by it (rounded_up), so that requests of similar length get equal shapes.
        It is what `past_key_values` has to be, in prefill and in every step; generate() makes it by itself.
        """
        if steps < 0:
            raise UserError(f"a cache was asked for {steps} decode steps, allowed are 0 and more")
        return AdaptiveCache(self, steps, multiple)


def _counts(prompt: RowSpans, entered: int, seen: int) -> Counts:
    """What one layer sees of a row of which `entered` image tokens entered the LLM and `seen` of those reach the layer."""
    before = prompt.images[0][0] if prompt.images else prompt.length
    return Counts(before, seen, prompt.length - entered - before, entered)


class AdaptiveCache(Cache):
    """Keys and values of one generation under a policy: one LayerCache per layer of the LLM.

    A decode step is begin_step() on the host, which counts it and says whether it re-ranks the core, and then work on
    device tensors that are updated in place, of the same shapes at every step: a step that re-ranks and one that does
    not can each be captured as a graph. The tensors (CacheTensors) are allocated by the first layer that is prefilled, or
    lent by the engine before it (use_tensors).
    """

    def __init__(self, caching: Caching, steps: int, multiple: int = 1):
        layer = ContiguousLayer if caching.policy.contiguous else LayerCache
        super().__init__(layers=[layer(caching.policy) for _ in range(caching.layers)])
        self.caching, self.limit, self._multiple = caching, steps, multiple
        self.steps = 0  # decode steps so far
        self._side: torch.cuda.Stream | None = None
        self._gone = False  # whether the tensors went to a later request
        self.update_step = False  # whether the step at hand re-ranks the core
        self.length = 0  # tokens of the padded prompt
        self.rows: list[RowSpans] = []  # what the layer at hand sees of each row, while prefill goes on
        self.numbering = caching.numbering  # per layer: which of the shifts its positions lie below the whole prompt's
        self.layout = self._layout(1)
        # The tensors of all layers; where layers are on several devices, of one layer each.
        self._parts: list[CacheTensors] = []
        self._lent: CacheTensors | None = None
        self._regions: dict[tuple, Regions] = {}

    def _layout(self, times: int) -> CacheLayout:
        caching = self.caching
        return CacheLayout(caching.policy, caching.plans(times), self.limit, self._multiple, self.numbering)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that there have been in the padded batch, whatever has been evicted of them."""
        return self.length + self.steps if self.layers[-1].is_initialized else 0

    def reset(self) -> None:
        """Forget everything: the cache is as new."""
        self.__init__(self.caching, self.limit, self._multiple)

    # --- the tensors -----------------------------------------------------------------------------------------------

    def use_tensors(self, tensors: CacheTensors) -> None:
        """Prefill into tensors that an earlier request of equal layout has left."""
        assert tensors.key == self.layout.key
        self._lent = tensors

    def give_up_tensors(self) -> None:
        """The tensors go to another request: whatever is asked of this cache from now on is refused."""
        self._gone = True
        for layer in self.layers:
            layer.drop_tensors()

    @property
    def tensors(self) -> CacheTensors | None:
        """The tensors of all layers after prefill; None where each layer has its own."""
        if self._gone:
            raise UserError(GONE)
        return self._parts[0] if len(self._parts) == 1 and self.caching.one_device else None

    @property
    def kv_nbytes(self) -> int:
        """Bytes that keys and values occupy."""
        return sum(part.kv.nbytes for part in self._parts)

    def room(self, like: Tensor) -> None:
        """Make the tensors of every layer ready for a prefill whose keys are like `like` [B, G, S, d]."""
        if self._parts or not self.caching.one_device:
            return
        tensors = self._lent or CacheTensors(self.layout, like)
        tensors.begin(self.layout, self._last_positions)
        self._parts = [tensors]
        for number, layer in enumerate(self.layers):
            layer.use_tensors(tensors.of_layer(number), self.layout.plans[number])

    def _room_of_layer(self, number: int, like: Tensor) -> None:
        """The tensors of one layer by itself, on its device."""
        plans = self.layout.plans[number]
        layout = CacheLayout(self.caching.policy, (plans,), self.limit, self._multiple, self.numbering)
        tensors = CacheTensors(layout, like)
        tensors.begin(layout, self._last_positions)
        self._parts.append(tensors)
        self.layers[number].use_tensors(tensors.of_layer(0), plans)

    # --- prefill ---------------------------------------------------------------------------------------------------

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
        if times > 1:
            self.layout = self._layout(times)
        self.rows = [prompt for prompt in prompts for _ in range(times)]
        self._last_positions = (self.caching.next_positions - 1).repeat_interleave(times, dim=0)
        self.length, self._right = length, right

    def end_prefill(self, shifts: list[Tensor]) -> None:
        """Layers count positions anew: layer l of a row lies shifts[numbering[l]] [B] below the whole prompt's."""
        for part in self._parts:
            part.shifts.copy_(torch.stack(shifts[: len(part.shifts)])[..., None])

    def fill(self, number: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        """Store what stays of the prompt in one layer, whose attention has just seen it (LayerCache.fill)."""
        layer = self.layers[number]
        if layer.is_initialized:
            raise UserError("an adaptive KV cache takes a prompt in one piece, but it has been prefilled already")
        self.room(key)
        if not self.caching.one_device:
            self._room_of_layer(number, key)
        layer.fill(query, key, value, scaling, self._regions_of(key))

    def room_for(self, number: int, key: Tensor) -> Sequence[Tensor]:
        """Where a layer's attention may write its rotated keys and its values [B, G, >= S, d] in prefill, given its keys
        [B, S, G, d] before rotation: into the storage itself where all of them stay."""
        self.room(key.transpose(1, 2))
        if not self.caching.adaptive and self.tensors is not None and self._right:
            layer = self.layers[number]
            return layer.keys, layer.values
        return key.new_empty(2, key.shape[0], *key.shape[2:0:-1], key.shape[3])

    def fill_all(self, kv: Tensor) -> bool:
        """Store keys and values kv [2, L, B, G, S, d] of all layers at once, rows padded on the right, where every layer
        keeps all that it saw and they are of one size; False, and nothing done, where that is not so."""
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
        """The rows as the layer at hand sees them; their indices go to the device once for all layers that agree."""
        known = tuple((row.length, tuple(row.images)) for row in self.rows), key.device
        if known not in self._regions:
            starts = [0 if self._right else key.shape[2] - row.length for row in self.rows]
            self._regions[known] = Regions(self.rows, starts, key.device, with_indices=self.caching.adaptive)
        return self._regions[known]

    # --- decoding --------------------------------------------------------------------------------------------------

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

    def advance(self) -> Tensor:
        """The device's part of the beginning of a step: every layer has one entry more -> [N, B, 1] positions of the new
        tokens, in each of the N ways in which layers count them (`numbering`)."""
        if self._gone:
            raise UserError(GONE)
        first, *others = (part.advance() for part in self._parts)
        return first

    def rank_beside(self) -> None:
        """Re-rank on a side stream of the GPU, beside the layers that follow: the new core is not read before the next
        step, and by its end every step has waited for it."""
        self._side = torch.cuda.Stream(self._last_positions.device)
        for layer in self.layers:
            layer.side = self._side

    def end_step(self) -> None:
        """All of a step is under way but what runs beside it: wait for that too."""
        if self.update_step and self._side is not None:
            torch.cuda.current_stream(self._last_positions.device).wait_stream(self._side)
