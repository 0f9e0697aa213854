"""Union of the best tokens of two rankings: exactly K tokens, although the rankings may overlap."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llava.common.transfer import to_device, to_host
from llava.methods.ranking import lowest_index_topk


class TwoLists(NamedTuple):
    """Two scores [P] of the patches of one image, and the split of the budget between them.

    k_first: how many of `budget` tokens come from `first`; an int, or a tensor [] or [1] that stays on the device
    """

    first: Tensor
    second: Tensor
    k_first: int | Tensor
    budget: int


def unions_of_best(images: list[TwoLists]) -> list[tuple[Tensor, int]]:
    """Return, per image, the indices [budget] of the union of both lists' best tokens, ascending, and k_first.

    The union has the best k_first tokens by `first` and the best budget - k_first by `second`. Where they overlap it is
    too small. While it is, the next unused token comes from the list with the larger (next score / mass captured so
    far), ties to `first`. The mass of a list is the sum of the scores of the tokens that came from it. Scores below
    zero count as zero here. Needs budget <= P.
    """
    # 1. The heads of all lists, for images of one size together. They go to the host in one copy, so a batch waits for the
    # device once.
    sizes = [(len(lists.first), lists.budget) for lists in images]
    groups = [[i for i, own in enumerate(sizes) if own == size] for size in dict.fromkeys(sizes)]
    heads = [_heads([images[i] for i in group]) for group in groups]
    packed = to_host(torch.cat([head.flatten() for head in heads])).split([head.numel() for head in heads])
    by_image: list[list[float]] = [[] for _ in images]
    for group, head, part in zip(groups, heads, packed, strict=True):
        for i, row in zip(group, part.view(head.shape).tolist(), strict=True):
            by_image[i] = row
    # 2. The unions are built on the host: filling up is a loop whose every step depends on the one before it.
    chosen, splits = [], []
    for lists, (split, *rest) in zip(images, by_image, strict=True):
        length = len(rest) // 4
        order = [list(map(int, rest[s * length : (s + 1) * length])) for s in (0, 1)]
        value = [rest[s * length : (s + 1) * length] for s in (2, 3)]
        splits.append(int(split))
        chosen.append(_union(order, value, splits[-1], lists.budget))
    # 3. All chosen indices go back in one copy.
    kept = torch.tensor([index for indices in chosen for index in indices], dtype=torch.long)
    parts = to_device(kept, images[0].first.device).split([len(indices) for indices in chosen])
    return list(zip(parts, splits, strict=True))


def _heads(images: list[TwoLists]) -> Tensor:
    """Return float64 [B, 1 + 4n] for lists of one length and budget.

    A row has k_first, the n best indices of both lists, then their scores; n is at most the budget.

    The union never reads past the first `budget` tokens of a list. It contains all tokens before the next unused one,
    and these are fewer than the budget while it is being filled.
    """
    # One float64 tensor for numbers of two kinds: float64 holds every index and every float32 score exactly.
    scores = torch.stack([torch.stack(lists[:2]) for lists in images])  # [B, 2, P]
    orders = lowest_index_topk(scores, min(images[0].budget, scores.shape[-1]))
    values = scores.gather(-1, orders).double().clamp_min(0)
    given = [lists.k_first for lists in images]
    splits = [one if isinstance(one, Tensor) else torch.full((1,), one, device=scores.device) for one in given]
    splits = torch.stack([one.reshape(1).double() for one in splits])
    return torch.cat([splits, orders.double().flatten(1), values.flatten(1)], dim=1)


def _union(order: list[list[int]], value: list[list[float]], k_first: int, budget: int) -> list[int]:
    """Return the union, ascending. order: the best tokens of both lists; value: their scores."""
    place = [k_first, budget - k_first]
    mass = [sum(value[s][: place[s]]) for s in (0, 1)]
    kept = set(order[0][: place[0]]) | set(order[1][: place[1]])
    while len(kept) < budget:
        for s in (0, 1):
            while order[s][place[s]] in kept:
                place[s] += 1
        # A list without mass has no score above 0 left, because its scores are sorted.
        gain = [value[s][place[s]] / mass[s] if mass[s] else 0.0 for s in (0, 1)]
        side = 0 if gain[0] >= gain[1] else 1
        kept.add(order[side][place[side]])
        mass[side] += value[side][place[side]]
    return sorted(kept)
