"""Decode attention over lists, in plain PyTorch."""

from typing import NamedTuple

import torch


class Found(NamedTuple):
    out: torch.Tensor
    core_scores: torch.Tensor | None
    text_scores: torch.Tensor | None


def decode_attention(q, k, v, prefix_len, core, core_len, text, text_len, *, scale=None, scores=False):
    B, H, D = q.shape
    G = k.shape[1]
    P = k.shape[2]
    ar = torch.arange(P, device=q.device)
    idx = torch.cat([ar.expand(B, G, P), core[:, None].expand(B, G, -1), text], dim=2).long()
    ok = torch.cat(
        [
            (ar < prefix_len[:, None])[:, None].expand(B, G, P),
            (torch.arange(core.shape[1], device=q.device) < core_len[:, None])[:, None].expand(B, G, -1),
            torch.arange(text.shape[2], device=q.device) < text_len[..., None],
        ],
        dim=2,
    )
    keys = k.gather(2, idx[..., None].expand(-1, -1, -1, D)).float()
    values = v.gather(2, idx[..., None].expand(-1, -1, -1, D)).float()
    s = q.view(B, G, H // G, D).float() @ keys.transpose(2, 3) * (D**-0.5 if scale is None else scale)
    p = s.masked_fill(~ok[:, :, None], float("-inf")).softmax(-1)
    out = (p @ values).view(B, H, D).to(q.dtype)
    if not scores:
        return Found(out, None, None)
    c = core.shape[1]
    return Found(out, p[..., P : P + c].sum((1, 2)) / H, p[..., P + c :].sum(2))
