"""Helpers of methods that choose tile by tile: the split of the budget, and all tiles as one padded batch."""

from __future__ import annotations

import torch
from torch import Tensor

from llava.common.errors import UserError
from llava.common.transfer import to_device
from llava.methods.before_llm.base import ImageTokens


def split_evenly(budget: int, room: list[int]) -> list[int]:
    """Return how many of `budget` tokens each tile gets when tile i has room[i] patches.

    The split is even, and the remainder goes to the lowest tiles. Tokens that a tile has no room for are split over the
    others in the same way. Needs budget <= sum(room).
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
    """Return (members [T, M], real [T, M], sizes): the patches of each tile as one padded batch, see TokenPlaces."""
    return image.place("members"), image.place("real"), image.on_host.sizes


def places_in_whole_tiles(image: ImageTokens) -> tuple[Tensor, int]:
    """Return (place [N] of each token, tile after tile in raster order, on the host; number of tiles).

    For compat="public". UserError for tokens that public code with whole tiles cannot have seen: newline tokens and
    unpadded crops.
    """
    where = image.on_host
    if len(where.patches) < len(where.tile):
        raise UserError(
            "compat='public' got newline tokens, which the public code does not have; allowed is anyres='fastervlm'"
        )
    tiles, rows, columns = (int(x.max()) + 1 for x in (where.tile, where.row, where.column))
    place = (where.tile * rows + where.row) * columns + where.column
    if len(place) != tiles * rows * columns or len(place.unique()) != len(place):
        raise UserError(
            f"compat='public' got {len(place)} patches of {tiles} tiles of {rows} x {columns}, but the public code "
            "removes no padding; allowed is anyres='fastervlm'"
        )
    return place, tiles


def first_picks(members: Tensor, picks: Tensor, quota: list[int]) -> Tensor:
    """Return the first quota[t] picks of each tile t as indices [sum(quota)] into `image.patches`.

    picks [T, >= max(quota)]. A greedy method may choose more patches than a tile's quota; its first picks stay valid.
    """
    # The mask depends on host numbers only, so its indices are found on the host and nothing waits for the device.
    taken = torch.arange(picks.shape[1]) < torch.tensor(quota)[:, None]
    taken = to_device(torch.nonzero(taken.flatten()).flatten(), picks.device)
    return members.gather(1, picks).flatten()[taken]
