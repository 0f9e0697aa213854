"""One step of eviction in plain PyTorch: the reference for the Triton kernel, and the code that runs without CUDA."""

from __future__ import annotations

import torch
from torch import Tensor


def reference(
    scores: Tensor,
    paid: Tensor,
    text: Tensor,
    text_len: Tensor,
    total: Tensor,
    recent: Tensor,
    step: Tensor,
    rule: str,
    quantile: float,
) -> None:
    """Update scores, text and text_len in place; shapes as in evict. Nothing waits for the device."""
    # 1. The scores with this step's attention.
    place, last = torch.arange(text.shape[-1], device=text.device), text_len[..., None] - 1
    new = _scores(scores, paid, place < last, place == last, rule, quantile)
    # 2. The entry that goes. Of equal scores it is the newest, hence amax. Within the budget it is the last entry,
    # which the next lines then leave where it is.
    allowed, safe = (table.index_select(1, step)[..., None] for table in (total, recent))
    over = last >= allowed
    candidate = place <= last - safe
    lowest = torch.where(candidate, new, float("inf")).amin(dim=-1, keepdim=True)
    worst = torch.where(candidate & (new == lowest), place, 0).amax(dim=-1, keepdim=True)
    worst = torch.where(over, worst, last)
    # 3. Its slot moves behind the live entries, and the entries after it move down by one.
    order = torch.where(place == last, worst, place + ((place >= worst) & (place < last)).long())
    text.copy_(text.gather(-1, order))
    scores.copy_(new.gather(-1, order))
    text_len -= over[..., 0].int()


def _scores(scores: Tensor, paid: Tensor, older: Tensor, own: Tensor, rule: str, quantile: float) -> Tensor:
    """Return the scores [B, G, T] after this step. older: mask of the earlier entries; own: of the step's own entry."""
    if rule == "latest":
        return torch.where(older | own, paid, 0)
    old = torch.where(older, scores, 0)
    if rule == "summed":
        return old + torch.where(older | own, paid, 0)
    live = older | own
    ranked = paid.masked_fill(~live, float("inf")).sort(dim=-1).values
    rank = quantile * (live.sum(dim=-1, keepdim=True) - 1).clamp(min=0).float()
    below = ranked.gather(-1, rank.floor().long())
    above = ranked.gather(-1, rank.ceil().long())
    return old + torch.where(older, paid - torch.lerp(below, above, rank.frac()), 0) + torch.where(own, paid, 0)
