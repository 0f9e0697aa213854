"""The engine's arithmetic of transformers' decoder layers, in fewer operations: decode steps, and prefill on a GPU.

At batch 1 a step reads weights and does little else, so that whatever else is launched shows: on a CPU as time in Python,
on a GPU as kernels of microseconds between those that read. Here a layer is ten operations: norm, q/k/v, rotation and
cache, two of attention, output, norm, gate/up, activation, down. What lies between the products is one fused kernel each
(llava/kernels) on a GPU and the layers' own operations elsewhere. The numbers are the modules' up to rounding;
`Stepper.for_model` says whether a model's layers are such that this holds.
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
from llava.kernels.rotate_append import rotate_append
from llava.kernels.silu_mul import silu_mul
from llava.model.decoding.adaptive_cache import AdaptiveCache

LAYERS, NORMS = (LlamaDecoderLayer, MistralDecoderLayer), (LlamaRMSNorm, MistralRMSNorm)
# Activations that silu_mul computes; any other is called as the module it is.
SILU = {"SiLU", "SiLUActivation"}


class Stepper:
    """Runs the layers of a causal LM of Llama's or Mistral's kind: one token per row on an AdaptiveCache, or a prompt."""

    def __init__(self, model):
        self._model = model
        self._layers = [_Layer(layer) for layer in model.model.layers]

    @staticmethod
    def for_model(model) -> Stepper | None:
        """None where a layer is not as its class made it: quantised or with adapters, hooked (spread over devices,
        offloaded, or watched), or of another architecture. Such layers are called as they are (model.decode_step)."""
        plain = all(type(layer) in LAYERS and _plain(layer) for layer in model.model.layers)
        return Stepper(model) if plain and _plain(model.model.norm) and _plain(model.lm_head) else None

    @property
    def fused(self) -> bool:
        """Whether prefill gains by it: where the kernels are Triton's. Elsewhere the layers are called as they are."""
        weight = self._layers[0].out[0]
        return backend.backend_for(weight) == "triton"

    def __call__(self, tokens: Tensor, cache: AdaptiveCache) -> Tensor:
        """tokens [B], after cache.begin_step(1) -> [B, V] float32 logits. Nothing in it needs the host."""
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

    def prefill(self, hidden: Tensor, positions: Tensor, last: Tensor, sink) -> Tensor:
        """hidden [B, S, D], padded on the right, positions [B, S], last [B]: slot of each row's last token -> [B, V] float32
        logits of what follows it.

        sink: room_for(layer, key) -> where the layer's rotated keys and its values [B, G, >= S, d] go; fill(layer, query,
        key, value, scaling), called when its attention has seen them.
        """
        base, delta, shape = self._model.model, None, hidden.shape[:2]
        cos, sin = _rope(base.rotary_emb(hidden, position_ids=positions))
        hidden = hidden.flatten(0, 1)
        for number, layer in enumerate(self._layers):

            def attend(query, key, value, number=number, layer=layer):
                query, key, value = (part.unflatten(0, shape) for part in (query, key, value))
                keys, values = sink.room_for(number, key)
                query = rotate_append(query, key, value, cos, sin, keys, values)
                keys, values = (states[:, :, : key.shape[1]] for states in (keys, values))
                grouped = keys.shape[1] < query.shape[1]
                attended = scaled_dot_product_attention(
                    query, keys, values, is_causal=True, scale=layer.scaling, enable_gqa=grouped
                )
                sink.fill(number, query, keys, values, layer.scaling)
                return attended.transpose(1, 2)

            hidden, delta = layer(hidden, delta, attend)
        last = last + torch.arange(0, len(hidden), shape[1], device=hidden.device)
        return self._logits(hidden[last], delta[last])

    def _logits(self, hidden: Tensor, delta: Tensor) -> Tensor:
        head = self._model.lm_head
        _, states = add_rms_norm(hidden, delta, *_norm_of(self._model.model.norm))
        return linear(states, head.weight, head.bias).float()


class _Layer:
    """One decoder layer: its weights, where they are."""

    def __init__(self, layer):
        attention, mlp = layer.self_attn, layer.mlp
        self.norms = [_norm_of(norm) for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
        self.project = _Products([attention.q_proj, attention.k_proj, attention.v_proj])
        self.expand = _Products([mlp.gate_proj, mlp.up_proj])
        self.out, self.down = ((module.weight, module.bias) for module in (attention.o_proj, mlp.down_proj))
        self.act = silu_mul if type(mlp.act_fn).__name__ in SILU else lambda gate, up: mlp.act_fn(gate) * up
        self.size, self.scaling = attention.head_dim, attention.scaling

    def __call__(self, hidden: Tensor, delta: Tensor | None, attend: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        """hidden [N, D] of all rows' tokens and what is still to be added to it -> the same of the next layer.

        attend: query [N, H, d], key and value [N, G, d] before rotation -> attention's output, N tokens of [H, d].
        Two dimensions, since a product takes longer to start with three.
        """
        hidden, states = add_rms_norm(hidden, delta, *self.norms[0])
        query, key, value = (part.view(len(part), -1, self.size) for part in self.project(states))
        attended = attend(query, key, value).reshape(len(hidden), -1)
        hidden, states = add_rms_norm(hidden, linear(attended, *self.out), *self.norms[1])
        return hidden, linear(self.act(*self.expand(states)), *self.down)


class _Products:
    """Products of one input with several weights: one product where the weights lie behind one another in memory
    (merge_projections), else one each."""

    def __init__(self, modules: Sequence[nn.Linear]):
        weights, biases = ([getattr(module, name) for module in modules] for name in ("weight", "bias"))
        self._each = list(zip(weights, biases, strict=True))
        weight, bias = _joined(weights), None if biases[0] is None else _joined(biases)
        self._whole = (weight, bias) if weight is not None and (biases[0] is None or bias is not None) else None
        self._sizes = [len(weight) for weight in weights]

    def __call__(self, states: Tensor) -> Sequence[Tensor]:
        if self._whole is not None:
            return linear(states, *self._whole).split(self._sizes, dim=-1)
        return [linear(states, *one) for one in self._each]


def merge_projections(model) -> None:
    """Let the weights that one input is multiplied with (query, key and value; gate and up) lie behind one another, so that
    a step takes one product for them. The modules keep theirs, as views; nothing is stored twice. Layers that are not as
    their classes made them stay as they are."""
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
        whole = torch.cat(list(parts))
        for module, part in zip(modules, whole.split([len(part) for part in parts]), strict=True):
            setattr(module, name, nn.Parameter(part, requires_grad=getattr(module, name).requires_grad))


def _joined(parts: Sequence[Tensor]) -> Tensor | None:
    """One tensor whose rows are those of `parts`, where they lie behind one another in one allocation; else None."""
    at, first = parts[0].storage_offset(), parts[0]
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or part.storage_offset() != at or not part.is_contiguous() or part.shape[1:] != first.shape[1:]:
            return None
        at += part.numel()
    shape = (sum(len(part) for part in parts), *first.shape[1:])
    return first.detach().as_strided(shape, first.stride(), first.storage_offset())


def _norm_of(module) -> tuple[Tensor, float]:
    """What add_rms_norm takes behind the states."""
    return module.weight, module.variance_epsilon


def _rope(parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """transformers' cos and sin [B, S, d] -> cos, and sin with the sign that rotate_half would give the other factor."""
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
