"""Methods inside the LLM and adaptive KV caches, for a model of transformers whose own generate() runs.

The LLM of the model runs by the layer loop.
llava/model/decoding/layer_loop.py has the loop, and this file its caller: it takes the place of the forward() of the
LLM for one call. Layers are called as they are. Kept tokens keep their positions, 1-D or M-RoPE, whatever the rule of
the method is on LLaVA, so that a model sees the distances that it was trained with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import MoeModelOutputWithPast

from llava.common.errors import UserError
from llava.model.decoding.adaptive_cache import AdaptiveCache
from llava.model.decoding.cache_argument import CACHE
from llava.model.decoding.dropping import Dropping
from llava.model.decoding.layer_loop import (
    ATTENTION,
    decode_layers,
    prefill_layers,
    refuse_beyond_window,
    refuse_settings,
    step_layers,
)


@contextmanager
def cutting(llm, dropping: Dropping | None, cache=None) -> Iterator[None]:
    """Run every call of `llm` inside the block by the layer loop, where `dropping` or an AdaptiveCache needs it.

    llm: the base model of the LLM. A prefill and the decode steps after it need the same `dropping`.
    cache: the KV cache of the calls
    UserError for another attention than SDPA, here, and in calls for settings that the loop does not support.
    """
    if dropping is None and not isinstance(cache, AdaptiveCache):
        yield
        return
    if llm.config._attn_implementation not in (None, "sdpa"):
        raise UserError(
            f'methods inside the LLM and adaptive KV caches need attention "sdpa", but the model was set to "{llm.config._attn_implementation}"'
        )

    def forward(
        inputs_embeds: Tensor,
        position_ids: Tensor,
        visual_pos_masks: Tensor | None = None,
        deepstack_visual_embeds: list[Tensor] | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ):
        cache = kwargs.get(CACHE)
        refuse_settings(llm.config, cache, kwargs)
        if position_ids.dim() == 3 and len(position_ids) == 4:
            position_ids = position_ids[1:]  # the first row numbers the text, for packed rows
        past = 0 if cache is None else cache.get_seq_length()
        refuse_beyond_window(llm.config, past + inputs_embeds.shape[1])
        if isinstance(cache, AdaptiveCache):
            if not past:
                cache.begin_prefill(*inputs_embeds.shape[:2])
                # Every layer sees all tokens: transformers' loop passes `adaptive` on to the attention function.
                return whole(
                    inputs_embeds=inputs_embeds, position_ids=position_ids, use_cache=True, adaptive=cache, **kwargs
                )
            cache.begin_step(inputs_embeds.shape[1])
            hidden = step_layers(llm, inputs_embeds, cache)
        elif past:
            hidden = decode_layers(llm, inputs_embeds, position_ids, cache, dropping)
        else:
            if cache is None and use_cache:
                cache = DynamicCache(config=llm.config)
            added = [_spread(states, visual_pos_masks) for states in deepstack_visual_embeds or ()]
            hidden = prefill_layers(llm, inputs_embeds, position_ids, cache, dropping, added)
        # The class has the fields of every LLM's output.
        return MoeModelOutputWithPast(last_hidden_state=llm.norm(hidden), **{CACHE: cache})

    config, before, whole, own = llm.config, llm.config._attn_implementation, llm.forward, vars(llm).get("forward")
    config._attn_implementation, llm.forward = ATTENTION, forward
    try:
        # The number of tokens changes from layer to layer, so a compiled LLM or layer would be compiled again and again.
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        config._attn_implementation = before
        del llm.forward
        if own is not None:
            llm.forward = own


def _spread(states: Tensor, is_image: Tensor) -> Tensor:
    """States [n, D] of the n vision tokens of is_image [B, L], as [B, L, D] with zeros for text."""
    zeros = states.new_zeros(*is_image.shape, states.shape[-1])
    return zeros.index_put((is_image,), states)
