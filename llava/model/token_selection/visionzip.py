"""VisionZip (arXiv 2412.04467): the most salient patches with [CLS], and the rest merged into a few tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.model.token_selection.base import ImageTokens, Selection, Selector, check_option, lowest_index_topk
from llava.model.token_selection.scores import patch_saliency
from llava.model.token_selection.similarity import unit_rows
from llava.model.token_selection.tiles import members_of_tiles, split_evenly

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
        for name, least in (("dominant", 1), ("contextual", 0)):
            value = getattr(self, name)
            good = value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= least)
            check_option(name, value, good, f"a whole number of at least {least}")
        together = (self.dominant is None) == (self.contextual is None)
        check_option("contextual", self.contextual, together, "a count exactly where 'dominant' is one")

    def tokens(self, image: ImageTokens, budget: int) -> int:
        if self.dominant is None:
            return budget
        return (self.dominant + self.contextual) * len(image.tile[image.patches].unique())

    def keep(self, image: ImageTokens, text: Tensor, budget: int) -> Selection:
        dominant, contextual = PUBLISHED if self.dominant is None else (self.dominant, self.contextual)
        patches, saliency = image.patches, patch_saliency(image)
        hidden, keys = (image.of_patches(states[:, 1:]) for states in (image.tower.hidden, image.tower.keys))
        members, real = members_of_tiles(image)
        tiles = []
        for tile, quota in enumerate(split_evenly(budget, real.sum(dim=1).tolist())):
            if quota == 0:
                continue
            merged = quota * contextual // (dominant + contextual)
            rows = members[tile][real[tile]]
            others = torch.ones_like(rows, dtype=torch.bool)
            others[lowest_index_topk(saliency[rows], quota - merged - 1)] = False
            made, sources = image.tower.hidden[tile, :1].float(), []
            if merged:
                zipped, group = merge_alike(hidden[rows[others]], keys[rows[others]], merged)
                made, sources = torch.cat([made, zipped]), _groups(patches[rows[others]], group, merged)
            tiles.append((patches[rows[~others]], made, sources))
        return _in_order(image, tiles[:1], tiles[1:])


def _groups(indices: Tensor, group: Tensor, count: int) -> list[list[int]]:
    """The indices [n] of each of `count` groups, ascending."""
    groups = [[] for _ in range(count)]
    for index, number in zip(indices.tolist(), group.tolist(), strict=True):
        groups[number].append(index)
    return [sorted(members) for members in groups]


def _in_order(image: ImageTokens, *blocks: list[tuple[Tensor, Tensor, list]]) -> Selection:
    """One Selection of blocks of tiles; a tile is (dominant patches, [CLS] and contextual states, sources)."""
    indices, made, sources = [], [], []
    for tiles in filter(None, blocks):
        kept = torch.cat([dominant for dominant, _, _ in tiles]).sort().values
        cls = torch.cat([states[:1] for _, states, _ in tiles])
        contextual = torch.cat([states[1:] for _, states, _ in tiles])
        # Of a single tile [CLS] comes first, as in the tower; of several, their [CLS] tokens come after the patches.
        parts = [kept.new_full((len(cls),), -1), kept]
        indices += [*(parts if tiles is blocks[0] else parts[::-1]), kept.new_full((len(contextual),), -1)]
        made += [cls, contextual]
        sources += [[] for _ in tiles] + [group for _, _, groups in tiles for group in groups]
    indices = torch.cat(indices)
    patches = image.read(indices[indices >= 0])
    features = patches.new_empty(len(indices), patches.shape[1])
    features[indices >= 0] = patches
    features[indices < 0] = image.tower.project(torch.cat(made)).to(features)
    return Selection(indices=indices, features=features, sources=sources)
