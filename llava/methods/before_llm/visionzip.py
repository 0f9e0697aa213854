"""VisionZip (arXiv 2412.04467): the most salient patches with [CLS], and the rest merged into a few tokens."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llava.common.errors import UserError
from llava.common.transfer import to_device, to_host
from llava.methods.before_llm.base import ImageTokens, Selection, Selector
from llava.methods.before_llm.scores import patch_saliency
from llava.methods.before_llm.similarity import unit_rows
from llava.methods.before_llm.tiles import members_of_tiles, split_evenly
from llava.methods.ranking import lowest_index_topk

PUBLISHED = (54, 10)  # dominant, [CLS] among them, and contextual tokens of a tile


def merge_alike(hidden: Tensor, keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Merge n patches into `count` tokens, 1 <= count <= n: (tokens [count, W] float32, group [n] of each patch).

    hidden [n, W], keys [n, d]. Every (n // count)-th patch is a target, the first `count` of those; every other patch
    joins the target whose key is most similar by cosine, the first of equals. A token is its target *plus* the mean of
    what joined it.
    """
    targets = torch.arange(count, device=keys.device) * max(1, len(keys) // count)
    unit = unit_rows(keys)
    group = (unit @ unit[targets].T).argmax(dim=1)
    group[targets] = torch.arange(count, device=keys.device)
    joined = torch.nn.functional.one_hot(group, count).float()
    joined[targets] = 0.0
    mean = joined.T @ hidden.float() / joined.sum(dim=0).clamp_min(1)[:, None]
    return hidden[targets].float() + mean, group


@dataclass
class VisionZip(Selector):
    """Per tile: [CLS] and the patches that it attends to most ("dominant"), then the others merged by the similarity of
    their keys ("contextual"). The question is not looked at.

    K counts every token that the LLM reads, [CLS] and contextual ones included. It is split evenly over the tiles, and
    of a tile's share q, floor(q * contextual / (dominant + contextual)) tokens are contextual and the others, at least
    one, are dominant, of which the first is [CLS]. Patches that unpadding removes take no part. Order: the first tile's [CLS],
    dominant and contextual tokens; then the dominant patches of all crops as they lie in the image, the [CLS] tokens of
    the crops, and their contextual tokens. [CLS] and contextual tokens have index -1, so they have no original position.
    Merging happens in the tower's states; what it makes goes through the projector.

    dominant, contextual  published counts per tile, both or neither: dominant + contextual tokens times the number of
                          tiles are then the budget, and the one that was asked for does not count. By default 54 to 10
                          is the ratio and the budget is kept.
    """

    reads_features = False
    makes_tokens = True
    tower_states = ("hidden", "keys")

    dominant: int | None = None
    contextual: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if (self.dominant is None) != (self.contextual is None):
            raise UserError(
                f"option 'contextual' is {self.contextual!r}, allowed is a count exactly where 'dominant' is one"
            )

    def num_kept(self, image: ImageTokens, budget: int) -> int:
        if self.dominant is None:
            return budget
        asked, largest = self.dominant + self.contextual, max(image.on_host.sizes, default=0)
        if asked > largest:
            warnings.warn(
                f"options.dominant and options.contextual ask for {asked} tokens per tile, but a tile has {largest} "
                "patches: visionzip keeps every vision token",
                stacklevel=2,
            )
        return (self.dominant + self.contextual) * sum(size > 0 for size in image.on_host.sizes)

    def keep(self, image: ImageTokens, text: Tensor, budget: int) -> Selection:
        return self.keep_all([image], [text], [budget])[0]

    def keep_all(self, images: list[ImageTokens], texts: list[Tensor], budgets: list[int]) -> list[Selection]:
        tiles = [self._tiles(image, budget) for image, budget in zip(images, budgets, strict=True)]
        # What went into each contextual token is told by index: all of a batch goes to the host together.
        pairs = [pair for own in tiles for tile in own for pair in (tile.others, tile.group)]
        numbers = to_host(torch.cat(pairs)).split([len(pair) for pair in pairs])
        numbers = iter(numbers)
        sources = [[_sources(tile.merged, next(numbers), next(numbers)) for tile in own] for own in tiles]
        return [_in_order(*one) for one in zip(images, tiles, sources, strict=True)]

    def _tiles(self, image: ImageTokens, budget: int) -> list[_Tile]:
        """What is kept of each tile that has a share of the budget."""
        dominant, contextual = PUBLISHED if self.dominant is None else (self.dominant, self.contextual)
        patches, saliency = image.patches, patch_saliency(image)
        hidden, keys = (image.of_patches(states[:, 1:]) for states in (image.tower.hidden, image.tower.keys))
        members, _, sizes = members_of_tiles(image)
        tiles = []
        for tile, quota in enumerate(split_evenly(budget, sizes)):
            if quota == 0:
                continue
            merged = quota * contextual // (dominant + contextual)
            rows, keep = members[tile, : sizes[tile]], quota - merged - 1
            chosen = torch.zeros(len(rows), dtype=torch.int8, device=rows.device)
            chosen.index_fill_(0, lowest_index_topk(saliency[rows], keep), 1)
            # In raster order: the others, then those that are chosen.
            others, salient = rows[chosen.sort(stable=True).indices].tensor_split([len(rows) - keep])
            made = image.tower.hidden[tile, :1].float()
            others = others if merged else others[:0]
            group = others
            if merged:
                zipped, group = merge_alike(hidden[others], keys[others], merged)
                made = torch.cat([made, zipped])
            tiles.append(_Tile(patches[salient], made, patches[others], group, merged))
        return tiles


class _Tile(NamedTuple):
    """What is kept of one tile: patches `dominant` [k]; `made` [1 + merged, W], the states of [CLS] and of the contextual
    tokens; the patches `others` [n] that were merged, and `group` [n], which contextual token each of them belongs to."""

    dominant: Tensor
    made: Tensor
    others: Tensor
    group: Tensor
    merged: int


def _sources(merged: int, others: Tensor, group: Tensor) -> list[list[int]]:
    """The patches of each of `merged` contextual tokens, ascending. others, group: as in _Tile, on the host."""
    groups = [[] for _ in range(merged)]
    for index, number in zip(others.tolist(), group.tolist(), strict=True):
        groups[number].append(index)
    return [sorted(members) for members in groups]


def _in_order(image: ImageTokens, tiles: list[_Tile], sources: list[list[list[int]]]) -> Selection:
    """One Selection of an image's tiles: the first tile's tokens, then those of all others together."""
    parts, made, listed = [], [], []  # parts: (indices, or None for tokens that the method makes; how many)
    for first, block in ((True, slice(1)), (False, slice(1, None))):
        own = tiles[block]
        if not own:
            continue
        dominant = torch.cat([tile.dominant for tile in own]).sort().values
        cls, contextual = (torch.cat([tile.made[of] for tile in own]) for of in (slice(1), slice(1, None)))
        # Of a single tile [CLS] comes first, as in the tower; of several, their [CLS] tokens come after the patches.
        salient = [(None, len(cls)), (dominant, len(dominant))]
        parts += [*(salient if first else salient[::-1]), (None, len(contextual))]
        made += [cls, contextual]
        listed += [[] for _ in own] + [group for groups in sources[block] for group in groups]
    missing = image.patches[:1].new_full((1,), -1)
    indices = torch.cat([missing.expand(count) if own is None else own for own, count in parts])
    patches = image.read(torch.cat([own for own, _ in parts if own is not None]))
    features = torch.cat([patches, image.tower.project(torch.cat(made)).to(patches)])
    # Where each token of the sequence lies among the patches and, behind them, what was made.
    is_made = torch.cat([torch.full((count,), own is None) for own, count in parts])
    place = torch.where(is_made, len(patches) + is_made.cumsum(0) - 1, (~is_made).cumsum(0) - 1)
    return Selection(indices=indices, features=features[to_device(place, features.device)], sources=listed)
