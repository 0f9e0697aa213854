"""Attention rows of a few queries, computed from their hidden states and the cached keys, for any attention backend.

    with LastQueryRows(model) as rows:
        model.generate(...)
    rows.calls[0]      # [L, B, S] of prefill; calls[1], calls[2], ... are the decode steps

SDPA and flash attention return no attention weights, and eager attention with `output_attentions` keeps S x S of them
per head and layer. This file computes one row. Its cost is one more projection of the query.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llava.model.decoding.cache_argument import CACHE


def attention_rows(attention, hidden: Tensor, rotary: tuple[Tensor, Tensor], keys: Tensor, mask=None) -> Tensor:
    """Softmax rows [B, H, n, S] in float32 of the n last queries of one Llama or Mistral attention module.

    hidden: input of `attention`, [B, Q, D] with Q >= n. rotary: (cos, sin), [B or 1, n, d] at the queries' positions.
    keys:   [B, G, S, d] after RoPE, with the keys of the queries themselves.
    mask:   None if every key may be read; else [B or 1, 1, n, S], bool (True: may be read) or added to the scores.
    """
    n = rotary[0].shape[1]
    query = attention.q_proj(hidden[:, -n:])
    query = query.view(*query.shape[:-1], -1, attention.head_dim).transpose(1, 2)
    query, _ = apply_rotary_pos_emb(query, query, *rotary)  # it rotates a pair; the cached keys are rotated already
    batch, heads, _, size = query.shape
    # Grouped heads: the queries of one group are stacked, so that their shared keys are not copied. float32: a softmax
    # over thousands of keys loses small weights in half precision.
    grouped = query.float().reshape(batch, keys.shape[1], -1, size)
    scores = (grouped @ keys.float().transpose(-1, -2)).view(batch, heads, n, -1) * attention.scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.float()
    return scores.softmax(dim=-1)


class LastQueryRows:
    """Context that records the attention row of each forward pass's last query, per layer, mean over heads.

    model: a causal LM with decoder layers like Llama's, which must run with a KV cache.
    calls: per forward pass [L, B, S] in float32 on the CPU. S is the number of keys, which must be the same in all
    layers. A model that drops tokens inside the LLM is therefore not supported.
    """

    def __init__(self, model):
        self._attentions = [layer.self_attn for layer in model.model.layers]
        self._handles: list = []
        self._rows: list[Tensor] = []
        self.calls: list[Tensor] = []

    def __enter__(self):
        # A hook after the forward pass: by then the module has added the pass's own keys to the cache.
        self._handles = [a.register_forward_hook(self._read, with_kwargs=True) for a in self._attentions]
        return self

    def __exit__(self, *exception):
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _read(self, attention, _, arguments: dict, __) -> None:
        hidden, (cos, sin) = arguments["hidden_states"], arguments["position_embeddings"]
        keys = arguments[CACHE].layers[attention.layer_idx].keys
        mask = arguments["attention_mask"]
        if mask is not None:  # [B, S] under flash attention, else [B, 1, Q, S], which may be wider than the cache
            mask = mask[:, None, None, :].bool() if mask.dim() == 2 else mask[:, :, -1:, : keys.shape[-2]]
        row = attention_rows(attention, hidden, (cos[:, -1:], sin[:, -1:]), keys, mask)
        self._rows.append(row[:, :, 0].mean(dim=1).cpu())
        if len(self._rows) == len(self._attentions):
            self.calls.append(torch.stack(self._rows))
            self._rows = []
