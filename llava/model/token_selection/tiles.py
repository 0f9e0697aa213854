"""Methods that choose tile by tile: how the budget is split over the tiles, and all tiles as one padded batch."""

from __future__ import annotations

import torch
from torch import Tensor

from llava.model.token_selection.base import ImageTokens


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


def members_of_tiles(image: ImageTokens) -> tuple[Tensor, Tensor]:
    """(members [T, M], real [T, M]): the patches of each tile, as indices into `image.patches`, in raster order.

    Unpadding leaves tiles of different size: M is that of the largest; `real` is False in the padding, whose member
    is 0. T counts up to the last tile that has a patch.
    """
    tile, row, column = (place[image.patches].long() for place in (image.tile, image.row, image.column))
    sizes = torch.bincount(tile)
    largest = int(sizes.max())
    raster = (tile * (int(row.max()) + 1) + row) * (int(column.max()) + 1) + column
    order = torch.argsort(raster)
    start = sizes.cumsum(0) - sizes
    members = order.new_zeros(len(sizes), largest)
    members[tile[order], torch.arange(len(order), device=order.device) - start[tile[order]]] = order
    return members, torch.arange(largest, device=order.device) < sizes[:, None]


def first_picks(members: Tensor, picks: Tensor, quota: list[int]) -> Tensor:
    """[sum(quota)] indices into `image.patches`: of tile t the first quota[t] of its picks [T, >= max(quota)].

    A greedy method that takes one patch after another may run on in tiles whose quota is met: what it took before stays.
    """
    wanted = torch.tensor(quota, device=picks.device)
    taken = torch.arange(picks.shape[1], device=picks.device) < wanted[:, None]
    return members.gather(1, picks)[taken]
