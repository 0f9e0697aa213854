"""HiPrune (arXiv 2508.00553): patches that receive much attention in a middle layer of the tower, and in a deep one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.common.errors import UserError
from llava.common.transfer import to_device
from llava.methods.before_llm.base import ImageTokens, Selection, Selector, TokenPlaces, take
from llava.methods.before_llm.tiles import first_picks, members_of_tiles, places_in_whole_tiles, split_evenly
from llava.methods.ranking import lowest_index_topk

NEIGHBOURS = ((0, -1), (0, 1), (-1, 0), (1, 0))  # (rows, columns): left, right, above, below


def anchor_counts(quota: list[int], share: float) -> list[int]:
    """Return how many anchors each tile has: round(share * quota / 5), .5 to the even number.

    The 5 stands for an anchor and its four neighbours.
    """
    return [round(count * share / 5) for count in quota]


def neighbours_of(where: TokenPlaces, patches: Tensor) -> Tensor:
    """Return the four neighbours [T, M, 4] of each patch in its tile, as numbers within the tile, on the host.

    patches [T, M]: members of the tiles, as indices into where.patches. A patch is its own neighbour where there is
    none: at the edge of the tile, and beside patches that unpadding has removed.
    """
    tile, row, column = (place[where.patches][patches] for place in (where.tile, where.row, where.column))
    number = torch.arange(patches.shape[1]).expand_as(patches)
    # A border of one around each tile, which stays -1 as unpadded places do.
    grid = torch.full((len(patches), int(row.max()) + 3, int(column.max()) + 3), -1)
    real = where.real
    grid[tile[real], row[real] + 1, column[real] + 1] = number[real]
    found = torch.stack([grid[tile, row + 1 + down, column + 1 + right] for down, right in NEIGHBOURS], dim=-1)
    return torch.where(found < 0, number[..., None], found)


def wrapped_neighbours(tiles: int, patches: int) -> Tensor:
    """Return the four neighbours [T, P, 4] of the public code: P patches in a row, so they go over line ends.

    Numbers below 0 and above P - 1 become 0 and P - 1, so the two corners are chosen with an anchor near them.
    """
    side = int(patches**0.5)
    number = torch.arange(patches)[:, None] + torch.tensor([-1, 1, -side, side])
    return number.clamp(0, patches - 1).expand(tiles, -1, -1)


@dataclass
class HiPrune(Selector):
    """Per tile: anchors by the attention that patches receive in a middle layer, then the best by that of the last one.

    The attention that a patch receives is a mean over heads and over all queries of its tile, [CLS] included. The
    anchors of a tile are the best of its middle layer (layer 9 of 24, counted from 1); they stay with their neighbours
    to the left, to the right, above and below. All others that stay have the highest attention in the layer that gave
    the features. The question is not read. Where anchors are so many that their neighbours exceed the budget,
    neighbours stay by that attention, too. The budget is split evenly over the tiles.

    anchor_share  share of a tile's tokens that anchors with four neighbours each take; their number is rounded, .5 to
                  the even number
    compat        "public": the neighbours of the authors' code, which go over line ends and clamp to the first and the
                  last patch of the tile; floor(K / T) tokens per tile. It needs whole tiles (anyres "fastervlm").

    The cost is one more attention map per head in two layers of the tower, [P + 1, P + 1] in float32.
    """

    reads_text = False
    reads_features = False
    tower_states = ("received",)

    anchor_share: float = 0.1
    compat: str | None = None

    def num_kept(self, image: ImageTokens, budget: int) -> int:
        if self.compat != "public" or budget >= len(image.patches):
            return budget
        tiles = len(image.on_host.sizes)
        if budget < tiles:
            raise UserError(
                f"compat='public' rounds a budget of {budget} over {tiles} tiles down to nothing, allowed is at least {tiles}"
            )
        return budget // tiles * tiles

    def keep(self, image: ImageTokens, text: Tensor, budget: int) -> Selection:
        members, real, sizes = members_of_tiles(image)
        where = image.on_host
        if self.compat == "public":
            _, tiles = places_in_whole_tiles(image)
            quota, beside = [budget // tiles] * tiles, wrapped_neighbours(tiles, sizes[0])
        else:
            quota, beside = split_evenly(budget, sizes), neighbours_of(where, where.members)
        received = torch.nan_to_num(image.of_patches(image.tower.received).float())[members]
        middle, deep = received.masked_fill(~real[..., None], float("-inf")).unbind(-1)
        # 1. Anchors have rank 2, their neighbours rank 1 and all others 0.
        counts = anchor_counts(quota, self.anchor_share)
        best, most = lowest_index_topk(middle, max(counts)), max(counts)
        extra = torch.arange(most) >= torch.tensor(counts)[:, None]  # a tile with fewer anchors than the others
        rank = torch.zeros_like(deep)
        if most:
            # Ranks are raised in a spare column for what is no anchor.
            spare, extra = deep.shape[1], to_device(extra, deep.device)
            rank = torch.nn.functional.pad(rank, (0, 1))
            near = to_device(beside.contiguous(), deep.device).gather(1, best[..., None].expand(-1, -1, 4))
            rank.scatter_(1, near.masked_fill(extra[..., None], spare).flatten(1), 1.0)
            rank.scatter_(1, best.masked_fill(extra, spare), 2.0)
            rank = rank[:, :-1]
        # 2. By rank, and within a rank by the attention of the deep layer. Two stable sorts, because one number that
        # holds both would lose digits.
        rank = rank.masked_fill(~real, -1.0)
        order = lowest_index_topk(deep, deep.shape[1])
        order = order.gather(1, lowest_index_topk(rank.gather(1, order), max(quota)))
        return take(image, image.patches[first_picks(members, order, quota)])
