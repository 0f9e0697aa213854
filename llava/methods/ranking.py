"""The best entries of a list of scores. Ties always go to the lowest index, so results repeat on every device."""

from __future__ import annotations

import torch
from torch import Tensor


def lowest_index_topk(scores: Tensor, k: int) -> Tensor:
    """Return the indices [k] of the k largest of `scores` [n], best first; ties go to the lowest index.

    For scores [..., n] each row is ranked on its own, and the result is [..., k].
    """
    # A stable sort, because torch.topk promises nothing about ties and half-precision scores tie often.
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k]


def first_true(chosen: Tensor, count: int) -> Tensor:
    """Return the indices [count] at which `chosen` [n] is True, ascending; exactly `count` entries are True.

    For chosen [..., n] with `count` True entries in each row, the result is [..., count].
    """
    # Not nonzero, which waits for the device to learn the number of results. The stable sort keeps the order.
    return torch.sort((~chosen).to(torch.int8), dim=-1, stable=True).indices[..., :count]


def keep_best(scores: Tensor, keep: int, keep_last: bool = False) -> Tensor:
    """Return the indices [keep] of the highest of `scores` [n], ascending; ties go to the lowest index.

    NaN ranks last. keep_last: the last of the n entries stays, whatever its score.
    """
    # By default nan_to_num would make infinities finite. It copies, so the caller's scores do not change below.
    scores = scores.float().nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    if keep_last:
        scores[-1] = float("inf")
    return torch.sort(lowest_index_topk(scores, keep)).values
