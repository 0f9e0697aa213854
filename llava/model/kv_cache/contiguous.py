"""A layer whose entries are all read at every step: one run of slots per row, and no lists."""

from __future__ import annotations

import torch
from torch import Tensor

from llava.model.kv_cache.storage import LayerCache


class ContiguousLayer(LayerCache):
    """LayerCache of a policy that evicts nothing after prefill and ranks nothing in a step (CachePolicy.contiguous).

    Slots 0 .. front_len - 1 of a row are its entries, text and image alike, and the next entry takes the next slot.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            return key_states, value_states
        slot = self.front_len.long()[:, None, None, None].expand_as(key_states)
        self.keys.scatter_(2, slot, key_states)
        self.values.scatter_(2, slot, value_states)
        self.front_len += 1
        return self.keys, self.values

    def _allocate(self, key: Tensor) -> None:
        super()._allocate(key)
        self.front_len += self.text_len[:, 0]
        self.text, self.text_len = self.text[..., :0].clone(), torch.zeros_like(self.text_len)
