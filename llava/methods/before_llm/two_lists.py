"""Keeping the best of two rankings at once: exactly K tokens, although the two may name the same ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llava.common.transfer import to_device, to_host
from llava.methods.ranking import lowest_index_topk


class TwoLists(NamedTuple):
    """Scores `first` and `second` [P] of the patches of one image, and how many of `budget` tokens come from the first: a
    number, or a tensor that holds one and stays on the device."""

    first: Tensor
    second: Tensor
    k_first: int | Tensor
    budget: int


def unions_of_best(images: list[TwoLists]) -> list[tuple[Tensor, int]]:
    """Per image: indices [budget] of the best k_first by `first` and of the best others by `second`, and k_first.

    Where the two overlap, the union falls short. While it does, the next unused token comes from the list with the
    larger (next score / mass captured so far), ties to `first`. The mass of a list is the sum of the scores of the
    tokens that came from it; scores below zero count as zero here. Needs budget <= P.

    The heads of all lists go to the host together, for which a batch waits once; what was chosen goes back together.
    """
    heads = [_heads(lists) for lists in images]
    packed = to_host(torch.cat([head.flatten() for head in heads]))
    chosen, splits = [], []
    for lists, part in zip(images, packed.split([head.numel() for head in heads]), strict=True):
        split, *rest = part.tolist()
        length = len(rest) // 4
        order = [list(map(int, rest[s * length : (s + 1) * length])) for s in (0, 1)]
        value = [rest[s * length : (s + 1) * length] for s in (2, 3)]
        splits.append(int(split))
        chosen.append(_union(order, value, splits[-1], lists.budget))
    kept = torch.tensor([index for indices in chosen for index in indices], dtype=torch.long)
    parts = to_device(kept, images[0].first.device).split([len(indices) for indices in chosen])
    return list(zip(parts, splits, strict=True))


def _heads(lists: TwoLists) -> Tensor:
    """float64 [1 + 4n]: k_first; of both lists the best n indices, then their scores. The union looks no further than the
    budget: it has all that lies before the next unused token of a list, and is short of the budget while it looks."""
    n = min(lists.budget, len(lists.first))
    orders = [lowest_index_topk(scores, n) for scores in (lists.first, lists.second)]
    values = [scores[order].double().clamp_min(0) for scores, order in zip(lists[:2], orders, strict=True)]
    split = lists.k_first
    if not isinstance(split, Tensor):
        split = torch.full((1,), split, device=lists.first.device)
    return torch.cat([split.reshape(1).double(), *(order.double() for order in orders), *values])


def _union(order: list[list[int]], value: list[list[float]], k_first: int, budget: int) -> list[int]:
    """The union, ascending. order, value: of both lists, their best tokens and the scores of those."""
    place = [k_first, budget - k_first]
    mass = [sum(value[s][: place[s]]) for s in (0, 1)]
    kept = set(order[0][: place[0]]) | set(order[1][: place[1]])
    while len(kept) < budget:
        for s in (0, 1):
            while order[s][place[s]] in kept:
                place[s] += 1
        # A list without mass has nothing left either: both are sorted.
        gain = [value[s][place[s]] / mass[s] if mass[s] else 0.0 for s in (0, 1)]
        side = 0 if gain[0] >= gain[1] else 1
        kept.add(order[side][place[side]])
        mass[side] += value[side][place[side]]
    return sorted(kept)
