"""TowerStore: outputs of the vision tower for recent images, in memory of a fixed size.

vLLM's own caches keep results of a method. A method that reads the question has one result per question, so that each
question about an image would run the tower again. What is kept here depends on neither.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.common.transfer import to_device


@dataclass(frozen=True)
class TileStates:
    """Outputs of the tower for T tiles of P patches, all of the layer that gives the features.

    hidden    [T, 1 + P, W]  states, [CLS] first
    saliency  [T, P]         attention from [CLS] to each patch, mean over heads, float32
    keys      [T, 1 + P, d]  unscaled key vectors, mean over heads, float32
    """

    hidden: Tensor
    saliency: Tensor
    keys: Tensor

    def __len__(self) -> int:
        return len(self.hidden)

    def split(self, counts: Sequence[int]) -> list[TileStates]:
        """Return the states of `counts[i]` tiles at a time."""
        parts = (getattr(self, name).split(list(counts)) for name in ("hidden", "saliency", "keys"))
        return [TileStates(*one) for one in zip(*parts, strict=True)]


class TowerStore:
    """Tile states of recent images by key; the least recently used images are dropped.

    patches, width, head_size: P, W and d of TileStates. capacity: bytes, which are taken at once, so that vLLM sees
    them when it measures how much memory is left for the KV cache.
    """

    def __init__(
        self, patches: int, width: int, head_size: int, capacity: int, dtype: torch.dtype, device: torch.device
    ):
        shapes = {"hidden": (1 + patches, width), "saliency": (patches,), "keys": (1 + patches, head_size)}
        dtypes = {"hidden": dtype, "saliency": torch.float32, "keys": torch.float32}
        tile = sum(torch.Size(shape).numel() * dtypes[name].itemsize for name, shape in shapes.items())
        tiles = capacity // tile
        self._states = TileStates(
            **{name: torch.empty(tiles, *shape, dtype=dtypes[name], device=device) for name, shape in shapes.items()}
        )
        self._free = list(range(tiles))
        self._held: OrderedDict[Hashable, list[int]] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes of the memory, whether it is used or not."""
        return sum(tensor.nbytes for tensor in vars(self._states).values())

    def __len__(self) -> int:
        return len(self._held)

    def get(self, keys: Sequence[Hashable]) -> dict[Hashable, TileStates]:
        """Return copies of the states of those `keys` that are stored, and mark them as used."""
        found = {key: self._held[key] for key in keys if key in self._held}
        if not found:
            return {}
        for key in found:
            self._held.move_to_end(key)
        places = self._index([place for own in found.values() for place in own])
        copies = TileStates(**{name: held.index_select(0, places) for name, held in vars(self._states).items()})
        return dict(zip(found, copies.split([len(own) for own in found.values()]), strict=True))

    def put(self, key: Hashable, states: TileStates) -> None:
        """Store the states of an image, unless it alone exceeds the memory."""
        self._free += self._held.pop(key, [])
        if len(states) > len(self._states):
            return
        while len(self._free) < len(states):
            self._free += self._held.popitem(last=False)[1]
        own, self._free = self._free[: len(states)], self._free[len(states) :]
        self._held[key] = own
        places = self._index(own)
        for name, held in vars(self._states).items():
            held.index_copy_(0, places, getattr(states, name))

    def _index(self, places: list[int]) -> Tensor:
        return to_device(torch.tensor(places), self._states.hidden.device)
