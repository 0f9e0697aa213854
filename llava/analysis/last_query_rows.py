"""Attention rows of a few queries, from their hidden states and the cached keys, whatever computes the attention itself.

    with LastQueryRows(model) as rows:
        model.generate(...)
    rows.calls[0]      # [layers, B, S] of prefill, then one entry per decode step

SDPA and flash attention keep no weights, and eager attention with `output_attentions` would keep S x S of them per
head and layer. What is read here is one row: the query is projected once more, which is what it costs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llava.model.decoding.cache_argument import CACHE


def attention_rows(attention, hidden: Tensor, rotary: tuple[Tensor, Tensor], keys: Tensor, mask=None) -> Tensor:
    """Softmax rows [B, H, n, S] in float32 of the n last queries of one Llama or Mistral attention module.

    hidden: [B, Q, D] that went into `attention`, Q >= n; rotary: (cos, sin), [B or 1, n, d] at the queries' positions
    keys:   [B, KV heads, S, d] after RoPE, the queries' own among them
    mask:   None where every key may be read; else [B or 1, 1, n, S], bool (True: may be read) or added to the scores
    """
    n = rotary[0].shape[1]
    query = attention.q_proj(hidden[:, -n:])
    query = query.view(*query.shape[:-1], -1, attention.head_dim).transpose(1, 2)
    query, _ = apply_rotary_pos_emb(query, query, *rotary)
    batch, heads, _, size = query.shape
    # Grouped heads: the queries of one group share their keys, which are never copied.
    grouped = query.float().reshape(batch, keys.shape[1], -1, size)
    scores = (grouped @ keys.float().transpose(-1, -2)).view(batch, heads, n, -1) * attention.scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.float()
    return scores.softmax(dim=-1)


class LastQueryRows:
    """Context: the head-mean row of each forward pass's last query, layer by layer.

    model: a causal LM whose base model has Llama-shaped decoder layers; it must run with a KV cache.
    calls: per forward pass [layers, B, S] in float32 on the CPU. S counts the keys of that layer, so all layers must
    hold the same number of them: rows of a model that drops tokens inside the LLM cannot be stacked.
    """

    def __init__(self, model):
        self._attentions = [layer.self_attn for layer in model.model.layers]
        self._handles: list = []
        self._rows: list[Tensor] = []
        self.calls: list[Tensor] = []

    def __enter__(self):
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
        if mask is not None:  # [B, S] under flash attention, else [B, 1, Q, S]
            mask = mask[:, None, None, :].bool() if mask.dim() == 2 else mask[:, :, -1:, : keys.shape[-2]]
        row = attention_rows(attention, hidden, (cos[:, -1:], sin[:, -1:]), keys, mask)
        self._rows.append(row[:, :, 0].mean(dim=1).cpu())
        if len(self._rows) == len(self._attentions):
            self.calls.append(torch.stack(self._rows))
            self._rows = []
