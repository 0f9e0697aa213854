"""TowerStore: outputs of the vision tower for recent images, in memory of a fixed size.

vLLM's own caches keep results of a method. A method that reads the question has one result per question, so that each
question about an image would run the tower again. What is kept here depends on neither.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.integrations.vllm.row_store import RowStore


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

    patches, width, head_size: P, W and d of TileStates. capacity: as in RowStore; a row is a tile.
    """

    def __init__(
        self, patches: int, width: int, head_size: int, capacity: int, dtype: torch.dtype, device: torch.device
    ):
        shapes = {"hidden": (1 + patches, width), "saliency": (patches,), "keys": (1 + patches, head_size)}
        dtypes = {"hidden": dtype, "saliency": torch.float32, "keys": torch.float32}
        self._rows = RowStore({name: (shape, dtypes[name]) for name, shape in shapes.items()}, capacity, device)

    @property
    def nbytes(self) -> int:
        """Bytes of the memory, whether it is used or not."""
        return self._rows.nbytes

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, keys: Sequence[Hashable]) -> dict[Hashable, TileStates]:
        """Return copies of the states of those `keys` that are stored, and mark them as used."""
        return {key: TileStates(**states) for key, states in self._rows.get(keys).items()}

    def put(self, key: Hashable, states: TileStates) -> None:
        """Store the states of an image, unless it alone exceeds the memory."""
        self._rows.put(key, vars(states))
