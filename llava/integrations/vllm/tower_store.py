"""TowerStore: outputs of the vision tower for recent images, in memory of a fixed size.

vLLM's own caches keep results of a method. A method that reads the question has one result per question, so that each
question about an image would run the tower again. What is kept here depends on neither.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from llava.integrations.vllm.row_store import RowStore


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

    @classmethod
    def joined(cls, parts: Sequence[TileStates]) -> TileStates:
        """Return the states of all tiles of `parts`; `received` is None unless all parts have it."""
        common = set.intersection(*(set(part.given()) for part in parts))
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in common})

    def given(self) -> dict[str, Tensor]:
        """Return the states by name, without those that are None."""
        states = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: state for name, state in states.items() if state is not None}


class TowerStore:
    """Tile states of recent images by key; the least recently used images are dropped.

    patches, width, head_size: P, W and d of TileStates. capacity: as in RowStore; a row is a tile.
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
        rows = {name: (shape, dtype if name == "hidden" else torch.float32) for name, shape in shapes.items()}
        self._rows = RowStore(rows, capacity, device)

    @property
    def nbytes(self) -> int:
        """Bytes of the memory, whether it is used or not."""
        return self._rows.nbytes

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, keys: Sequence[Hashable]) -> dict[Hashable, TileStates]:
        """Return copies of the states of those `keys` that are stored, and mark them as used."""
        return {key: TileStates(**states) for key, states in self._rows.get(keys).items()}

    def put(self, images: Mapping[Hashable, TileStates]) -> None:
        """Store the states of images, one after another. An image that alone exceeds the memory is not stored."""
        self._rows.put({key: states.given() for key, states in images.items()})
