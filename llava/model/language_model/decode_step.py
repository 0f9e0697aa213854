"""A decode step of the engine: the arithmetic of transformers' decoder layers in fewer operations.

At batch 1 a step reads weights and does little else, so that whatever else is launched shows: on a CPU as time in Python,
on a GPU as kernels of microseconds between those that read. Here
RMSNorm is one operation, queries and keys are rotated together, and no module is called. The numbers are the modules' up
to rounding; `Stepper.of` says whether a model's layers are such that this holds.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralRMSNorm

from llava.model.kv_cache.cache import AdaptiveCache

LAYERS, NORMS = (LlamaDecoderLayer, MistralDecoderLayer), (LlamaRMSNorm, MistralRMSNorm)


class Stepper:
    """Feeds one token per row to a causal LM with Llama's or Mistral's layers, on an AdaptiveCache."""

    def __init__(self, model):
        self._model = model
        self._layers = [_Layer(layer) for layer in model.model.layers]

    @staticmethod
    def of(model) -> Stepper | None:
        """None where a layer is not as its class made it: quantised or with adapters, hooked (spread over devices,
        offloaded, or watched), or of another architecture. Such layers are called as they are (model.decode_step)."""
        plain = all(type(layer) in LAYERS and _plain(layer) for layer in model.model.layers)
        return Stepper(model) if plain and _plain(model.model.norm) and _plain(model.lm_head) else None

    def __call__(self, tokens: Tensor, cache: AdaptiveCache) -> Tensor:
        """tokens [B], after cache.begin_step(1) -> [B, V] float32 logits. Nothing in it needs the host."""
        base, head = self._model.model, self._model.lm_head
        hidden = base.embed_tokens(tokens)
        ropes = [_rope(base.rotary_emb(hidden, position_ids=own)) for own in cache.next_positions()]
        for layer, storage, own in zip(self._layers, cache.layers, cache.numbering, strict=True):
            hidden = layer(hidden, storage, *ropes[own])
        cache.end_step()
        return linear(rms_norm(hidden, *_norm_of(base.norm)), head.weight, head.bias).float()


class _Layer:
    """One decoder layer: its weights, where they are."""

    def __init__(self, layer):
        attention, mlp = layer.self_attn, layer.mlp
        self.norms = [_norm_of(norm) for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
        self.query, self.key, self.value, self.out, self.gate, self.up, self.down = (
            (module.weight, module.bias)
            for module in (
                *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
                *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
            )
        )
        self.act, self.size, self.scaling = mlp.act_fn, attention.head_dim, attention.scaling

    def __call__(self, hidden: Tensor, storage, cos: Tensor, sin: Tensor) -> Tensor:
        """hidden [B, D]; storage: the layer's LayerCache; cos, sin [B, 1, d], sin with rotate_half's sign."""
        split = (len(hidden), -1, self.size)
        states = rms_norm(hidden, *self.norms[0])
        query, key = linear(states, *self.query).view(split), linear(states, *self.key).view(split)
        both = torch.cat([query, key], dim=1)
        both = both * cos + both.roll(self.size // 2, dims=-1) * sin
        query, key = both[:, : query.shape[1], None], both[:, query.shape[1] :, None]
        storage.update(key, linear(states, *self.value).view(split)[:, :, None])
        attended = storage.attend(query, self.scaling).reshape(len(hidden), -1)
        hidden = hidden + linear(attended, *self.out)
        states = rms_norm(hidden, *self.norms[1])
        return hidden + linear(self.act(linear(states, *self.gate)) * linear(states, *self.up), *self.down)


def _norm_of(module) -> tuple:
    """What rms_norm takes behind the states."""
    return module.weight.shape, module.weight, module.variance_epsilon


def _rope(parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """transformers' cos and sin [B, 1, d] -> cos, and sin with the sign that rotate_half would give the other factor."""
    cos, sin = parts
    half = sin.shape[-1] // 2
    return cos, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)


def _plain(module: nn.Module) -> bool:
    """Whether all parts with weights are torch's and transformers' own, and nobody listens to a call of any part."""
    for part in module.modules():
        if part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) or hasattr(part, "_hf_hook"):
            return False
        if part._parameters and type(part) not in (nn.Linear, *NORMS):
            return False
    return True
