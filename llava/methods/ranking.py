"""The best of a list of scores, with ties that always go to the lowest index."""

from __future__ import annotations

import torch
from torch import Tensor


def lowest_index_topk(scores: Tensor, k: int) -> Tensor:
    """Indices [k] of the k largest scores [n] (or [..., n] row by row), best first; ties go to the lowest index.

    torch.topk promises nothing about ties, and half-precision scores tie often.
    """
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k]


def keep_best(scores: Tensor, keep: int, keep_last: bool = False) -> Tensor:
    """[keep] indices of the highest scores [n], ascending; ties go to the lowest index, what is no number goes last.

    keep_last: the last of the n stays whatever its score.
    """
    scores = scores.float().nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    if keep_last:
        scores[-1] = float("inf")
    return torch.sort(lowest_index_topk(scores, keep)).values
