"""Decode attention over listed slots in plain PyTorch: reference for the Triton kernel, and the code without CUDA."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


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
    """Return (out, core_scores, text_scores) as in decode_attention.DecodeOutput; shapes as in decode_attention.

    It copies the listed slots, and storage whose rows, KV heads and slots are not contiguous. It reads the longest
    lengths on the host, which waits for the device on CUDA. It computes in float32 (float64 for float64 inputs).
    """
    # 1. Without lists the entries are a slice of the storage, which SDPA reads without a copy.
    if not core.shape[-1] and not text.shape[-1] and q.dtype == torch.float32:
        return _prefix_alone(q, k, v, prefix_len, scale), *_no_scores(core, text, scores)
    # 2. The slots of all parts as one list per row and KV head, with a mask of those that count.
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
    # Entries of a list behind its length are arbitrary. Slot 0 replaces them; the mask removes its key and value.
    slots = torch.cat(parts, dim=-1).long() * valid
    # 3. Their keys and values.
    sequence = torch.arange(batch * groups, device=q.device).view(batch, groups, 1)
    # index_select on rows takes a tenth of the time of indexing in three dimensions on a CPU.
    rows = (sequence * k.shape[2] + slots).flatten()
    keys, values = (
        storage.reshape(-1, width).index_select(0, rows).view(*slots.shape, width).to(precise) for storage in (k, v)
    )

    # 4. Attention.
    logits = q.reshape(batch, groups, heads // groups, width).to(precise) @ keys.transpose(-1, -2) * scale
    logits = logits.masked_fill(~valid[:, :, None], -torch.inf)
    # A row that reads nothing has only -inf, whose softmax is NaN. The mask makes it 0.
    probs = logits.softmax(-1).masked_fill(~valid[:, :, None], 0)
    # Values are masked too: storage that was never written may hold NaN, and 0 * NaN is NaN.
    out = probs @ values.masked_fill_(~valid[..., None], 0)

    # 5. Scores of the lists, at full width with zeros behind the lengths.
    core_scores = text_scores = None
    if scores in (True, "core"):
        core_scores = core.new_zeros(core.shape, dtype=torch.float32)
        core_scores[:, :n_core] = probs[..., n_prefix : n_prefix + n_core].mean((1, 2))
    if scores in (True, "text"):
        text_scores = text.new_zeros(text.shape, dtype=torch.float32)
        text_scores[..., :n_text] = probs[..., n_prefix + n_core :].sum(2)
    return out.reshape(batch, heads, width).to(q.dtype), core_scores, text_scores


def _prefix_alone(q: Tensor, k: Tensor, v: Tensor, prefix_len: Tensor, scale: float) -> Tensor:
    """Return the attention output where only the prefix is read: SDPA over views, row by row where lengths differ."""
    lengths = prefix_len.tolist()
    if len(set(lengths)) > 1:
        return torch.cat([_prefix_alone(*(t[b : b + 1] for t in (q, k, v, prefix_len)), scale) for b in range(len(q))])
    if not lengths[0]:
        return torch.zeros_like(q)
    keys, values = (storage[:, :, : lengths[0]] for storage in (k, v))
    grouped = k.shape[1] < q.shape[1]
    return scaled_dot_product_attention(q[:, :, None], keys, values, scale=scale, enable_gqa=grouped)[:, :, 0]


def _no_scores(core: Tensor, text: Tensor, scores: bool | str) -> tuple[Tensor | None, Tensor | None]:
    """Return the scores of empty lists, None for those that were not requested."""
    return tuple(
        entries.new_zeros(entries.shape, dtype=torch.float32) if scores in (True, name) else None
        for name, entries in (("core", core), ("text", text))
    )
