"""What a selector sees (ImageTokens), what it returns (Selection), and the rule that every selector obeys.

A selector acts before the LLM, on one image of one sample: it sees the projected vision tokens in
the order in which the LLM would read them, and says which K of them the LLM gets to read.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from llava.common.transfer import to_device, to_host
from llava.methods.options import check_options


class TokenPlaces:
    """Where the N vision tokens of an image lie, on the host: a tile plan tells, so that no device has to be asked.

    tile, row, column: int64 [N], as in ImageTokens. patches [P]: which tokens are patches, ascending. sizes: patches of
    each tile, up to the last tile that has one. members [T, M], real [T, M]: the patches of each tile, as indices into
    `patches`, in raster order; unpadding leaves tiles of different size, M is that of the largest, and `real` is False in
    the padding, whose member is 0. A request for an answer may be the first to ask for them and a training step the next,
    so all are made outside inference mode.
    """

    def __init__(self, tile: Tensor, row: Tensor, column: Tensor):
        self.tile, self.row, self.column = tile, row, column
        self.patches = torch.nonzero(tile >= 0).flatten()
        self._sent: dict[tuple[str, torch.device], Tensor] = {}

    @cached_property
    def sizes(self) -> list[int]:
        return torch.bincount(self.tile[self.patches]).tolist()

    @cached_property
    @torch.inference_mode(False)
    def members(self) -> Tensor:
        tile, row, column = (place[self.patches] for place in (self.tile, self.row, self.column))
        sizes = torch.bincount(tile)
        raster = (tile * (row.max() + 1) + row) * (column.max() + 1) + column
        order = torch.argsort(raster)
        start = sizes.cumsum(0) - sizes
        members = order.new_zeros(len(sizes), max(self.sizes))
        members[tile[order], torch.arange(len(order)) - start[tile[order]]] = order
        return members

    @cached_property
    @torch.inference_mode(False)
    def real(self) -> Tensor:
        return torch.arange(max(self.sizes)) < torch.tensor(self.sizes)[:, None]

    def in_whole_tiles(self, side: int) -> Tensor:
        """[P] where each patch lies when all tiles, of side x side patches, are laid out one after another."""
        tile, row, column = (place[self.patches] for place in (self.tile, self.row, self.column))
        return (tile * side + row) * side + column

    @torch.inference_mode(False)
    def on(self, device: torch.device, name: str) -> Tensor:
        """One of the tensors above, on a device. It is sent there once."""
        key = name, device
        if key not in self._sent:
            self._sent[key] = to_device(getattr(self, name), device)
        return self._sent[key]

    def describes(self, image: ImageTokens) -> bool:
        """Whether the tensors of `image` are those that were sent from here."""
        own = ((name, getattr(image, name)) for name in ("tile", "row", "column"))
        return all(tensor is self._sent.get((name, tensor.device)) for name, tensor in own)

    @classmethod
    def from_image(cls, image: ImageTokens) -> TokenPlaces:
        """Those of an image that came without: the device is asked once."""
        names = ("tile", "row", "column")
        places = cls(*to_host(torch.stack([getattr(image, name).long() for name in names])).unbind())
        places._sent = {(name, image.features.device): getattr(image, name) for name in names}
        return places


@dataclass
class TowerStates:
    """What only some methods read of one image of T tiles: filled in where `Selector.tower_states` names it.

    project      [n, W] -> [n, D]: hidden rows through the projector, on its device and in its dtype
    hidden       [T, 1 + P, W]  states of the layer that gave the features, [CLS] first, before the projector
    keys         [T, 1 + P, d]  key vectors of that layer, unscaled, mean over heads
    text_cosine  [T, P]         cosine of patch and question in CLIP's joint space, mean over the parts of the question;
                                zero where there is no question
    """

    project: Callable[[Tensor], Tensor]
    hidden: Tensor | None = None
    keys: Tensor | None = None
    text_cosine: Tensor | None = None


@dataclass
class ImageTokens:
    """The vision tokens of one image, in LLM order (after tiling, unpadding and newline tokens).

    features  [N, D]  projected tokens
    saliency  [N]     head-mean [CLS] attention of the tower layer that gave the features; NaN for newline tokens
    tile      [N]     0 = the whole image (or the only tile), 1.. = crops in raster order; -1 for newline tokens
    row       [N]     patch row inside its tile; for newline tokens the row of the merged grid that it ends
    column    [N]     patch column inside its tile; -1 for newline tokens
    key       int     identifies the sample (hash of input ids, image size, place of the image), for `random`
    tower             tile by tile, what only some methods read
    unprojected       None, or what turns rows of `features` into what the LLM reads: `features` are then [N, W] states of
                      the tower (zero for newline tokens), so that only what is kept goes through the projector. For
                      methods that do not read features (Selector.reads_features), where not everything is kept.

    places            where the tokens lie, on the host. Whoever makes an ImageTokens by hand leaves it out: it is found out
                      when it is first needed.

    All tensors end up on the device of `features`.
    """

    features: Tensor
    saliency: Tensor
    tile: Tensor
    row: Tensor
    column: Tensor
    key: int = 0
    tower: TowerStates | None = None
    unprojected: Callable[[Tensor], Tensor] | None = None
    places: TokenPlaces | None = field(default=None, repr=False, compare=False)

    def __post_init__(self):
        n = self.features.shape[0]
        if self.places is not None and not self.places.describes(self):
            self.places = None
        where = [self.tile, self.row, self.column]
        if self.places is None and self.features.is_cuda and not any(tensor.is_cuda for tensor in where):
            # Made by hand: what is still on the host need not be asked for later.
            self.places = TokenPlaces(*(tensor.long() for tensor in where))
        for name in ("saliency", "tile", "row", "column"):
            shape = tuple(getattr(self, name).shape)
            if shape != (n,):
                raise ValueError(f"ImageTokens.{name} has shape {shape}, but there are {n} features")
            placed = name != "saliency" and self.places is not None
            setattr(self, name, self.place(name) if placed else getattr(self, name).to(self.features.device))
        if self.tower is not None:
            states = {name: getattr(self.tower, name) for name in ("hidden", "keys", "text_cosine")}
            moved = {name: state.to(self.features.device) for name, state in states.items() if state is not None}
            self.tower = replace(self.tower, **moved)

    @property
    def on_host(self) -> TokenPlaces:
        """Where the tokens lie, on the host."""
        if self.places is None:
            self.places = TokenPlaces.from_image(self)
        return self.places

    def place(self, name: str) -> Tensor:
        """One of the tensors of TokenPlaces, on the device of the features."""
        return self.on_host.on(self.features.device, name)

    @property
    def patches(self) -> Tensor:
        """[P] indices of the tokens that are patches, ascending: the candidates of every selector."""
        return self.place("patches")

    def read(self, indices: Tensor) -> Tensor:
        """[k, D] what the LLM reads of the tokens at `indices` [k]."""
        rows = self.features[indices]
        return rows if self.unprojected is None else self.unprojected(rows)

    def of_patches(self, states: Tensor) -> Tensor:
        """[P, ...] what belongs to each of `patches`, out of [T, patches of a whole tile, ...] tile by tile."""
        place = self.on_host.in_whole_tiles(math.isqrt(states.shape[1]))
        return states.flatten(0, 1)[to_device(place, states.device)]


@dataclass
class Selection:
    """What was kept of one image.

    indices   [K]     rows of ImageTokens.features, ascending and distinct; -1 for a token that the method made
                      (`sources` lists what went in), wherever in the order the method puts it. The only duplicates are
                      those of AdaV's compat="public".
    features  [K, D]  what the LLM reads
    tile, row, column [K]  where the kept tokens lie (-1 for made tokens), filled in by `select`
    saliency  [K]     [CLS] attention of the kept tokens (NaN for made and newline tokens), filled in by `select`
    total     int     N, the number of tokens before selection
    report    dict    what the method has to say about its choice (AdaV: k_text, k_saliency, both scores)
    sources   list    for each -1 in `indices`, in order: the indices that were merged into it; none for a [CLS] token
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
    reads_features = True  # False: the choice does not depend on ImageTokens.features
    makes_tokens = False  # True: some tokens (index -1) are no patch, so they have no original position
    tower_states: tuple[str, ...] = ()  # what `keep` reads of ImageTokens.tower, by the names of its fields

    def __post_init__(self):
        check_options(self)

    def num_kept(self, image: ImageTokens, budget: int) -> int:
        """How many tokens are kept of `image` where `budget` were asked for: as many, unless an option says otherwise."""
        return budget

    @abstractmethod
    def keep(self, image: ImageTokens, text: Tensor, budget: int) -> Selection:
        """Choose exactly `budget` of the patches of `image`.

        text: [m, D] word embeddings of the question (design: text_scope), m may be 0.
        budget: 1 <= budget < number of patches; `select` has dealt with everything else.
        """

    def keep_all(self, images: list[ImageTokens], texts: list[Tensor], budgets: list[int]) -> list[Selection]:
        """`keep` for every image of a batch, of which there is at least one."""
        return [self.keep(*one) for one in zip(images, texts, budgets, strict=True)]


def take(image: ImageTokens, indices: Tensor, **report) -> Selection:
    """The Selection that keeps `indices` [K] (in any order) of `image`, unmerged."""
    indices = torch.sort(indices).values
    return Selection(indices=indices, features=image.read(indices), report=report)


def take_all(image: ImageTokens) -> Selection:
    """The Selection that keeps all N tokens, newline tokens included."""
    return take(image, torch.arange(len(image.tile), device=image.tile.device))


def locate(selection: Selection, image: ImageTokens) -> Selection:
    """Fill in where the kept tokens lie (tile, row, column), their saliency, and N."""
    selection.total = len(image.tile)
    made, kept = selection.indices < 0, selection.indices.clamp(min=0)
    for name in ("tile", "row", "column", "saliency"):
        value = getattr(image, name)[kept].masked_fill(made, float("nan") if name == "saliency" else -1)
        setattr(selection, name, value)
    return selection
