"""FasterVLM (arXiv 2412.01818): the most salient patches of each tile."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.model.token_selection.base import ImageTokens, Selection, Selector, lowest_index_topk, take
from llava.model.token_selection.scores import patch_saliency


def split_evenly(budget: int, room: list[int]) -> list[int]:
    """How many of `budget` tokens each tile gets when tile i has room[i] patches.

    An even split, the remainder to the lowest tiles. What a tile has no room for is split over the others in the same
    way. Needs budget <= sum(room).
    """
    quota = [0] * len(room)
    takers = list(range(len(room)))
    while budget:
        share, extra = divmod(budget, len(takers))
        for nth, tile in enumerate(takers):
            given = min(share + (nth < extra), room[tile] - quota[tile])
            quota[tile] += given
            budget -= given
        takers = [tile for tile in takers if quota[tile] < room[tile]]
    return quota


@dataclass
class FasterVLM(Selector):
    """Top patches of each tile by [CLS] attention. The question is not looked at.

    The budget is per image, as it is for all methods here, and is split over the tiles; the published code's budget
    is per tile.
    """

    def keep(self, image: ImageTokens, text: Tensor, budget: int) -> Selection:
        saliency, patches = patch_saliency(image), image.patches
        tile = image.tile[patches].long()
        kept = []
        for number, quota in enumerate(split_evenly(budget, torch.bincount(tile).tolist())):
            members = torch.nonzero(tile == number).flatten()
            kept.append(members[lowest_index_topk(saliency[members], quota)])
        return take(image, patches[torch.cat(kept)])
