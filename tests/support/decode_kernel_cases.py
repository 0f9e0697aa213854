"""Random operands of decode_attention, everything poisoned that must not be read, and its rule in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POISON = 2**31 - 1  # no slot: reading it faults or gives NaN
# max |error| / max |reference| of a kernel's result, by the dtype of what it reads.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@dataclass
class Operands:
    """What decode_attention takes, in its order; `named` [B, G, C] says which slots a KV head reads."""

    q: Tensor
    k: Tensor
    v: Tensor
    prefix_len: Tensor
    core: Tensor
    core_len: Tensor
    text: Tensor
    text_len: Tensor
    named: Tensor

    def __iter__(self):
        return iter(vars(self)[name] for name in list(vars(self))[:-1])

    def float(self) -> "Operands":
        """The same numbers in float32: half-precision inputs are exact there."""
        return Operands(self.q.float(), self.k.float(), self.v.float(), *list(self)[3:], self.named)


def operands(rows, groups=2, group=1, width=64, dtype=torch.float32, spare=3, interleaved=False, seed=0) -> Operands:
    """rows: (prefix, core, text) lengths per row; the text length of KV head g is g less. Lists and storage have `spare`
    places more than the longest row needs. interleaved: heads and K / V lie between slots, as in a paged layout."""
    torch.manual_seed(seed)
    batch = len(rows)
    slots = max(map(sum, rows)) + spare
    storage = torch.full((batch, slots, 2, groups, width), torch.nan)
    n_core, n_text = (max(row[i] for row in rows) + spare for i in (1, 2))
    core = torch.full((batch, n_core), POISON, dtype=torch.int32)
    text = torch.full((batch, groups, n_text), POISON, dtype=torch.int32)
    named = torch.zeros(batch, groups, slots, dtype=torch.bool)
    text_len = torch.zeros(batch, groups, dtype=torch.int32)
    for b, (prefix, in_core, in_text) in enumerate(rows):
        free = (prefix + torch.randperm(slots - prefix)).int()
        core[b, :in_core] = free[:in_core]
        for g in range(groups):
            rest = free[in_core:]
            mine = rest[torch.randperm(len(rest))][: max(0, in_text - g)]
            text[b, g, : len(mine)] = mine
            text_len[b, g] = len(mine)
            named[b, g, :prefix] = True
            named[b, g, torch.cat([free[:in_core], mine]).long()] = True
    at = named.permute(0, 2, 1)[:, :, None].expand(-1, -1, 2, -1)
    storage[at] = torch.randn(int(at.sum()), width)
    storage = storage.to(dtype)
    k, v = storage.permute(2, 0, 3, 1, 4)
    if not interleaved:
        k, v = k.contiguous(), v.contiguous()
    q = 2 * torch.randn(batch, groups * group, width)  # attention that is peaked, not flat
    prefix_len, core_len = (torch.tensor([row[i] for row in rows], dtype=torch.int32) for i in (0, 1))
    tensors = (q.to(dtype), k, v, prefix_len, core, core_len, text, text_len, named)
    return Operands(*(t.to(DEVICE) for t in tensors))


def rule(o: Operands, scale: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(out, core_scores, text_scores) by a plain masked softmax over all slots, in float64 on the CPU."""
    q, k, v, _, core, core_len, text, text_len = (t.cpu() for t in o)
    named = o.named.cpu()
    (batch, heads, width), groups = q.shape, k.shape[1]
    q = q.double().view(batch, groups, -1, width)
    logits = torch.einsum("bgrd,bgcd->bgrc", q, k.double().nan_to_num()) * (width**-0.5 if scale is None else scale)
    probs = logits.masked_fill(~named[:, :, None], -torch.inf).softmax(-1).nan_to_num()
    out = torch.einsum("bgrc,bgcd->bgrd", probs, v.double().nan_to_num()).reshape(batch, heads, width)
    core_scores, text_scores = torch.zeros(core.shape, dtype=torch.double), torch.zeros(text.shape, dtype=torch.double)
    for b in range(batch):
        mine = core[b, : core_len[b]].long()
        core_scores[b, : len(mine)] = probs[b, :, :, mine].mean((0, 1))
        for g in range(groups):
            mine = text[b, g, : text_len[b, g]].long()
            text_scores[b, g, : len(mine)] = probs[b, g][:, mine].sum(0)
    return out, core_scores, text_scores


def error(found: Tensor, expected: Tensor) -> float:
    """max |found - expected| / max |expected|; NaN where a NaN was found."""
    expected = expected.double().cpu()
    return float((found.double().cpu() - expected).abs().max() / expected.abs().max())
