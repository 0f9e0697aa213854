"""Decode attention over listed slots in plain PyTorch: what the Triton kernel must equal, and what runs without CUDA."""

from __future__ import annotations

import torch
from torch import Tensor


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_len: Tensor,
    core: Tensor,
    core_len: Tensor,
    text: Tensor,
    text_len: Tensor,
    scale: float,
    scores: bool | str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(out, core_scores, text_scores) as in decode_attention.DecodeOutput; shapes as in decode_attention.

    It gathers the listed slots and reads the longest lengths on the host, which on CUDA waits for the device. Float32
    throughout (float64 for float64 inputs).
    """
    batch, heads, width = q.shape
    groups = k.shape[1]
    precise = torch.float64 if q.dtype == torch.float64 else torch.float32
    n_prefix, n_core, n_text = (int(n.max()) if n.numel() else 0 for n in (prefix_len, core_len, text_len))

    per_group = (batch, groups, -1)
    prefix = torch.arange(n_prefix, device=q.device, dtype=torch.int32)
    parts = [prefix.expand(per_group), core[:, None, :n_core].expand(per_group), text[:, :, :n_text]]
    lengths = [prefix_len[:, None], core_len[:, None], text_len]
    valid = torch.cat(
        [
            torch.arange(part.shape[-1], device=q.device) < n[..., None].expand(per_group)
            for part, n in zip(parts, lengths, strict=True)
        ],
        dim=-1,
    )
    # What lies behind a length is anything: slot 0 stands in for it, and neither its key nor its value counts.
    slots = torch.cat(parts, dim=-1).long() * valid
    row = torch.arange(batch, device=q.device)[:, None, None]
    group = torch.arange(groups, device=q.device)[:, None]
    keys, values = (storage[row, group, slots].to(precise) for storage in (k, v))

    logits = q.view(batch, groups, heads // groups, width).to(precise) @ keys.transpose(-1, -2) * scale
    logits = logits.masked_fill(~valid[:, :, None], -torch.inf)
    # A row that reads nothing has only -inf, whose softmax is NaN.
    probs = logits.softmax(-1).masked_fill(~valid[:, :, None], 0)
    out = probs @ values.masked_fill(~valid[..., None], 0)

    core_scores = text_scores = None
    if scores in (True, "core"):
        core_scores = core.new_zeros(core.shape, dtype=torch.float32)
        core_scores[:, :n_core] = probs[..., n_prefix : n_prefix + n_core].mean((1, 2))
    if scores in (True, "text"):
        text_scores = text.new_zeros(text.shape, dtype=torch.float32)
        text_scores[..., :n_text] = probs[..., n_prefix + n_core :].sum(2)
    return out.reshape(batch, heads, width).to(q.dtype), core_scores, text_scores
