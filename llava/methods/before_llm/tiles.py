"""Methods that choose tile by tile: how the budget is split over the tiles, and all tiles as one padded batch."""

from __future__ import annotations

import torch
from torch import Tensor

from llava.common.transfer import to_device
from llava.methods.before_llm.base import ImageTokens


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


def members_of_tiles(image: ImageTokens) -> tuple[Tensor, Tensor, list[int]]:
    """(members [T, M], real [T, M], sizes): the patches of each tile as one padded batch, and how many there are
    (TokenPlaces)."""
    return image.place("members"), image.place("real"), image.on_host.sizes


def first_picks(members: Tensor, picks: Tensor, quota: list[int]) -> Tensor:
    """[sum(quota)] indices into `image.patches`: of tile t the first quota[t] of its picks [T, >= max(quota)].

    A greedy method that takes one patch after another may run on in tiles whose quota is met: what it took before stays.
    """
    taken = torch.arange(picks.shape[1]) < torch.tensor(quota)[:, None]
    taken = to_device(torch.nonzero(taken.flatten()).flatten(), picks.device)
    return members.gather(1, picks).flatten()[taken]
