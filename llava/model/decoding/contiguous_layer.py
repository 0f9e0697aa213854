"""A layer in which every step reads all entries: the entries of a row are consecutive slots, and there are no lists."""

from __future__ import annotations

from torch import Tensor

from llava.kernels.rotate_append import rotate_append
from llava.model.decoding.layer_cache import LayerCache


class ContiguousLayer(LayerCache):
    """LayerCache of a policy that evicts nothing after prefill and ranks nothing in a step (CachePolicy.contiguous).

    The entries of a row, text and vision alike, are in slots 0 .. front_len - 1. A step's own entry is the last of
    them.
    """

    def _newest(self) -> Tensor:
        return self.front_len.long()[:, None, None, None] - 1

    def append(self, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotate_append(query, key, value, cos, sin, self.keys, self.values, counts=self.front_len)
