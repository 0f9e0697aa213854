"""From states of the vision tower to the ImageTokens of an image, in the order in which the LLM reads them.

The steps are apart from the model, because other engines run the tower and the projector themselves.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from llava.common.transfer import to_device, to_host
from llava.methods.before_llm import ImageTokens, Selection, Selector, TowerStates
from llava.methods.before_llm.base import TokenPlaces
from llava.methods.before_llm.downsample import smaller_side
from llava.methods.before_llm.zoom import Zoom
from llava.mm_utils import NEWLINE, TilePlan, blank_patches, crop_overlap, merge_order, picture_bounds


class Layout(TokenPlaces):
    """The places of the tokens of one tile plan.

    source [N]: index of each token's patch in the tower's output; newline [N]: True for newline tokens
    blank: patches that show only padding, as TokenPlaces has them; None for an image without padding
    bounds [T, 4]: the part of each tile that shows the image, see mm_utils.picture_bounds
    newlines_alone: see TilePlan
    """

    def __init__(self, order: Tensor, side: int, blank: Tensor | None, bounds: Tensor, newlines_alone: int):
        per_tile = side * side
        self.newlines_alone = newlines_alone
        self.newline, self.source = order == NEWLINE, order.clamp(min=0)
        self.newlines, self.bounds = int(self.newline.sum()), bounds
        tile, row = self.source // per_tile, self.source % per_tile // side
        # A newline token ends a row of the merged crops, so its row is the number of newlines before it.
        row = torch.where(self.newline, self.newline.long().cumsum(0) - 1, row)
        super().__init__(tile.masked_fill(self.newline, -1), row, (self.source % side).masked_fill(self.newline, -1))
        if blank is not None:
            self.blank = blank


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # cached tensors may index tensors with gradients, which inference tensors must not
def layout_of(plan: TilePlan, side: int, tiles: int) -> Layout:
    """Return the layout of a tile plan. side: patches per side of a tile; tiles: number of tiles that the tower got."""
    where = blank_patches(plan, side), picture_bounds(plan, tiles)
    return Layout(merge_order(plan, side, tiles), side, *where, plan.newlines_alone)


class PartLayout(Layout):
    """The places of the tokens of some tiles of an image. The tiles are numbered 0, 1, .. in their order.

    tiles: their numbers in the image, ascending. total: tokens of the whole image
    whole_index [n + 1]: index of each of the n tokens among all tokens of the image; the last entry is -1
    whole_tile [t + 1]: number of each of the t tiles in the image; the last entry is -1
    """

    def __init__(self, plan: TilePlan, side: int, tiles: tuple[int, ...]):
        order, whole, per_tile = merge_order(plan, side), layout_of(plan, side, plan.tiles), side * side
        number = torch.full((plan.tiles,), -1)
        number[list(tiles)] = torch.arange(len(tiles))
        place = order.clamp(min=0)
        own = (number[place // per_tile] * per_tile + place % per_tile).masked_fill(order == NEWLINE, NEWLINE)
        # A newline token ends a whole row of crops, so it is there only with all of them.
        complete = all(tile in tiles for tile, size in enumerate(whole.sizes) if size)
        kept = torch.nonzero((number[place // per_tile] >= 0) & (complete | (order != NEWLINE))).flatten()
        super().__init__(own[kept], side, None, None, plan.newlines_alone)
        self.tiles, self.total = tiles, len(order)
        self.whole_index = torch.nn.functional.pad(kept, (0, 1), value=-1)
        self.whole_tile = torch.tensor([*tiles, -1])

    def in_whole_image(self, selection: Selection) -> None:
        """Describe a Selection among these tokens as one among all tokens of the image. Scores elsewhere are NaN."""
        # The index -1 of merged tokens and the tile -1 of newline tokens pick the last entry, which is -1.
        index, tile = (self.on(selection.indices.device, name) for name in ("whole_index", "whole_tile"))
        own = selection.total
        for name, value in selection.report.items():
            if isinstance(value, Tensor) and value.shape == (own,):
                selection.report[name] = value.new_full((self.total,), float("nan")).index_copy(0, index[:-1], value)
        kept = self.whole_index.tolist()
        selection.sources = [[kept[token] for token in group] for group in selection.sources]
        selection.indices, selection.tile = index[selection.indices], tile[selection.tile]
        selection.total, selection.tiles = self.total, self.tiles


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def part_layout_of(plan: TilePlan, side: int, tiles: tuple[int, ...]) -> PartLayout:
    """Return the layout of some tiles of a tile plan, `tiles` ascending. side: patches per side of a tile."""
    return PartLayout(plan, side, tiles)


def made_smaller(whole: Tensor, plan: TilePlan, tiles: int, side: int, patch: int, budget: int) -> Tensor | None:
    """Return the picture that method `downsample` makes of an image: float32 [1, 3, g * patch, g * patch].

    None where the image has at most `budget` patches, and so stays as it is.

    whole [1, 3, H, W]: tile 0. tiles: number of tiles. side: patches per side of a tile; patch: pixels per side of a patch
    """
    if int((merge_order(plan, side, tiles) != NEWLINE).sum()) <= budget:
        return None
    size = patch * smaller_side(side, budget, plan.newlines_alone)
    picture = whole.float()  # half precision has no bicubic filter on a CPU
    if size == picture.shape[-1]:
        return picture
    return torch.nn.functional.interpolate(picture, size=(size, size), mode="bicubic", antialias=True)


@dataclass(frozen=True)
class Look:
    """What a method that zooms is asked about one image and one question.

    whole: the tokens of tile 0; None is allowed where the method needs every crop
    text: what the method reads of the question [m, D]
    """

    method: Zoom
    plan: TilePlan
    whole: ImageTokens | None
    text: Tensor | None
    budget: int


@torch.no_grad()
def wanted_tiles(looks: Sequence[Look], side: int) -> list[tuple[int, ...]]:
    """Return the tiles that each look asks for, ascending, with tile 0. side: patches per side of a tile."""
    sizes = [layout_of(look.plan, side, look.plan.tiles).sizes for look in looks]
    importance = [[0.0] * (look.plan.tiles - 1) for look in looks]
    open_ = [n for n, look in enumerate(looks) if not look.method.needs_every_crop(sizes[n], look.budget)]
    if open_:
        # The sums of all crops of the batch go to the host in one copy: each copy would wait for the device.
        sums = []
        for look in (looks[n] for n in open_):
            patches = look.method.importance(look.whole, look.text, look.budget).double()
            overlap = to_device(crop_overlap(look.plan, side), patches.device)
            sums.append((overlap @ patches[:, None]).flatten())
        on_host = to_host(torch.cat(sums)).split([len(one) for one in sums])
        for n, one in zip(open_, on_host, strict=True):
            importance[n] = one.tolist()
    return [look.method.tiles(*own, look.budget) for look, *own in zip(looks, sizes, importance, strict=True)]


def tokens_in_order(
    states: Tensor,
    saliency: Tensor,
    layout: Layout,
    project: Callable[[Tensor], Tensor],
    key: int = 0,
    tower: TowerStates | None = None,
    detail: Tensor | None = None,
) -> ImageTokens:
    """Return the ImageTokens of one image, not yet projected.

    states [T, P, W], saliency [T, P]: of the tower, tile by tile; detail [T, P]: of the pixels, where it is needed
    project: function from states [n, W] to LLM embeddings [n, D]
    """
    names = ("source", "newline", "tile", "row", "column")
    source, newline, tile, row, column = (layout.on(states.device, name) for name in names)
    merged = states.reshape(-1, states.shape[-1])[source]
    scores = saliency.reshape(-1).to(states.device)[source]
    if layout.newlines:
        # The index of a newline token was clamped to patch 0, whose states and score it must not inherit.
        scores = scores.masked_fill(newline, float("nan"))
        merged = merged.masked_fill(newline[:, None], 0)
    detail = None if detail is None else detail.reshape(-1).to(states.device)[source]
    return ImageTokens(merged, scores, tile, row, column, key, tower, project, layout, detail)


def projects_late(method: Selector, image: ImageTokens, budget: int) -> bool:
    """Return whether only the kept tokens of an image go through the projector, after selection."""
    return not method.reads_features and method.num_kept(image, budget) < len(image.patches)


def project_now(images: Sequence[ImageTokens], newline: Tensor | None) -> list[ImageTokens]:
    """Return copies of `images` whose patches went through the projector, all of them in one call.

    newline: embedding [D] of a newline token; None where no image has one
    """
    if not images:
        return []
    states = [image.features[image.patches] for image in images]
    features = images[0].unprojected(torch.cat(states)).split([len(part) for part in states])
    return [
        replace(image, features=with_newlines(own, image.patches, len(image.tile), newline), unprojected=None)
        for image, own in zip(images, features, strict=True)
    ]


def with_newlines(features: Tensor, patches: Tensor, tokens: int, newline: Tensor | None) -> Tensor:
    """Return the features [N, D] of N tokens: features [P, D] at `patches` [P], the newline embedding elsewhere."""
    if len(patches) == tokens:
        return features
    newlines = newline.to(features).expand(tokens, -1)
    return newlines.index_copy(0, patches.to(features.device), features)


def outline_of(layout: Layout) -> ImageTokens:
    """Return the tokens of a layout where only their places count: the features have no columns."""
    blank = layout.tile.new_empty((len(layout.tile), 0))
    # Families of transformers have layouts of their own, from which the places are computed.
    places = layout if isinstance(layout, TokenPlaces) else None
    return ImageTokens(blank, layout.tile, layout.tile, layout.row, layout.column, places=places)


def tokens_kept(method: Selector, layout: Layout, budget: int) -> int:
    """Return how many tokens `method` keeps of an image under `budget`. The tile plan alone tells it.

    UserError for a budget that the method rounds down to nothing.
    """
    if not method.needs_image:
        return 0
    total = len(layout.tile)
    if method.resizes and len(layout.patches) > budget:
        side, newlines = math.isqrt(layout.sizes[0]), layout.newlines_alone
        return smaller_side(side, budget, newlines) ** 2 + newlines
    if not method.uses_budget:
        return total
    outline = outline_of(layout)
    kept = method.num_kept(outline, budget)
    return kept if kept < len(outline.patches) else total


def sample_key(ids: Tensor, image_size: tuple[int, int], place: int) -> int:
    """Return a key for an image of a sample, from prompt, image size and place among its images.

    It does not depend on the batch. Python's hash would, in part: it is salted per process for strings.
    """
    # "<i8" fixes the byte order, so that all machines get the same key. 7 bytes fit a signed 64-bit integer.
    material = to_host(ids).numpy().astype("<i8").tobytes() + repr((tuple(image_size), place)).encode()
    return int.from_bytes(hashlib.blake2b(material, digest_size=7).digest(), "little")
