"""Llama over one prefix, B images and B x Q questions in one pass, without computing anything twice.

Each question attends to the prefix, its image and itself, at the positions directly after the image. The LLM thus
computes the same as in evaluation with one prompt per question. The prefix is the same for all prompts and attends to
nothing else, so it is computed once for the whole batch.
"""

import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import rotate_half

_CHUNK = 160  # image queries per attention call; attention is causal, so early chunks read few keys


def packed_forward(llm, prefix, image, questions, positions=None, lengths=None, probe=None):
    """Final hidden states [B, Q, L, D] of the question tokens. With `probe`, also those after so many layers.

    prefix: int64 [p]. image: embeddings [B, N, D], right-padded. questions: int64 [B, Q, L], right-padded.
    positions: int64 [B, N + 1], position of each vision token and of the first question token, counted from the end of
    the prefix. Default: 0, 1, ..., and the image's length. lengths: int64 [B], vision tokens without padding.
    Default: N.
    """
    # 1. Positions of the flat stream: prefix, images, questions.
    model = llm.model
    b, n, width = image.shape
    _, q, block = questions.shape
    p = len(prefix)
    if lengths is None:
        lengths = torch.full((b,), n)
    if positions is None:
        positions = torch.cat([torch.arange(n).expand(b, n), lengths[:, None]], dim=1)
    starts = positions[:, -1].view(b, 1, 1)
    where = torch.cat(
        [
            torch.arange(p),
            (p + positions[:, :-1]).reshape(-1),
            (p + starts + torch.arange(block)).expand(b, q, block).reshape(-1),
        ]
    )
    # 2. Embeddings, rotation and mask.
    hidden = torch.cat(
        [model.embed_tokens(prefix), image.reshape(-1, width), model.embed_tokens(questions).view(-1, width)]
    )
    cos, sin = (part[0].unsqueeze(1) for part in model.rotary_emb(hidden, where[None]))
    mask = _question_mask(p, n, q, block, lengths)
    # 3. Decoder layers.
    text, middle = p + b * n, None
    for number, layer in enumerate(model.layers):
        normed, attention = layer.input_layernorm(hidden), layer.self_attn
        # Only the questions' outputs of the last layer are read. Its other tokens need only keys and values.
        first = text if number + 1 == len(model.layers) else 0
        key, value = (f(normed).unflatten(-1, (-1, attention.head_dim)) for f in (attention.k_proj, attention.v_proj))
        query = attention.q_proj(normed[first:]).unflatten(-1, (-1, attention.head_dim))
        key = key * cos + rotate_half(key) * sin
        query = query * cos[first:] + rotate_half(query) * sin[first:]
        mixed = _attend(query, key, value, (p, b, n, q, block), mask)
        hidden = hidden[first:] + attention.o_proj(mixed.flatten(1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        if number + 1 == probe:
            middle = model.norm(hidden[text:]).view(b, q, block, width)
    states = model.norm(hidden).view(b, q, block, width)
    return states if probe is None else (states, middle)


def _question_mask(p, n, q, block, lengths):
    """bool [B or 1, 1, Q * L, p + N + Q * L]: a token attends to prefix, real vision tokens and its question so far."""
    own = torch.block_diag(*[torch.ones(block, block).tril()] * q).bool()
    seen = torch.arange(n) < lengths[:, None]
    if bool(seen.all()):  # without padding, one row of the mask serves the whole batch
        seen = seen[:1]
    front = torch.cat([torch.ones(len(seen), p, dtype=torch.bool), seen], dim=1)[:, None, :].expand(-1, q * block, -1)
    return torch.cat([front, own.expand(len(seen), -1, -1)], dim=-1).unsqueeze(1)


def _attend(query, key, value, dims, mask):
    """Attention outputs [queries, H, d] of the flat stream. `query` holds all its tokens, or only the questions."""
    p, b, n, q, block = dims
    heads, size = key.shape[1:]
    k_prefix, k_image, k_text = _parts(key, dims)
    v_prefix, v_image, v_text = _parts(value, dims)
    keys = torch.cat([k_prefix.expand(b, -1, -1, -1), k_image, k_text], dim=2)
    values = torch.cat([v_prefix.expand(b, -1, -1, -1), v_image, v_text], dim=2)
    if len(query) == b * q * block:
        q_text = query.view(b, -1, heads, size).transpose(1, 2)
        return F.scaled_dot_product_attention(q_text, keys, values, attn_mask=mask).transpose(1, 2).flatten(0, 1)
    q_prefix, q_image, q_text = _parts(query, dims)
    out = [F.scaled_dot_product_attention(q_prefix, k_prefix, v_prefix, is_causal=True)]
    image = []
    # In chunks: SDPA with a mask computes also the masked half, and the later keys are not passed at all here. Padding
    # needs no mask, because it is on the right and nothing real attends to it.
    for start in range(0, n, _CHUNK):
        end = min(n, start + _CHUNK)
        causal = torch.ones(end - start, p + end, dtype=torch.bool).tril(p + start)
        part, seen = q_image[:, :, start:end], p + end
        image.append(F.scaled_dot_product_attention(part, keys[:, :, :seen], values[:, :, :seen], attn_mask=causal))
    out.append(torch.cat(image, dim=2))
    out.append(F.scaled_dot_product_attention(q_text, keys, values, attn_mask=mask))
    return torch.cat([part.transpose(1, 2).flatten(0, 1) for part in out])


def _parts(x, dims):
    """Parts of the flat stream [tokens, H, d]: prefix [1, H, p, d], images [B, H, N, d], questions [B, H, Q * L, d]."""
    p, b, n, q, block = dims
    first, *others = x.split([p, b * n, b * q * block])
    return first[None].transpose(1, 2), *(part.view(b, -1, *x.shape[1:]).transpose(1, 2) for part in others)
