"""What a selector sees (ImageTokens), what it returns (Selection), and the rule that every selector obeys.

A selector acts before the LLM, on one image of one sample: it sees the projected vision tokens in
the order in which the LLM would read them, and says which K of them the LLM gets to read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class ImageTokens:
    """The vision tokens of one image, in LLM order (after tiling, unpadding and newline tokens).

    features  [N, D]  projected tokens
    saliency  [N]     head-mean [CLS] attention of the tower layer that gave the features; NaN for newline tokens
    tile      [N]     0 = the whole image (or the only tile), 1.. = crops in raster order; -1 for newline tokens
    row       [N]     patch row inside its tile; for newline tokens the row of the merged grid that it ends
    column    [N]     patch column inside its tile; -1 for newline tokens
    key       int     identifies the sample (hash of input ids, image size, place of the image), for `random`

    All tensors end up on the device of `features`.
    """

    features: Tensor
    saliency: Tensor
    tile: Tensor
    row: Tensor
    column: Tensor
    key: int = 0

    def __post_init__(self):
        n = self.features.shape[0]
        for name in ("saliency", "tile", "row", "column"):
            shape = tuple(getattr(self, name).shape)
            if shape != (n,):
                raise ValueError(f"ImageTokens.{name} has shape {shape}, but there are {n} features")
            setattr(self, name, getattr(self, name).to(self.features.device))

    @property
    def patches(self) -> Tensor:
        """[P] indices of the tokens that are patches, ascending: the candidates of every selector."""
        return torch.nonzero(self.tile >= 0).flatten()


@dataclass
class Selection:
    """What was kept of one image.

    indices   [K]     rows of ImageTokens.features, ascending and distinct; -1 for a token that the method made
                      (`sources` lists what went in). The only duplicates are those of AdaV's compat="public".
    features  [K, D]  what the LLM reads
    tile, row, column [K]  where the kept tokens lie (-1 for made tokens), filled in by `select`
    saliency  [K]     [CLS] attention of the kept tokens (NaN for made and newline tokens), filled in by `select`
    total     int     N, the number of tokens before selection
    report    dict    what the method has to say about its choice (AdaV: k_text, k_saliency, both scores)
    sources   list    for each -1 in `indices`, in order: the indices that were merged into it
    """

    indices: Tensor
    features: Tensor
    tile: Tensor | None = None
    row: Tensor | None = None
    column: Tensor | None = None
    saliency: Tensor | None = None
    total: int = 0
    report: dict = field(default_factory=dict)
    sources: list = field(default_factory=list)


class Selector(ABC):
    """Base of every method that chooses vision tokens before the LLM.

    A subclass is a dataclass whose fields are the options of the method. It implements `keep`.
    """

    needs_image = True  # False: the vision tower is not even run
    uses_budget = True  # False: what is kept does not depend on the budget, and `keep` is always called

    @abstractmethod
    def keep(self, image: ImageTokens, text: Tensor, budget: int) -> Selection:
        """Choose exactly `budget` of the patches of `image`.

        text: [m, D] word embeddings of the question (design: text_scope), m may be 0.
        budget: 1 <= budget < number of patches; `select` has dealt with everything else.
        """


def lowest_index_topk(scores: Tensor, k: int) -> Tensor:
    """Indices [k] of the k largest scores [n] (or [..., n] row by row), best first; ties go to the lowest index.

    torch.topk promises nothing about ties, and half-precision scores tie often.
    """
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k]


def is_number(value) -> bool:
    """Whether an option's value is a number (JSON's true and false are not)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def take(image: ImageTokens, indices: Tensor, **report) -> Selection:
    """The Selection that keeps `indices` [K] (in any order) of `image`, unmerged."""
    indices = torch.sort(indices).values
    return Selection(indices=indices, features=image.features[indices], report=report)


def take_all(image: ImageTokens) -> Selection:
    """The Selection that keeps all N tokens, newline tokens included."""
    return take(image, torch.arange(len(image.tile), device=image.tile.device))


def locate(selection: Selection, image: ImageTokens) -> Selection:
    """Fill in where the kept tokens lie (tile, row, column), their saliency, and N."""
    selection.total = len(image.tile)
    made = selection.indices < 0
    kept = selection.indices[~made]
    for name in ("tile", "row", "column", "saliency"):
        source = getattr(image, name)
        value = source.new_full(selection.indices.shape, float("nan") if name == "saliency" else -1)
        value[~made] = source[kept]
        setattr(selection, name, value)
    return selection
