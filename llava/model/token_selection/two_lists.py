"""Keeping the best of two rankings at once: exactly K tokens, although the two may name the same ones."""

from __future__ import annotations

import torch
from torch import Tensor

from llava.model.token_selection.base import lowest_index_topk


def union_of_best(first: Tensor, k_first: int, second: Tensor, k_second: int) -> Tensor:
    """Indices [k_first + k_second] of the best k_first by scores `first` [P] and the best k_second by `second` [P].

    Where the two overlap, the union falls short. While it does, the next unused token comes from the list with the
    larger (next score / mass captured so far), ties to `first`. The mass of a list is the sum of the scores of the
    tokens that came from it; scores below zero count as zero here. Needs k_first + k_second <= P.
    """
    budget = k_first + k_second
    order = [lowest_index_topk(scores, len(scores)).tolist() for scores in (first, second)]
    value = [scores.double().clamp_min(0).tolist() for scores in (first, second)]
    place = [k_first, k_second]
    mass = [sum(value[s][i] for i in order[s][: place[s]]) for s in (0, 1)]
    kept = set(order[0][:k_first]) | set(order[1][:k_second])
    while len(kept) < budget:
        for s in (0, 1):
            while order[s][place[s]] in kept:
                place[s] += 1
        token = [order[s][place[s]] for s in (0, 1)]
        # A list without mass has nothing left either: both are sorted.
        gain = [value[s][token[s]] / mass[s] if mass[s] else 0.0 for s in (0, 1)]
        side = 0 if gain[0] >= gain[1] else 1
        kept.add(token[side])
        mass[side] += value[side][token[side]]
    return torch.tensor(sorted(kept), dtype=torch.long, device=first.device)
