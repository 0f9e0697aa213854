"""The decoder loop that drops vision tokens between layers and runs on adaptive KV caches.

The methods are in llava/methods/inside_llm and llava/methods/kv_cache. The loop replaces that of transformers for a
request with a `Dropping`, in prefill and in every cached step after it, and in the decode steps of an `AdaptiveCache`.
Without these, transformers' loop runs. Decoder layers are called as a whole wherever a method allows it. Queries and
keys are recorded inside the attention function, so any layer type and any grouping of heads works. SDPA computes the
attention itself; in the decode steps of an AdaptiveCache the attention reads the entries that the policy lists. The KV
cache of a layer gets exactly the tokens that the layer's attention saw.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llava.common.errors import UserError
from llava.methods.inside_llm.plan import AFTER, BEFORE, INSIDE
from llava.model.decoding.adaptive_cache import AdaptiveCache
from llava.model.decoding.cache_argument import CACHE
from llava.model.decoding.dropping import Dropping

ATTENTION = "llava_sdpa_seen"


class AttentionInputs:
    """Record of a layer's attention: its rotated queries [B, H, S, d] and keys [B, G, S, d], and its scaling."""

    query: Tensor
    key: Tensor
    scaling: float


def _sdpa_seen(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    seen: AttentionInputs | None = None,
    adaptive: AdaptiveCache | None = None,
    **kwargs,
):
    """Return the attention output of SDPA, as transformers' attention functions do.

    seen: where given, it gets the queries and keys
    adaptive: a cache that, in prefill, stores the entries that its policy keeps, after SDPA; in a decode step it
        computes the attention over its entries in place of SDPA
    """
    if adaptive is not None and adaptive.steps:
        return adaptive.layers[module.layer_idx].attend(query, scaling), None
    if seen is not None:
        seen.query, seen.key, seen.scaling = query, key, scaling
    output = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if adaptive is not None:
        adaptive.fill(module.layer_idx, query, key, value, scaling)
    return output


# The mask function needs the same name: transformers builds no mask for an attention function without one.
AttentionInterface.register(ATTENTION, _sdpa_seen)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


class _Flow:
    """State that prefill passes from layer to layer: hidden states [B, S, D], with positions, rotation and mask."""

    def __init__(self, hidden: Tensor, positions: Tensor, dropping: Dropping, rotary):
        self.hidden, self.positions = hidden, positions
        self._dropping, self._rotary = dropping, rotary
        self._refresh()

    def _refresh(self) -> None:
        """Compute the rotation and the mask of the current tokens."""
        self.rope = self._rotary(self.hidden, position_ids=self.positions.to(self.hidden.device))
        self.mask, valid = None, self._dropping.stage.valid
        if valid is not None:
            at = torch.arange(valid.shape[1], device=valid.device)
            # Padding attends to itself, so that its softmax row is finite: NaN would reach real tokens as 0 * NaN.
            seen = (at <= at[:, None]) & valid[:, None] | (at == at[:, None])
            self.mask = seen[:, None]

    def keep(self, index: Tensor, made: Tensor, *others: Tensor) -> list[Tensor]:
        """Keep the slots `index` [B, S'] of the hidden states; indices behind them are those of `made` [B, M, D].

        others [B, S, D]: cut in the same way and returned
        """
        if made.shape[1]:
            self.hidden = torch.cat([self.hidden, made], dim=1)
        self.hidden = _gather(self.hidden, index)
        if self._dropping.dropper.reindexed:
            self.positions = self._dropping.positions(self.positions.device)
        else:
            # Under M-RoPE the positions are [3, B, S].
            whole, index = self.positions, index.to(self.positions.device)
            lead = whole.shape[:-2]
            self.positions = whole.expand(*lead, *index.shape[:1], -1).gather(-1, index.expand(*lead, -1, -1))
        self._refresh()
        return [_gather(other, index) for other in others]


def _gather(values: Tensor, index: Tensor) -> Tensor:
    """Return values [B, S, D] at the slots index [B, S']."""
    index = index.to(values.device)
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


class DroppingDecoder:
    """Mixin for an LLM's base model, which adds two things to `forward`.

    `dropping` drops vision tokens between layers. An AdaptiveCache as `past_key_values` decides which entries are
    stored and read.
    """

    def __init__(self, config):
        if config._attn_implementation in (None, "sdpa"):
            config._attn_implementation = ATTENTION
        super().__init__(config)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        cache=None,
        dropping: Dropping | None = None,
        **kwargs,
    ):
        """Run transformers' forward. With `dropping`, prompts are prefilled with their vision tokens cut per layer.

        The KV cache may have either name (cache_argument.py).

        dropping: drops vision tokens in the prefill of its prompts. Every later call on that cache needs the same
            object. It knows the padding, so attention_mask is not read.
        past_key_values: an AdaptiveCache takes one prefill of its prompts, then one token per row and call, and counts
            positions itself.
        UserError for settings of transformers that this loop does not support.
        """
        cache = past_key_values if cache is None else cache
        adaptive = cache if isinstance(cache, AdaptiveCache) else None
        if dropping is None and adaptive is None:
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **{CACHE: cache},
                **kwargs,
            )
        self._refuse(cache, kwargs)
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=self.config)
        past = cache.get_seq_length() if cache is not None else 0
        refuse_beyond_window(self.config, past + hidden.shape[1])
        if past and dropping is not None and not dropping.stage_of:
            raise UserError(f"the cache holds {past} tokens already, but the prompt has not been prefilled with them")
        # 3. A cached step, or prefill.
        if adaptive is not None and past:
            adaptive.begin_step(hidden.shape[1])
            hidden = self.step(hidden, adaptive)
        elif past:
            hidden = decode_layers(self, hidden, position_ids, cache, dropping)
        else:
            if adaptive is not None:
                adaptive.begin_prefill(*hidden.shape[:2])
            if dropping is None:
                # Every layer sees all tokens: transformers' loop passes `adaptive` on to the attention function.
                return super().forward(
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    inputs_embeds=hidden,
                    use_cache=True,
                    adaptive=adaptive,
                    **{CACHE: adaptive},
                    **kwargs,
                )
            hidden = prefill_layers(self, hidden, position_ids, cache, dropping)
            if adaptive is not None and dropping.dropper.reindexed:
                adaptive.end_prefill([stage.shift for stage in dropping.stages])
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), **{CACHE: cache})

    def _refuse(self, cache, kwargs: dict) -> None:
        refuse_settings(self.config, cache, kwargs)

    def refuse_attention(self, tokens: int) -> None:
        """Raise UserError where a prompt of `tokens` tokens cannot be prefilled in one piece (prefill.py)."""
        self._refuse(None, {})
        refuse_beyond_window(self.config, tokens)

    def step(self, hidden: Tensor, cache: AdaptiveCache) -> Tensor:
        """Run one new token per row, hidden [B, 1, D], on an adaptive cache; return [B, 1, D], not normalised.

        All work is on the device. The host's part of the step is cache.begin_step(1), which must have been called.
        """
        return step_layers(self, hidden, cache)


def refuse_settings(config, cache, kwargs: dict) -> None:
    """Raise UserError for settings of transformers that this loop does not support."""
    if config._attn_implementation != ATTENTION:
        raise UserError(
            f'methods inside the LLM and adaptive KV caches need attention "sdpa", but the model was set to '
            f'"{config._attn_implementation}"'
        )
    if cache is not None and cache.is_compileable:
        raise UserError(
            "a cache of fixed size cannot hold a different number of tokens in each layer, allowed is a DynamicCache"
        )
    for name in ("output_attentions", "output_hidden_states"):
        if kwargs.get(name):
            raise UserError(
                f"{name} does not go with methods inside the LLM and adaptive KV caches: layers differ in their tokens"
            )


def refuse_beyond_window(config, tokens: int) -> None:
    """Raise UserError for a sequence that is longer than the sliding window, which this loop does not apply."""
    window = getattr(config, "sliding_window", None)
    if window is not None and tokens > window:
        raise UserError(
            f"the sequence has reached {tokens} tokens, but methods inside the LLM and adaptive KV caches run within "
            f"this checkpoint's attention window only, so at most {window} are allowed"
        )


def prefill_layers(
    llm, hidden: Tensor, positions: Tensor | None, cache, dropping: Dropping, added: Sequence[Tensor] = ()
) -> Tensor:
    """Run all layers over prompts [B, S, D] and drop tokens at the cuts; return [B, S', D], not normalised.

    llm: the base model of a causal LM, with `layers` and `rotary_emb`; its attention function is ATTENTION
    positions: [B, S], or [3, B, S] under M-RoPE
    added: [B, S, D] each; the first is added to the hidden states behind layer 0, and so on (DeepStack)
    """
    dropping.begin(hidden)
    place = dropping.dropper.place
    if positions is None:
        positions = dropping.positions(hidden.device)
    flow = _Flow(hidden, positions, dropping, llm.rotary_emb)
    for number, layer in enumerate(llm.layers):
        # 1. A cut before the layer needs the attention of a layer that has not run: one query is computed for it.
        cut = dropping.cuts_at(number)
        if cut and place == BEFORE:
            flow.hidden = flow.hidden.to(_device(layer))
            added = flow.keep(*dropping.cut(number, *_last_query(layer, flow), flow.hidden), *added)
        # 2. The arguments of the layer.
        dropping.note_layer()
        if isinstance(cache, AdaptiveCache):
            cache.rows = dropping.spans()
        call = {
            "attention_mask": flow.mask,
            "position_embeddings": flow.rope,
            "position_ids": flow.positions,
            CACHE: cache,
            "use_cache": cache is not None,
            "adaptive": cache if isinstance(cache, AdaptiveCache) else None,
        }
        if cut and place != BEFORE:
            call["seen"] = seen = AttentionInputs()
        # 3. The layer, and a cut inside or after it.
        if cut and place == INSIDE:
            added = _run_cut_inside(layer, number, flow, call, seen, dropping, added)
        else:
            flow.hidden = layer(flow.hidden, **call)
        if number < len(added):
            flow.hidden = flow.hidden + added[number].to(flow.hidden)
        if cut and place == AFTER:
            states = llm.norm(flow.hidden) if dropping.dropper.reads_normed else flow.hidden
            added = flow.keep(*dropping.cut(number, seen.query, seen.key, seen.scaling, states), *added)
    return flow.hidden


def decode_layers(llm, hidden: Tensor, positions: Tensor | None, cache, dropping: Dropping) -> Tensor:
    """Run a cached step on a cache of transformers; return the hidden states, not normalised.

    Positions and mask of a layer follow from the tokens that the layer saw in prefill.
    """
    new = cache.get_seq_length() + hidden.shape[1] - max(dropping.stages[0].lengths)
    if positions is None:
        whole = torch.tensor(dropping.stages[0].lengths, device=hidden.device)[:, None]
        positions = whole + torch.arange(new - hidden.shape[1], new, device=hidden.device)
    calls: dict[int, dict] = {}  # by stage: layers with the same kept tokens share their arguments
    numberings: dict[int, tuple] = {}
    for number, layer in enumerate(llm.layers):
        stage = dropping.stage_of[number]
        if stage not in calls:
            numbering = stage if dropping.dropper.reindexed else 0
            if numbering not in numberings:
                own = positions - dropping.stages[numbering].shift.to(positions.device)[:, None]
                numberings[numbering] = own, llm.rotary_emb(hidden, position_ids=own.to(hidden.device))
            own, rope = numberings[numbering]
            mask = dropping.decode_mask(stage, new, hidden.shape[1])
            calls[stage] = {"attention_mask": mask, "position_embeddings": rope, "position_ids": own}
        hidden = layer(hidden, use_cache=True, **{CACHE: cache}, **calls[stage])
    return hidden


def step_layers(llm, hidden: Tensor, cache: AdaptiveCache) -> Tensor:
    """Run one new token per row, hidden [B, 1, D], on an adaptive cache; return the hidden states, not normalised.

    cache.begin_step(1) must have been called. Everything here is on the device.
    """
    positions = cache.advance().to(hidden.device)
    ropes = [llm.rotary_emb(hidden, position_ids=own) for own in positions]
    for number, layer in enumerate(llm.layers):
        own = cache.numbering[number]
        hidden = layer(
            hidden,
            use_cache=True,
            adaptive=cache,
            position_embeddings=ropes[own],
            position_ids=positions[own],
            **{CACHE: cache},
        )
    cache.end_step()
    return hidden


def on_one_device(layers) -> bool:
    """Return whether all layers are on one device. Offloaded weights are on none: their device is "meta"."""
    # One weight stands for its layer, which is never split over devices. A walk over all weights takes two
    # milliseconds, as long as the selection of tokens.
    devices = {layer.input_layernorm.weight.device for layer in layers}
    return len(devices) == 1 and next(iter(devices)).type != "meta"


def _run_cut_inside(
    layer,
    number: int,
    flow: _Flow,
    call: dict,
    seen: AttentionInputs,
    dropping: Dropping,
    added: Sequence[Tensor],
) -> list[Tensor]:
    """Run one decoder layer part by part: attention over all tokens, MLP over the tokens that are left.

    Returns `added` for the tokens that are left.
    """
    # accelerate moves inputs to the device of a layer that is called as a whole. Its parts are called here, so we do.
    device = _device(layer)
    flow.hidden = flow.hidden.to(device)
    call["attention_mask"], call["position_ids"] = _to(call["attention_mask"], device), call["position_ids"].to(device)
    call["position_embeddings"] = tuple(part.to(device) for part in call["position_embeddings"])
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(flow.hidden), **call)
    index, made = dropping.cut(number, seen.query, seen.key, seen.scaling, flow.hidden)
    attended, *added = flow.keep(index, made, attended, *added)
    hidden = flow.hidden + attended
    flow.hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return added


def _last_query(layer, flow: _Flow) -> tuple[Tensor, Tensor, float]:
    """Return query [B, H, 1, d] of the last slot, key [B, G, S, d] and scaling of a layer that has not run yet."""
    attention, states = layer.self_attn, layer.input_layernorm(flow.hidden)
    batch, length = states.shape[:2]
    key = attention.k_proj(states).view(batch, length, -1, attention.head_dim)
    query = attention.q_proj(states[:, -1:]).view(batch, 1, -1, attention.head_dim)
    if hasattr(attention, "q_norm"):  # Qwen3
        query, key = attention.q_norm(query), attention.k_norm(key)
    query, key = query.transpose(1, 2), key.transpose(1, 2)
    cos, sin = (part.to(key.device) for part in flow.rope)
    # The function rotates a query and a key of one length; here they differ, so each is rotated on its own.
    _, key = apply_rotary_pos_emb(key, key, cos, sin)
    query, _ = apply_rotary_pos_emb(query, query, cos[:, -1:], sin[:, -1:])
    return query, key, attention.scaling


def _device(layer) -> torch.device:
    """Return the device of a layer. UserError for offloaded weights, which are on "meta" between calls."""
    device = layer.self_attn.q_proj.weight.device
    if device.type == "meta":
        raise UserError(
            "methods that call the parts of a layer (fitprune, pyramiddrop) need its weights in memory, but they are "
            "offloaded; use fewer of them at once, or a device that holds the model"
        )
    return device


def _to(values: Tensor | None, device: torch.device) -> Tensor | None:
    return None if values is None else values.to(device)
