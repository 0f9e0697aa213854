"""The decoder loop in which vision tokens go between layers (llava/methods/inside_llm) and the KV cache adapts
(llava/methods/kv_cache).

It runs in place of transformers' own loop where a request brings a `Dropping`, in prefill and in every cached step after
it, and in the decode steps of an `AdaptiveCache`; without them, transformers' loop runs. Decoder layers are called whole
wherever a method allows it. Queries and keys are picked up inside the attention function, so any layer type and any
grouping of heads will do, and SDPA computes the attention itself; in the decode steps of an AdaptiveCache the attention
reads the entries that its policy lists. Each layer's KV cache gets what the layer's attention saw, and nothing else.
"""

from __future__ import annotations

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
    """Where a layer's attention leaves its queries [B, H, S, d] and keys [B, G, S, d], rotated, and its scaling."""

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
    """SDPA; where the caller passes `seen`, it also notes the queries and keys there.

    adaptive: the cache that, after SDPA in prefill, keeps what its policy wants of the layer's entries, and in a decode
    step computes the attention over those.
    """
    if adaptive is not None and adaptive.steps:
        return adaptive.layers[module.layer_idx].attend(query, scaling), None
    if seen is not None:
        seen.query, seen.key, seen.scaling = query, key, scaling
    output = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if adaptive is not None:
        adaptive.fill(module.layer_idx, query, key, value, scaling)
    return output


AttentionInterface.register(ATTENTION, _sdpa_seen)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


class _Flow:
    """What goes from layer to layer in prefill: hidden states [B, S, D], and positions, rotation and mask to match."""

    def __init__(self, hidden: Tensor, positions: Tensor, dropping: Dropping, rotary):
        self.hidden, self.positions = hidden, positions
        self._dropping, self._rotary = dropping, rotary
        self._refresh()

    def _refresh(self) -> None:
        self.rope = self._rotary(self.hidden, position_ids=self.positions.to(self.hidden.device))
        self.mask, valid = None, self._dropping.stage.valid
        if valid is not None:
            at = torch.arange(valid.shape[1], device=valid.device)
            # A padded query sees itself, for its row of the softmax to have something in it.
            seen = (at <= at[:, None]) & valid[:, None] | (at == at[:, None])
            self.mask = seen[:, None]

    def keep(self, index: Tensor, made: Tensor, *others: Tensor) -> list[Tensor]:
        """Go on with slots `index` [B, S'] of the hidden states and, numbered behind them, of `made` [B, M, D].

        others [B, S, D]: cut alike and returned.
        """
        if made.shape[1]:
            self.hidden = torch.cat([self.hidden, made], dim=1)
        self.hidden = _gather(self.hidden, index)
        if self._dropping.dropper.reindexed:
            self.positions = self._dropping.positions(self.positions.device)
        else:
            self.positions = self.positions.expand(len(index), -1).gather(1, index.to(self.positions.device))
        self._refresh()
        return [_gather(other, index) for other in others]


def _gather(values: Tensor, index: Tensor) -> Tensor:
    """values [B, S, D] at slots index [B, S']."""
    index = index.to(values.device)
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


class DroppingDecoder:
    """Mixin for an LLM's base model: `forward(..., dropping=)` drops vision tokens between layers, and an AdaptiveCache
    as `past_key_values` decides what is stored of them and read."""

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
        """As transformers' forward, whose name of the cache is either (cache_argument.py); with `dropping`, its prompts are prefilled with their image tokens cut per layer.

        The same object goes with every later call on that cache. Padding is known from it: attention_mask is not read.
        An AdaptiveCache takes one prefill of its prompts, then one token per row and call, and counts positions itself.
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
        self._refuse_beyond_window(past + hidden.shape[1])
        if past and dropping is not None and not dropping.stage_of:
            raise UserError(f"the cache holds {past} tokens already, but the prompt has not been prefilled with them")
        if adaptive is not None and past:
            adaptive.begin_step(hidden.shape[1])
            hidden = self.step(hidden, adaptive)
        elif past:
            hidden = self._decode(hidden, position_ids, cache, dropping)
        else:
            if adaptive is not None:
                adaptive.begin_prefill(*hidden.shape[:2])
            if dropping is None:
                return super().forward(
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    inputs_embeds=hidden,
                    use_cache=True,
                    adaptive=adaptive,
                    **{CACHE: adaptive},
                    **kwargs,
                )
            hidden = self._prefill(hidden, position_ids, cache, dropping)
            if adaptive is not None and dropping.dropper.reindexed:
                adaptive.end_prefill([stage.shift for stage in dropping.stages])
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), **{CACHE: cache})

    def _refuse(self, cache, kwargs: dict) -> None:
        """Say so where transformers was asked for what this loop does not do."""
        if self.config._attn_implementation != ATTENTION:
            raise UserError(
                f'methods inside the LLM and adaptive KV caches need attention "sdpa", but the model was set to '
                f'"{self.config._attn_implementation}"'
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

    def refuse_attention(self, tokens: int) -> None:
        """Say so where a prompt of so many tokens cannot be prefilled whole (prefill.py)."""
        self._refuse(None, {})
        self._refuse_beyond_window(tokens)

    def _refuse_beyond_window(self, tokens: int) -> None:
        window = getattr(self.config, "sliding_window", None)
        if window is not None and tokens > window:
            raise UserError(
                f"the sequence has reached {tokens} tokens, but methods inside the LLM and adaptive KV caches run within "
                f"this checkpoint's attention window only, so at most {window} are allowed"
            )

    def _prefill(self, hidden: Tensor, positions: Tensor | None, cache, dropping: Dropping) -> Tensor:
        dropping.begin(hidden)
        place = dropping.dropper.place
        if positions is None:
            positions = dropping.positions(hidden.device)
        flow = _Flow(hidden, positions, dropping, self.rotary_emb)
        for number, layer in enumerate(self.layers):
            cut = dropping.cuts_at(number)
            if cut and place == BEFORE:
                flow.hidden = flow.hidden.to(_device(layer))
                flow.keep(*dropping.cut(number, *_last_query(layer, flow), flow.hidden))
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
            if cut and place == INSIDE:
                _run_cut_inside(layer, number, flow, call, seen, dropping)
                continue
            flow.hidden = layer(flow.hidden, **call)
            if cut and place == AFTER:
                flow.keep(*dropping.cut(number, seen.query, seen.key, seen.scaling, flow.hidden))
        return flow.hidden

    def _decode(self, hidden: Tensor, positions: Tensor | None, cache, dropping: Dropping) -> Tensor:
        """A cached step: each layer counts positions, and masks its cache, by the survivors that it saw in prefill."""
        new = cache.get_seq_length() + hidden.shape[1] - max(dropping.stages[0].lengths)
        if positions is None:
            whole = torch.tensor(dropping.stages[0].lengths, device=hidden.device)[:, None]
            positions = whole + torch.arange(new - hidden.shape[1], new, device=hidden.device)
        calls: dict[int, dict] = {}  # by stage: layers with the same survivors share what they are called with
        numberings: dict[int, tuple] = {}
        for number, layer in enumerate(self.layers):
            stage = dropping.stage_of[number]
            if stage not in calls:
                numbering = stage if dropping.dropper.reindexed else 0
                if numbering not in numberings:
                    own = positions - dropping.stages[numbering].shift.to(positions.device)[:, None]
                    numberings[numbering] = own, self.rotary_emb(hidden, position_ids=own.to(hidden.device))
                own, rope = numberings[numbering]
                mask = dropping.decode_mask(stage, new, hidden.shape[1])
                calls[stage] = {"attention_mask": mask, "position_embeddings": rope, "position_ids": own}
            hidden = layer(hidden, use_cache=True, **{CACHE: cache}, **calls[stage])
        return hidden

    def step(self, hidden: Tensor, cache: AdaptiveCache) -> Tensor:
        """One new token per row, hidden [B, 1, D], on what the cache's policy lists -> [B, 1, D], not normalised.

        All of it is work on the device; the host's part of a step is cache.begin_step(1), before it.
        """
        positions = cache.advance().to(hidden.device)
        ropes = [self.rotary_emb(hidden, position_ids=own) for own in positions]
        for number, layer in enumerate(self.layers):
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


def _run_cut_inside(layer, number: int, flow: _Flow, call: dict, seen: AttentionInputs, dropping: Dropping) -> None:
    """One decoder layer by its parts: attention over all tokens, MLP over what is left."""
    device = _device(layer)
    flow.hidden = flow.hidden.to(device)
    call["attention_mask"], call["position_ids"] = _to(call["attention_mask"], device), call["position_ids"].to(device)
    call["position_embeddings"] = tuple(part.to(device) for part in call["position_embeddings"])
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(flow.hidden), **call)
    index, made = dropping.cut(number, seen.query, seen.key, seen.scaling, flow.hidden)
    (attended,) = flow.keep(index, made, attended)
    hidden = flow.hidden + attended
    flow.hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def _last_query(layer, flow: _Flow) -> tuple[Tensor, Tensor, float]:
    """What a layer that has not run yet would ask and answer: query [B, H, 1, d] of the last slot, key [B, G, S, d]."""
    attention, states = layer.self_attn, layer.input_layernorm(flow.hidden)
    batch, length = states.shape[:2]
    key = attention.k_proj(states).view(batch, length, -1, attention.head_dim).transpose(1, 2)
    query = attention.q_proj(states[:, -1:]).view(batch, 1, -1, attention.head_dim).transpose(1, 2)
    cos, sin = (part.to(key.device) for part in flow.rope)
    _, key = apply_rotary_pos_emb(key, key, cos, sin)
    query, _ = apply_rotary_pos_emb(query, query, cos[:, -1:], sin[:, -1:])
    return query, key, attention.scaling


def _device(layer) -> torch.device:
    """Where a layer's parts are; UserError where they are on no device while the layer does not run (offloading)."""
    device = layer.self_attn.q_proj.weight.device
    if device.type == "meta":
        raise UserError(
            "methods that call the parts of a layer (fitprune, pyramiddrop) need its weights in memory, but they are "
            "offloaded; use fewer of them at once, or a device that holds the model"
        )
    return device


def _to(values: Tensor | None, device: torch.device) -> Tensor | None:
    return None if values is None else values.to(device)
