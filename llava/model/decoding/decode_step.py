"""Decoder layers of transformers in fewer operations, for the engine's decode steps and for its prefill on a GPU.

At batch 1 a step mostly reads weights, so every further launch costs visible time: Python on a CPU, kernels of
microseconds on a GPU. Here a layer has ten operations: norm, q/k/v, rotation and cache, two of attention, output, norm,
gate/up, activation, down; at batch 1 gate/up and the activation are one. Between the matrix products runs one fused kernel
each (llava/kernels) on a GPU, and the layers' own operations elsewhere. The results equal those of the modules up to rounding. `Stepper.for_model` checks that
the layers of a model allow this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralRMSNorm

from llava.kernels import backend
from llava.kernels.add_rms_norm import add_rms_norm
from llava.kernels.matvec import matvec
from llava.kernels.rotate_append import rotate_append
from llava.kernels.silu_mul import silu_mul
from llava.model.decoding.adaptive_cache import AdaptiveCache

LAYERS, NORMS = (LlamaDecoderLayer, MistralDecoderLayer), (LlamaRMSNorm, MistralRMSNorm)
# Most tokens whose MLP is computed at a time. For 32 prompts of 3,000 tokens, the MLP of a 7B model would need 6 GB.
MLP_TOKENS = 32_768
# Activations that silu_mul computes. Any other activation is called as a module.
SILU = {"SiLU", "SiLUActivation"}


class Stepper:
    """Runs the layers of a Llama or Mistral causal LM: one token per row on an AdaptiveCache, or a whole prompt."""

    def __init__(self, model):
        self._model = model
        self._layers = [_Layer(layer) for layer in model.model.layers]

    @staticmethod
    def for_model(model) -> Stepper | None:
        """Return a Stepper, or None where a layer is not as its class made it.

        Such layers are quantised, have adapters, have hooks (several devices, offloading, observers) or are of another
        architecture. They are called as modules (model.decode_step).
        """
        plain = all(type(layer) in LAYERS and _plain(layer) for layer in model.model.layers)
        return Stepper(model) if plain and _plain(model.model.norm) and _plain(model.lm_head) else None

    @property
    def fused(self) -> bool:
        """Whether prefill is faster with it: only with Triton kernels. Otherwise prefill calls the modules."""
        weight = self._layers[0].out[0]
        return backend.backend_for(weight) == "triton"

    def __call__(self, tokens: Tensor, cache: AdaptiveCache) -> Tensor:
        """Return the float32 logits [B, V] behind tokens [B]; cache.begin_step(1) must have been called.

        Nothing in it waits for the host, so it can be captured as a CUDA graph.
        """
        base = self._model.model
        hidden, delta = base.embed_tokens(tokens), None
        ropes = [_rope(base.rotary_emb(hidden, position_ids=own)) for own in cache.advance()]
        for layer, storage, own in zip(self._layers, cache.layers, cache.numbering, strict=True):
            cos, sin = ropes[own]

            def attend(query, key, value, storage=storage, cos=cos, sin=sin, layer=layer):
                query, key, value = query[:, None], key[:, None], value[:, None]
                return storage.attend(storage.append(query, key, value, cos, sin), layer.scaling)

            hidden, delta = layer(hidden, delta, attend)
        cache.end_step()
        return self._logits(hidden, delta)

    def prefill(self, hidden: Tensor, positions: Tensor, last: Tensor, sink, mask: Tensor | None = None) -> Tensor:
        """Return the float32 logits [B, V] behind each row's last token.

        hidden [B, S, D]: embeddings, padded on the right; positions [B, S]; last [B]: slot of each row's last token
        sink: room_for(layer, key) returns tensors [B, G, >= S, d] for the layer's rotated keys and its values;
            fill(layer, query, key, value, scaling) is called after the layer's attention
        mask: bool [B, 1, S, P + S] where the sink has P earlier entries before the own ones: seen() returns all of them
        """
        base, delta, shape = self._model.model, None, hidden.shape[:2]
        cos, sin = _rope(base.rotary_emb(hidden, position_ids=positions))
        hidden = hidden.flatten(0, 1)
        for number, layer in enumerate(self._layers):

            def attend(query, key, value, number=number, layer=layer):
                query, key, value = (part.unflatten(0, shape) for part in (query, key, value))
                keys, values = sink.room_for(number, key)
                query = rotate_append(query, key, value, cos, sin, keys, values)
                if mask is None:
                    keys, values = (states[:, :, : key.shape[1]] for states in (keys, values))
                else:
                    keys, values = sink.seen()
                grouped = keys.shape[1] < query.shape[1]
                attended = scaled_dot_product_attention(
                    query, keys, values, mask, is_causal=mask is None, scale=layer.scaling, enable_gqa=grouped
                )
                sink.fill(number, query, keys, values, layer.scaling)
                return attended.transpose(1, 2)

            hidden, delta = layer(hidden, delta, attend)
        # Only the last token of each row goes through the head: logits of a whole prompt would be [S, V] floats.
        last = last + torch.arange(0, len(hidden), shape[1], device=hidden.device)
        return self._logits(hidden[last], delta[last])

    def _logits(self, hidden: Tensor, delta: Tensor) -> Tensor:
        head = self._model.lm_head
        _, states = add_rms_norm(hidden, delta, *_norm_of(self._model.model.norm))
        return _product(states, head.weight, head.bias).float()


class _Layer:
    """One decoder layer: references to its weights, without copies."""

    def __init__(self, layer):
        attention, mlp = layer.self_attn, layer.mlp
        self.norms = [_norm_of(norm) for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
        self.project = _Products([attention.q_proj, attention.k_proj, attention.v_proj])
        self.expand = _Products([mlp.gate_proj, mlp.up_proj])
        self.out, self.down = ((module.weight, module.bias) for module in (attention.o_proj, mlp.down_proj))
        silu = type(mlp.act_fn).__name__ in SILU
        self.act = silu_mul if silu else lambda gate, up: mlp.act_fn(gate) * up
        self.gated = (mlp.gate_proj.weight, mlp.up_proj.weight) if silu and mlp.gate_proj.bias is None else None
        self.size, self.scaling = attention.head_dim, attention.scaling

    def __call__(self, hidden: Tensor, delta: Tensor | None, attend: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        """Run the layer on hidden [N, D], the tokens of all rows, and on delta, which is not yet added to it.

        Returns the same pair for the next layer. The sum is left open so that it is fused with the next norm.
        attend: function from query [N, H, d], key and value [N, G, d] before rotation to the output of attention, N
            tokens of [H, d]
        Tensors have two dimensions, because a matrix product on three takes longer to start.
        """
        hidden, states = add_rms_norm(hidden, delta, *self.norms[0])
        query, key, value = (part.view(len(part), -1, self.size) for part in self.project(states))
        attended = attend(query, key, value).reshape(len(hidden), -1)
        hidden, states = add_rms_norm(hidden, _product(attended, *self.out), *self.norms[1])
        return hidden, self._mlp(states)

    def _mlp(self, states: Tensor) -> Tensor:
        """Return the MLP's output for states [N, D]. More than MLP_TOKENS states are overwritten by it."""
        if len(states) <= MLP_TOKENS:
            return _product(self._activated(states), *self.down)
        for part in states.split(MLP_TOKENS):
            part.copy_(_product(self._activated(part), *self.down))
        return states

    def _activated(self, states: Tensor) -> Tensor:
        """Return act(gate) * up of states [N, D]."""
        if self.gated is not None and len(states) == 1:
            gate, up = self.gated
            return matvec(states, gate, up=up)
        return self.act(*self.expand(states))


class _Products:
    """Products of one input with several weights.

    One matrix product computes them all where the weights are adjacent in memory (merge_projections); otherwise there
    is one product per weight.
    """

    def __init__(self, modules: Sequence[nn.Linear]):
        weights, biases = ([getattr(module, name) for module in modules] for name in ("weight", "bias"))
        self._each = list(zip(weights, biases, strict=True))
        weight, bias = _joined(weights), None if biases[0] is None else _joined(biases)
        self._whole = (weight, bias) if weight is not None and (biases[0] is None or bias is not None) else None
        self._sizes = [len(weight) for weight in weights]

    def __call__(self, states: Tensor) -> Sequence[Tensor]:
        if self._whole is not None:
            return _product(states, *self._whole).split(self._sizes, dim=-1)
        return [_product(states, *one) for one in self._each]


def _product(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return linear(states, weight, bias) of states [N, D]. A single row has a kernel of its own."""
    return matvec(states, weight, bias) if len(states) == 1 else linear(states, weight, bias)


def merge_projections(model) -> None:
    """Make weights that multiply the same input adjacent in memory, so that a step computes one product for them.

    These are query, key and value, and gate and up. The modules keep their weights as views of the joint tensor, so
    nothing is stored twice. Layers that are not as their classes made them stay unchanged.
    """
    for layer in model.model.layers:
        if type(layer) in LAYERS and _plain(layer):
            attention, mlp = layer.self_attn, layer.mlp
            _merge([attention.q_proj, attention.k_proj, attention.v_proj])
            _merge([mlp.gate_proj, mlp.up_proj])


@torch.no_grad()
def _merge(modules: Sequence[nn.Linear]) -> None:
    for name in ("weight", "bias"):
        parts = [getattr(module, name) for module in modules]
        if any(part is None for part in parts) or _joined(parts) is not None:
            continue
        # The old tensors are freed when they are replaced, so only one group of weights is in memory twice.
        whole = torch.cat(list(parts))
        for module, part in zip(modules, whole.split([len(part) for part in parts]), strict=True):
            setattr(module, name, nn.Parameter(part, requires_grad=getattr(module, name).requires_grad))


def _joined(parts: Sequence[Tensor]) -> Tensor | None:
    """Return one view with the rows of all `parts` where they are adjacent in one allocation; None otherwise."""
    at, first = parts[0].storage_offset(), parts[0]
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or part.storage_offset() != at or not part.is_contiguous() or part.shape[1:] != first.shape[1:]:
            return None
        at += part.numel()
    shape = (sum(len(part) for part in parts), *first.shape[1:])
    return first.detach().as_strided(shape, first.stride(), first.storage_offset())


def _norm_of(module) -> tuple[Tensor, float]:
    """Return (weight, eps) of an RMSNorm module, as add_rms_norm takes them."""
    return module.weight, module.variance_epsilon


def _rope(parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return transformers' cos and sin [B, S, d] for rotate_append: sin gets the sign of rotate_half."""
    cos, sin = parts
    half = sin.shape[-1] // 2
    return cos, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)


def _plain(module: nn.Module) -> bool:
    """Return whether all parts with weights are plain torch or transformers modules, and no part has a hook."""
    # accelerate moves weights in a replaced `forward` or in _hf_hook. Reading the weights directly would skip that.
    for part in module.modules():
        if part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) or hasattr(part, "_hf_hook"):
            return False
        if part._parameters and type(part) not in (nn.Linear, *NORMS):
            return False
    return True
