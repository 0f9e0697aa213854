"""RowStore: tensors of recent images, row by row, in memory of a fixed size."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.common.transfer import to_device


@dataclass(frozen=True)
class _Held:
    """A stored image. places: of its rows in the memory. names: of the tensors that it has."""

    places: list[int]
    names: frozenset[str]


class RowStore:
    """Tensors of recent images by key; the least recently used images are dropped.

    row: name of a tensor -> (shape of one row, dtype). All tensors of an image have the same number of rows. An image may
        lack some of them; its rows have memory for all.
    capacity: bytes, which are taken at once, so that vLLM sees them when it measures how much memory is left for the KV
        cache.
    """

    def __init__(self, row: Mapping[str, tuple[tuple[int, ...], torch.dtype]], capacity: int, device: torch.device):
        size = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in row.values())
        self.rows = capacity // size
        self._memory = {
            name: torch.empty(self.rows, *shape, dtype=dtype, device=device) for name, (shape, dtype) in row.items()
        }
        self._device = device
        self._free = list(range(self.rows))
        self._held: OrderedDict[Hashable, _Held] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes of the memory, whether it is used or not."""
        return sum(tensor.nbytes for tensor in self._memory.values())

    def __len__(self) -> int:
        return len(self._held)

    def get(self, keys: Sequence[Hashable]) -> dict[Hashable, dict[str, Tensor]]:
        """Return copies of the tensors of those `keys` that are stored, and mark them as used."""
        found = {key: self._held[key] for key in keys if key in self._held}
        if not found:
            return {}
        for key in found:
            self._held.move_to_end(key)
        places = self._index([place for held in found.values() for place in held.places])
        counts = [len(held.places) for held in found.values()]
        parts = {name: memory.index_select(0, places).split(counts) for name, memory in self._memory.items()}
        return {
            key: {name: own[i] for name, own in parts.items() if name in held.names}
            for i, (key, held) in enumerate(found.items())
        }

    def put(self, images: Mapping[Hashable, Mapping[str, Tensor]]) -> None:
        """Store the tensors of images, one image after another. An image that alone exceeds the memory is not stored."""
        for key, tensors in images.items():
            if key in self._held:
                self._free += self._held.pop(key).places
            count = len(next(iter(tensors.values())))
            if count > self.rows:
                continue
            while len(self._free) < count:
                self._free += self._held.popitem(last=False)[1].places
            own, self._free = self._free[:count], self._free[count:]
            self._held[key] = _Held(own, frozenset(tensors))
        # An image may have made room for a later one of the same call. One copy per tensor stores all others.
        stored = [key for key in images if key in self._held]
        for name, memory in self._memory.items():
            own = [key for key in stored if name in self._held[key].names]
            if own:
                places = self._index([place for key in own for place in self._held[key].places])
                memory.index_copy_(0, places, torch.cat([images[key][name] for key in own]))

    def _index(self, places: list[int]) -> Tensor:
        return to_device(torch.tensor(places), self._device)
