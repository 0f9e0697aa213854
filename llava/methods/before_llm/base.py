"""Base class of all selectors, their input (ImageTokens) and their result (Selection).

A selector acts before the LLM, on one image of one sample. It sees the projected vision tokens in LLM order and returns
the K tokens that the LLM reads.
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

STATES = ("hidden", "keys", "text_cosine", "received")  # the fields of TowerStates that hold a state


class TokenPlaces:
    """The places of the N vision tokens of an image, as tensors on the host.

    The places follow from the tile plan, so they are known on the host without waiting for the device.

    tile, row, column  int64 [N], as in ImageTokens
    patches            [P] indices of the tokens that are patches, ascending
    sizes              patches of each tile, up to the last tile that has one
    members            [T, M] the patches of each tile in raster order, as indices into `patches`; 0 in the padding
    real               [T, M] False in the padding. Unpadding leaves tiles of different size; M is that of the largest.
    blank              [P] True for patches that show only padding of a square; by default nowhere
    """

    # Tensors are made outside inference mode: autograd refuses others, and a training step may read them next.

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
        # Patches of different tiles are interleaved in LLM order, so they are sorted by (tile, row, column).
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

    @cached_property
    @torch.inference_mode(False)
    def blank(self) -> Tensor:
        return torch.zeros(len(self.patches), dtype=torch.bool)

    def in_whole_tiles(self, side: int) -> Tensor:
        """Return each patch's index [P] in the tower's output: all tiles of side x side patches one after another."""
        tile, row, column = (place[self.patches] for place in (self.tile, self.row, self.column))
        return (tile * side + row) * side + column

    @torch.inference_mode(False)
    def on(self, device: torch.device, name: str) -> Tensor:
        """Return the tensor `name` of this object on `device`. It is sent there once."""
        key = name, device
        if key not in self._sent:
            self._sent[key] = to_device(getattr(self, name), device)
        return self._sent[key]

    @torch.inference_mode(False)
    def without(self, tokens: Tensor) -> TokenPlaces:
        """Return the places of the same tokens if those at `tokens` (indices on the host) are no patches."""
        tile = self.tile.index_fill(0, tokens, -1)
        places = TokenPlaces(tile, self.row, self.column)
        places.blank = self.blank[tile[self.patches] >= 0]
        places._sent = {key: sent for key, sent in self._sent.items() if key[0] in ("row", "column")}
        return places

    def describes(self, image: ImageTokens) -> bool:
        """Return whether the place tensors of `image` are the very tensors that were sent from here."""
        # By identity, because a comparison of values would wait for the device.
        own = ((name, getattr(image, name)) for name in ("tile", "row", "column"))
        return all(tensor is self._sent.get((name, tensor.device)) for name, tensor in own)

    @classmethod
    def from_image(cls, image: ImageTokens) -> TokenPlaces:
        """Return the places of an image that has none. This copies its three place tensors to the host, in one copy."""
        names = ("tile", "row", "column")
        places = cls(*to_host(torch.stack([getattr(image, name).long() for name in names])).unbind())
        places._sent = {(name, image.features.device): getattr(image, name) for name in names}
        return places


@dataclass
class TowerStates:
    """States of the vision tower for one image of T tiles. A state is filled in where `Selector.tower_states` names it.

    project      [n, W] -> [n, D]: hidden states through the projector, on its device and in its dtype
    hidden       [T, 1 + P, W]  states of the layer that gave the features, [CLS] first, before the projector
    keys         [T, 1 + P, d]  key vectors of that layer, unscaled, mean over heads
    text_cosine  [T, P]         cosine of patch and question in CLIP's joint space, mean over the parts of the question;
                                zero where there is no question
    received     [T, P, 2]      attention that each patch receives, mean over heads and over all queries of its tile,
                                [CLS] included: in a middle layer, and in the layer that gave the features
    """

    project: Callable[[Tensor], Tensor]
    hidden: Tensor | None = None
    keys: Tensor | None = None
    text_cosine: Tensor | None = None
    received: Tensor | None = None


@dataclass
class ImageTokens:
    """The vision tokens of one image, in LLM order (after tiling, unpadding and newline tokens).

    features  [N, D]  projected tokens
    saliency  [N]     head-mean [CLS] attention of the tower layer that gave the features; NaN for newline tokens
    tile      [N]     0 = the whole image (or the only tile), 1.. = crops in raster order; -1 for newline tokens
    row       [N]     patch row inside its tile; for newline tokens the row of the merged grid that it ends
    column    [N]     patch column inside its tile; -1 for newline tokens
    detail    [N]     gradient energy of the pixels of each patch, any value for newline tokens; only with
                      options.detail_share (detail.py)
    key       int     identifies the sample (hash of input ids, image size, place of the image), for `random`
    tower             states of the tower, tile by tile, that only some methods read
    unprojected       None, or a function from rows of `features` to LLM embeddings. `features` are then [N, W] states
                      of the tower (zero for newline tokens), and only kept tokens go through the projector. This is for
                      methods that do not read features (Selector.reads_features), where some tokens are dropped.

    places            the places of the tokens on the host. It may be left out; it is then computed on first use.

    All tensors are moved to the device of `features`. ValueError for a tensor whose length is not N.
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
    detail: Tensor | None = None

    def __post_init__(self):
        n = self.features.shape[0]
        if self.places is not None and not self.places.describes(self):
            self.places = None
        where = [self.tile, self.row, self.column]
        if self.places is None and self.features.is_cuda and not any(tensor.is_cuda for tensor in where):
            # The places were given on the host. Keeping them here saves a copy back from the device later.
            self.places = TokenPlaces(*(tensor.long() for tensor in where))
        scores = ("saliency",) if self.detail is None else ("saliency", "detail")
        for name in (*scores, "tile", "row", "column"):
            shape = tuple(getattr(self, name).shape)
            if shape != (n,):
                raise ValueError(f"ImageTokens.{name} has shape {shape}, but there are {n} features")
            placed = name not in scores and self.places is not None
            setattr(self, name, self.place(name) if placed else getattr(self, name).to(self.features.device))
        if self.tower is not None:
            states = {name: getattr(self.tower, name) for name in STATES}
            moved = {name: state.to(self.features.device) for name, state in states.items() if state is not None}
            self.tower = replace(self.tower, **moved)

    @property
    def on_host(self) -> TokenPlaces:
        """The places of the tokens on the host."""
        if self.places is None:
            self.places = TokenPlaces.from_image(self)
        return self.places

    def place(self, name: str) -> Tensor:
        """Return the tensor `name` of TokenPlaces on the device of the features."""
        return self.on_host.on(self.features.device, name)

    @property
    def patches(self) -> Tensor:
        """[P] indices of the tokens that are patches, ascending: the candidates of every selector."""
        return self.place("patches")

    def read(self, indices: Tensor) -> Tensor:
        """Return the LLM embeddings [k, D] of the tokens at `indices` [k]."""
        rows = self.features[indices]
        return rows if self.unprojected is None else self.unprojected(rows)

    def of_patches(self, states: Tensor) -> Tensor:
        """Return the states [P, ...] of `patches`, from the tower's states [T, patches of a whole tile, ...]."""
        place = self.on_host.in_whole_tiles(math.isqrt(states.shape[1]))
        return states.flatten(0, 1)[to_device(place, states.device)]


@dataclass
class Selection:
    """The vision tokens that are kept of one image.

    indices   [K]     rows of ImageTokens.features, ascending and distinct. -1 is a merged token, which may stand
                      anywhere in the order. Under compat="public", AdaV gives duplicates, and HoloV and PruneSID give
                      the order of their authors' code.
    features  [K, D]  embeddings that the LLM reads
    tile, row, column [K]  places of the kept tokens (-1 for merged tokens), filled in by `select`
    saliency  [K]     [CLS] attention of the kept tokens (NaN for merged and newline tokens), filled in by `select`
    total     int     N, the number of tokens before selection
    report    dict    details of the method's choice (AdaV: k_text, k_saliency, both scores); with options.detail_share,
                      "detail": bool [K], True for patches that are kept for their detail
    sources   list    for each -1 in `indices`, in order: the indices that were merged into it; empty for a [CLS] token
    tiles     tuple   numbers of the tiles that were encoded, ascending, where the method zooms; None: all tiles
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
    tiles: tuple[int, ...] | None = None


class Selector(ABC):
    """Base of every method that chooses vision tokens before the LLM.

    A subclass is a dataclass whose fields are the options of the method. It implements `keep`.
    """

    needs_image = True  # False: the vision tower does not run
    uses_budget = True  # False: `keep` does not depend on the budget, and is always called
    reads_features = True  # False: `keep` does not read ImageTokens.features, so only kept tokens are projected
    reads_text = True  # False: `keep` does not read the question, so questions about an image share its kept tokens
    reads_key = False  # True: `keep` reads ImageTokens.key
    resizes = False  # True: the image is made smaller before the tower; `keep` gets what it has then
    zooms = False  # True: only some crops of the image are encoded (zoom.py); `keep` gets the tokens of those tiles
    # True: some tokens (index -1) are no patch, so they have no original position. Where an option decides, the instance
    # has the attribute.
    makes_tokens = False
    tower_states: tuple[str, ...] = ()  # fields of ImageTokens.tower that `keep` reads
    ignored_options: tuple[str, ...] = ()  # options of the prompt (options.COMMON_OPTIONS) that have no effect on it
    # A method question -> words, for a method that reads some words of the user's turn in place of all question tokens.
    # Each word is tokenised by itself. It has an effect where the checkpoint has a tokenizer.
    words: Callable[[str], list[str]] | None = None

    def __post_init__(self):
        check_options(self)

    def num_kept(self, image: ImageTokens, budget: int) -> int:
        """Return how many tokens of `image` are kept under `budget`: the budget, unless an option overrides it.

        Only the places of the tokens are read, because vLLM lays out a prompt before the tower runs. UserError for
        options that do not fit them; `keep` raises none, because vLLM's engine ends with an error in it.
        """
        return budget

    @abstractmethod
    def keep(self, image: ImageTokens, text: Tensor, budget: int) -> Selection:
        """Return the Selection of exactly `budget` of the patches of `image`.

        text: [m, D] word embeddings of the question (option text_scope), m may be 0
        budget: 1 <= budget < number of patches; `select` handles all other budgets
        """

    def keep_all(self, images: list[ImageTokens], texts: list[Tensor], budgets: list[int]) -> list[Selection]:
        """Return the Selection of every image of a batch of at least one image: `keep` for each of them."""
        return [self.keep(*one) for one in zip(images, texts, budgets, strict=True)]


def take(image: ImageTokens, indices: Tensor, **report) -> Selection:
    """Return the Selection that keeps the tokens at `indices` [K] (in any order) of `image`, without merging."""
    # The LLM reads kept tokens in LLM order, whatever order a method chose them in.
    indices = torch.sort(indices).values
    return Selection(indices=indices, features=image.read(indices), report=report)


def take_all(image: ImageTokens) -> Selection:
    """Return the Selection that keeps all N tokens, newline tokens included."""
    return take(image, torch.arange(len(image.tile), device=image.tile.device))


def locate(selection: Selection, image: ImageTokens) -> Selection:
    """Fill in the places of the kept tokens (tile, row, column), their saliency, and N; return the same Selection."""
    selection.total = len(image.tile)
    made, kept = selection.indices < 0, selection.indices.clamp(min=0)
    for name in ("tile", "row", "column", "saliency"):
        value = getattr(image, name)[kept].masked_fill(made, float("nan") if name == "saliency" else -1)
        setattr(selection, name, value)
    return selection
