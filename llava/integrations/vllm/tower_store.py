"""TowerStore: outputs of the vision tower for recent images, in memory of a fixed size.

vLLM's own caches keep results of a method. A method that reads the question has one result per question, so that each
question about an image would run the tower again. What is kept here depends on neither.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from llava.common.transfer import to_device


@dataclass(frozen=True)
class TileStates:
    """Outputs of the tower for T tiles of P patches, of the layer that gives the features.

    hidden    [T, 1 + P, W]  states, [CLS] first
    saliency  [T, P]         attention from [CLS] to each patch, mean over heads, float32
    keys      [T, 1 + P, d]  unscaled key vectors, mean over heads, float32
    received  [T, P, 2]      attention that each patch receives, as TowerStates has it, float32; None where no method
                             asked for it, because it needs a whole attention map per head in two layers
    """

    hidden: Tensor
    saliency: Tensor
    keys: Tensor
    received: Tensor | None = None

    def __len__(self) -> int:
        return len(self.hidden)

    def split(self, counts: Sequence[int]) -> list[TileStates]:
        """Return the states of `counts[i]` tiles at a time."""
        split = {name: state.split(list(counts)) for name, state in self.given().items()}
        return [TileStates(**{name: parts[i] for name, parts in split.items()}) for i in range(len(counts))]

    def given(self) -> dict[str, Tensor]:
        """Return the states by name, without those that are None."""
        states = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: state for name, state in states.items() if state is not None}


@dataclass(frozen=True)
class _Held:
    """A stored image. places: of its tiles in the memory. received: whether this state of it was given."""

    places: list[int]
    received: bool


class TowerStore:
    """Tile states of recent images by key; the least recently used images are dropped.

    patches, width, head_size: P, W and d of TileStates. capacity: bytes, which are taken at once, so that vLLM sees
    them when it measures how much memory is left for the KV cache.
    """

    def __init__(
        self, patches: int, width: int, head_size: int, capacity: int, dtype: torch.dtype, device: torch.device
    ):
        shapes = {
            "hidden": (1 + patches, width),
            "saliency": (patches,),
            "keys": (1 + patches, head_size),
            "received": (patches, 2),
        }
        dtypes = {name: dtype if name == "hidden" else torch.float32 for name in shapes}
        tile = sum(torch.Size(shape).numel() * dtypes[name].itemsize for name, shape in shapes.items())
        tiles = capacity // tile
        self._states = TileStates(
            **{name: torch.empty(tiles, *shape, dtype=dtypes[name], device=device) for name, shape in shapes.items()}
        )
        self._free = list(range(tiles))
        self._held: OrderedDict[Hashable, _Held] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes of the memory, whether it is used or not."""
        return sum(tensor.nbytes for tensor in self._states.given().values())

    def __len__(self) -> int:
        return len(self._held)

    def get(self, keys: Sequence[Hashable]) -> dict[Hashable, TileStates]:
        """Return copies of the states of those `keys` that are stored, and mark them as used."""
        found = {key: self._held[key] for key in keys if key in self._held}
        if not found:
            return {}
        for key in found:
            self._held.move_to_end(key)
        places = self._index([place for own in found.values() for place in own.places])
        copies = TileStates(**{name: held.index_select(0, places) for name, held in self._states.given().items()})
        states = dict(zip(found, copies.split([len(own.places) for own in found.values()]), strict=True))
        return {key: one if found[key].received else replace(one, received=None) for key, one in states.items()}

    def put(self, key: Hashable, states: TileStates) -> None:
        """Store the states of an image, unless it alone exceeds the memory."""
        if key in self._held:
            self._free += self._held.pop(key).places
        if len(states) > len(self._states):
            return
        while len(self._free) < len(states):
            self._free += self._held.popitem(last=False)[1].places
        own, self._free = self._free[: len(states)], self._free[len(states) :]
        self._held[key] = _Held(own, states.received is not None)
        places = self._index(own)
        for name, state in states.given().items():
            getattr(self._states, name).index_copy_(0, places, state)

    def _index(self, places: list[int]) -> Tensor:
        return to_device(torch.tensor(places), self._states.hidden.device)
