"""A plain recomputation of an LLM whose image tokens are dropped between layers: no cache, no padding, no SDPA.

It is told which tokens survive where (the records of a `Dropping`), and computes everything else on its own: one row at
a time, the whole sequence with all generated tokens at once, attention and rotation written out.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """RoPE of x [H, S, d] at positions [S]: pairs are (i, i + d/2)."""
    half = x.shape[-1] // 2
    angle = positions[:, None].float() / theta ** (torch.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)


def attend(layer, states: Tensor, positions: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    """Causal attention of one layer over normed states [S, D]: output [S, D] and rotated keys [G, S, d]."""
    part, length = layer.self_attn, len(states)
    query, key, value = (
        projection(states).view(length, -1, part.head_dim).transpose(0, 1)
        for projection in (part.q_proj, part.k_proj, part.v_proj)
    )
    query, key = rotate(query, positions, theta), rotate(key, positions, theta)
    share = query.shape[0] // key.shape[0]
    scores = query @ key.repeat_interleave(share, dim=0).transpose(1, 2) / part.head_dim**0.5
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    out = scores.masked_fill(future, float("-inf")).softmax(dim=-1) @ value.repeat_interleave(share, dim=0)
    return part.o_proj(out.transpose(0, 1).reshape(length, -1)), key


def image_order(record, count: int, start: int, total: int) -> tuple[list[int], list[list[int]]]:
    """Slots of the sequence that an image of `count` slots at `start` is after a cut, `total` + i for its token i."""
    order = [start + slot if slot < count else total + slot - count for slot in record.order.tolist()]
    return order, [[start + slot for slot in members] for members in record.sources]


@torch.no_grad()
def recompute(model, prompt: Tensor, dropping, row: int, tokens: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Logits [1 + len(tokens), V] of one row, before and after each of `tokens`, and each layer's rotated prompt keys.

    prompt [S, D]: embeddings without padding.
    """
    llm, place, reindexed = model.model, dropping.dropper.place, dropping.dropper.reindexed
    theta = model.config.rope_parameters["rope_theta"]
    states = torch.cat([prompt, llm.embed_tokens(torch.tensor(tokens, dtype=torch.long))])
    positions = torch.arange(len(states))
    images = list(dropping.prompts[row].images)
    pending = [{record.layer: record for record in records} for records in dropping.records[row]]
    keys = []

    def cut(number: int, *values: Tensor) -> list[Tensor]:
        """Drop at layer `number`: each of values [S, D], and positions and images beside them."""
        nonlocal positions, images
        order, sources, at, moved, gone = [], [], 0, [], 0
        for (start, count), records in zip(images, pending, strict=True):
            order += range(at, start)
            at = start + count
            if number in records:
                mine, made = image_order(records[number], count, start, len(positions) + len(sources))
                sources += made
            else:
                mine = list(range(start, at))
            moved.append((start - gone, len(mine)))
            gone += count - len(mine)
            order += mine
        order += range(at, len(positions))
        images = moved
        made = [[value[members].mean(dim=0) for members in sources] for value in values]
        assert not sources or reindexed, "a made token has no position of its own"
        positions = torch.arange(len(order)) if reindexed else positions[order]
        return [
            torch.cat([value, torch.stack(m)])[order] if m else value[order]
            for value, m in zip(values, made, strict=True)
        ]

    for number, layer in enumerate(llm.layers):
        here = any(number in records for records in pending)
        if here and place == "before":
            (states,) = cut(number, states)
        attended, key = attend(layer, layer.input_layernorm(states), positions, theta)
        keys.append(key[:, : key.shape[1] - len(tokens)])
        if here and place == "inside":
            states, attended = cut(number, states, attended)
        states = states + attended
        states = states + layer.mlp(layer.post_attention_layernorm(states))
        if here and place == "after":
            (states,) = cut(number, states)
    return model.lm_head(llm.norm(states[-1 - len(tokens) :])), keys
