"""Rotary embedding and new cache entries in plain PyTorch: reference for the Triton kernel, and code without CUDA."""

from __future__ import annotations

import torch
from torch import Tensor


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor | None,
    counts: Tensor | None,
) -> Tensor:
    """Return the rotated queries and write the new entries; shapes as in rotate_append."""
    _, tokens, heads, size = q.shape
    # Queries and keys are rotated together: at batch 1 on a CPU each operation costs more to start than to run.
    both = torch.cat([q, k], dim=2).transpose(1, 2)
    turned = both.roll(size // 2, dims=-1).mul_(sin.unsqueeze(1))
    both = (both * cos.unsqueeze(1)).add_(turned)
    key, value = both[:, heads:], v.transpose(1, 2)
    # Where all rows end at the same slot, the entries are one slice: a copy takes half the time of a scatter on a CPU.
    end = tokens if counts is None else _same(counts) if slots is None else None
    if end is not None:
        keys[:, :, end - tokens : end] = key
        values[:, :, end - tokens : end] = value
    else:
        slot = _slots(slots, counts, tokens).expand_as(key)
        keys.scatter_(2, slot, key)
        values.scatter_(2, slot, value)
    return both[:, :heads].contiguous()


def _same(counts: Tensor) -> int | None:
    """Return the count that all rows share; None where they differ."""
    first, *rest = counts.tolist()
    return first if all(count == first for count in rest) else None


def _slots(slots: Tensor | None, counts: Tensor, tokens: int) -> Tensor:
    """Return the slots of the new entries, int64 [B, G or 1, S, 1]."""
    place = counts.long().sub_(tokens).unsqueeze(-1)
    if tokens > 1:
        place = place + torch.arange(tokens, device=counts.device)
    if slots is None:
        return place[:, None, :, None]
    return slots.gather(2, place).long().unsqueeze(-1)
