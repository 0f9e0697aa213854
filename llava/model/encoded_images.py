"""Images after the vision tower, and a bounded store of recent ones, so that questions about one image share them.

Nothing here depends on a question. Tokens of an EncodedImage are selected anew for each question. Where a method zooms,
a question may ask for further tiles of an image; they are then encoded once and stay with it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from llava.methods.before_llm.base import STATES, ImageTokens, TowerStates
from llava.mm_utils import TilePlan
from llava.model.image_tokens import PartLayout

RECORD_BYTES = 1024  # estimate for the Python objects of one image, so that images without tensors count too


class TilesOnDemand:
    """The tiles of one image: pixels of all of them, and what the tower gave for those that a question needed.

    pixels [T, 3, H, W]
    projected: whether features are those after the projector; else they are states of the tower
    """

    def __init__(self, pixels: Tensor, projected: bool):
        self.pixels, self.projected = pixels, projected
        self._known: dict[int, tuple[Tensor, Tensor, TowerStates]] = {}

    def missing(self, tiles: Sequence[int]) -> list[int]:
        """Return those of `tiles` that are not encoded yet."""
        return [tile for tile in tiles if tile not in self._known]

    def add(self, tiles: Sequence[int], features: Tensor, saliency: Tensor, tower: TowerStates) -> None:
        """Add encoded tiles. features [t, P, D or W], saliency [t, P], states [t, ...]: of `tiles`, in their order."""
        for n, tile in enumerate(tiles):
            # Copies: a view would keep the tensors of the whole batch in memory.
            own = {name: state[n].clone() for name, state in _states(tower).items()}
            self._known[tile] = features[n].clone(), saliency[n].clone(), TowerStates(tower.project, **own)

    def of(self, tiles: Sequence[int]) -> tuple[Tensor, Tensor, TowerStates]:
        """Return (features [t, P, D or W], saliency [t, P], states [t, ...]) of encoded tiles."""
        features, saliency, towers = zip(*(self._known[tile] for tile in tiles), strict=True)
        states = {name: torch.stack([getattr(tower, name) for tower in towers]) for name in _states(towers[0])}
        return torch.stack(features), torch.stack(saliency), TowerStates(towers[0].project, **states)

    @property
    def nbytes(self) -> int:
        """Bytes of the pixels and of the states of all tiles, also of those that are not encoded yet."""
        # The store counts an image once, when it comes. So there is room for tiles that are encoded later.
        features, saliency, tower = next(iter(self._known.values()))
        held = [features, saliency, *_states(tower).values()]
        return self.pixels.nbytes + len(self.pixels) * sum(tensor.nbytes for tensor in held)


def _states(tower: TowerStates) -> dict[str, Tensor]:
    """Return the states that are filled in, by name."""
    return {name: getattr(tower, name) for name in STATES if getattr(tower, name) is not None}


@dataclass(frozen=True)
class EncodedImage:
    """One encoded image: its tile plan, and its vision tokens in LLM order; tokens is None under `no_image`.

    total: where the image was made smaller (Selector.resizes), its vision tokens before that; else None
    on_demand: where the method zooms (Selector.zooms), the tiles, from which those of a question are taken; else None
    part: where `tokens` are those of some tiles, their layout; else None
    """

    plan: TilePlan
    tokens: ImageTokens | None
    total: int | None = None
    on_demand: TilesOnDemand | None = None
    part: PartLayout | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors, plus RECORD_BYTES."""
        if self.tokens is None:
            return RECORD_BYTES
        held = [*_tensors(self.tokens), *(_tensors(self.tokens.tower) if self.tokens.tower else [])]
        later = self.on_demand.nbytes if self.on_demand else 0
        return RECORD_BYTES + sum(tensor.nbytes for tensor in held) + later


def _tensors(record) -> list:
    """Return the tensors among the fields of a dataclass instance."""
    values = (getattr(record, f.name) for f in fields(record))
    return [value for value in values if hasattr(value, "nbytes")]


class RecentImages:
    """Encoded images, or tensors of their pixels, by key, up to `capacity` bytes; the least recently used are dropped.

    It belongs to one worker and one checkpoint. The key must contain everything else that the encoding depends on: the
    image file, and the part of the configuration that LlavaMetaForCausalLM.encoding returns.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.nbytes = 0
        self._held: OrderedDict[Hashable, EncodedImage | Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: Hashable) -> EncodedImage | Tensor | None:
        """Return the image of `key` and mark it as used; None where it is not stored."""
        if key in self._held:
            self._held.move_to_end(key)
        return self._held.get(key)

    def put(self, key: Hashable, image: EncodedImage | Tensor) -> None:
        """Store `image`, unless it alone exceeds the capacity."""
        if key in self._held:
            self.nbytes -= self._held.pop(key).nbytes
        if image.nbytes > self.capacity:
            return
        self._held[key] = image
        self.nbytes += image.nbytes
        while self.nbytes > self.capacity:
            self.nbytes -= self._held.popitem(last=False)[1].nbytes
