"""VisionZip (arXiv 2412.04467): [CLS] and the most salient patches; the other patches are merged into a few tokens."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llava.common.errors import UserError
from llava.common.transfer import to_device, to_host
from llava.methods.before_llm.base import ImageTokens, Selection
from llava.methods.before_llm.scores import patch_saliency
from llava.methods.before_llm.similarity import unit_rows
from llava.methods.before_llm.tiles import members_of_tiles, split_evenly
from llava.methods.before_llm.zoom import Zoom
from llava.methods.ranking import lowest_index_topk

PUBLISHED = (54, 10)  # published counts per tile: dominant tokens, [CLS] included, and contextual tokens


def merge_alike(hidden: Tensor, keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Merge n patches into `count` tokens: return (tokens [count, W] float32, group [n] of each patch).

    hidden [n, W], keys [n, d], 1 <= count <= n. The targets are every (n // count)-th patch, the first `count` of
    those. Every other patch joins the target whose key is most similar by cosine, the first of equals. A token is its
    target *plus* the mean of the patches that joined it.
    """
    targets = torch.arange(count, device=keys.device) * max(1, len(keys) // count)
    unit = unit_rows(keys)
    group = (unit @ unit[targets].T).argmax(dim=1)
    # A target belongs to its own group, even where an earlier target has an equal key.
    group[targets] = torch.arange(count, device=keys.device)
    joined = torch.nn.functional.one_hot(group, count).float()
    joined[targets] = 0.0
    mean = joined.T @ hidden.float() / joined.sum(dim=0).clamp_min(1)[:, None]
    return hidden[targets].float() + mean, group


@dataclass
class VisionZip(Zoom):
    """Keeps "dominant" and "contextual" tokens of each tile. The question is not read.

    Dominant tokens are [CLS] and the patches that it attends to most. Contextual tokens are the other patches, merged
    by the similarity of their keys.

    K counts every token that the LLM reads, [CLS] and contextual tokens included. It is split evenly over the tiles. Of
    a tile's share q, floor(q * contextual / (dominant + contextual)) tokens are contextual. The others, at least one,
    are dominant, and the first of them is [CLS]. Patches that unpadding removes take no part.

    The order is: the [CLS], dominant and contextual tokens of the first tile; the dominant patches of all crops in LLM
    order; the [CLS] tokens of the crops; their contextual tokens. [CLS] and contextual tokens have index -1, so they
    have no original position. Merging uses the tower's states, and the merged tokens go through the projector.

    dominant, contextual  published counts per tile, both or neither. The budget is then (dominant + contextual) x
                          tiles, and the requested one is ignored. By default they are 54 and 10, only their ratio
                          counts, and the requested budget is kept.
    crops, crop_share     encode only the most salient crops, see Zoom; by default all of them
    """

    reads_features = False
    reads_text = False
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
        # `sources` are lists of Python numbers. The indices of a whole batch come to the host in one copy.
        pairs = [pair for own in tiles for tile in own for pair in (tile.others, tile.group)]
        numbers = to_host(torch.cat(pairs)).split([len(pair) for pair in pairs])
        numbers = iter(numbers)
        sources = [[_sources(tile.merged, next(numbers), next(numbers)) for tile in own] for own in tiles]
        return [_in_order(*one) for one in zip(images, tiles, sources, strict=True)]

    def _tiles(self, image: ImageTokens, budget: int) -> list[_Tile]:
        """Return the kept tokens of each tile that has a share of the budget."""
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
            # Both sets in raster order, the others first. A boolean index would wait for the device.
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
    """The kept tokens of one tile.

    dominant [k]: patches that are kept; made [1 + merged, W]: states of [CLS] and of the contextual tokens
    others [n]: patches that were merged; group [n]: the contextual token that each of them belongs to
    """

    dominant: Tensor
    made: Tensor
    others: Tensor
    group: Tensor
    merged: int


def _sources(merged: int, others: Tensor, group: Tensor) -> list[list[int]]:
    """Return the patches of each of `merged` contextual tokens, ascending. others, group: as in _Tile, on the host."""
    groups = [[] for _ in range(merged)]
    for index, number in zip(others.tolist(), group.tolist(), strict=True):
        groups[number].append(index)
    return [sorted(members) for members in groups]


def _in_order(image: ImageTokens, tiles: list[_Tile], sources: list[list[list[int]]]) -> Selection:
    """Return the Selection of an image: the tokens of its first tile, then those of all other tiles together."""
    # 1. The parts in order, each as (indices, or None for merged and [CLS] tokens; how many).
    parts, made, listed = [], [], []
    for first, block in ((True, slice(1)), (False, slice(1, None))):
        own = tiles[block]
        if not own:
            continue
        dominant = torch.cat([tile.dominant for tile in own]).sort().values
        cls, contextual = (torch.cat([tile.made[of] for tile in own]) for of in (slice(1), slice(1, None)))
        # [CLS] of the first tile comes before its patches, as in the tower. The [CLS] tokens of the crops come after
        # the patches of all crops.
        salient = [(None, len(cls)), (dominant, len(dominant))]
        parts += [*(salient if first else salient[::-1]), (None, len(contextual))]
        made += [cls, contextual]
        listed += [[] for _ in own] + [group for groups in sources[block] for group in groups]
    # 2. Indices and features. Patches are projected in one call, and so are all merged tokens.
    missing = image.patches[:1].new_full((1,), -1)
    indices = torch.cat([missing.expand(count) if own is None else own for own, count in parts])
    patches = image.read(torch.cat([own for own, _ in parts if own is not None]))
    features = torch.cat([patches, image.tower.project(torch.cat(made)).to(patches)])
    # 3. The features in order: `place` says where each token lies among the patches, followed by the merged tokens.
    is_made = torch.cat([torch.full((count,), own is None) for own, count in parts])
    place = torch.where(is_made, len(patches) + is_made.cumsum(0) - 1, (~is_made).cumsum(0) - 1)
    return Selection(indices=indices, features=features[to_device(place, features.device)], sources=listed)
