"""The CLIP vision tower: patch features and the [CLS] attention row of one layer, in one SDPA pass.

LLaVA reads the features of an inner layer (`mm_vision_select_layer`, -2). The tower ends there: later layers are
neither built nor run. Saliency is the attention of the [CLS] query in that layer. It is one row, so it is computed from
the query and the keys, and the attention itself stays SDPA. States that only some methods read (hidden states with
[CLS], keys) come out of the same pass on request.
"""

from __future__ import annotations

import copy
import weakref

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.activations import QuickGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from llava.kernels.quick_gelu import quick_gelu
from llava.model.graphs import Pool, Store, capture

_ATTENTION = "llava_sdpa_cls_row"
# Most tiles for which the tower is captured. With more tiles its kernels run longer than Python needs to launch them.
MAX_CAPTURED_TILES = 16
# The middle layer of HiPrune (arXiv 2508.00553), counted from 1: 9 of the 23 layers that LLaVA runs of CLIP-L.
MIDDLE_LAYER, PUBLISHED_LAYERS = 9, 23


def _sdpa_and_cls_row(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling,
    dropout=0.0,
    cls_rows=None,
    mean_keys=None,
    received=None,
    **kwargs,
):
    """Return the attention output of SDPA, as transformers' attention functions do.

    cls_rows: a list that gets the [CLS] row [T, P], mean over heads
    mean_keys: a list that gets the keys [T, 1 + P, d], mean over heads
    received: a list that gets the attention that each patch receives [T, P], mean over heads and over all 1 + P queries
    """
    if cls_rows is not None:
        cls_rows.append(cls_attention(query, key, scaling))
    if mean_keys is not None:
        mean_keys.append(key.float().mean(dim=1))
    if received is not None:
        received.append(received_attention(query, key, scaling))
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, is_causal=False
    )


AttentionInterface.register(_ATTENTION, _sdpa_and_cls_row)


def cls_attention(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Return the [CLS] row [T, P], float32, mean over heads, from query and key [T, H, 1 + P, d]."""
    # In float32: saliencies in half precision would tie often.
    scores = (query[:, :, :1].float() @ key.float().transpose(-1, -2)) * scaling
    return scores.softmax(dim=-1)[:, :, 0, 1:].mean(dim=1)


def received_attention(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Return the attention that each patch receives [T, P], float32, from query and key [T, H, 1 + P, d].

    It is the mean over heads and over all 1 + P queries.
    """
    # Head by head: a map of all heads would need H times the memory. Parts by head are the same for every number of
    # tiles, so the sums round alike in every batch.
    total = 0
    for head in range(query.shape[1]):
        scores = (query[:, head].float() @ key[:, head].float().transpose(-1, -2)) * scaling
        total = total + scores.softmax(dim=-1).mean(dim=1)
    return total[:, 1:] / query.shape[1]


def middle_layer(used: int) -> int:
    """Return MIDDLE_LAYER, counted from 1, scaled to a tower of which `used` layers run."""
    return max(1, round(MIDDLE_LAYER * used / PUBLISHED_LAYERS))


def layers_used(num_hidden_layers: int, select_layer: int) -> int:
    """Return how many encoder layers run for the output hidden_states[select_layer] (0 = the embeddings)."""
    return select_layer if select_layer >= 0 else num_hidden_layers + 1 + select_layer


class QuickGELU(nn.Module):
    """CLIP's activation in one kernel, in the place of transformers' QuickGELUActivation."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the activation of states [T, 1 + P, M] of an MLP of width M; any strides."""
        return quick_gelu(hidden.contiguous())  # a copy only if a hook or an adapter returned other strides


class CLIPVisionTower(nn.Module):
    """CLIP's vision transformer up to the layer whose features LLaVA uses.

    vision_config: of the whole tower
    select_layer: index into its hidden states, as in LLaVA's `mm_vision_select_layer` and transformers'
        `vision_feature_layer`
    ValueError for a layer that the tower does not have.
    """

    def __init__(self, vision_config: CLIPVisionConfig, select_layer: int = -2):
        super().__init__()
        used = layers_used(vision_config.num_hidden_layers, select_layer)
        if not 1 <= used <= vision_config.num_hidden_layers:
            raise ValueError(
                f"select_layer is {select_layer}, but the tower has {vision_config.num_hidden_layers} layers"
            )
        self._middle = middle_layer(used)
        config = copy.deepcopy(vision_config)
        config.num_hidden_layers = used
        config._attn_implementation = _ATTENTION
        self.vision_tower = CLIPVisionModel(config)
        for layer in self.vision_tower.encoder.layers:
            if type(layer.mlp.activation_fn) is QuickGELUActivation:  # a tower may be trained with another activation
                layer.mlp.activation_fn = QuickGELU()
        # Only CLIP's pooled output passes through this norm, and nothing here reads that output.
        self.vision_tower.post_layernorm = nn.Identity()
        self._store: weakref.ref[Store] | None = None
        self._pool: Pool | None = None
        self._parts: list[nn.Module] = []

    def capture_with(self, store: Store, pool: Pool | None = None) -> None:
        """Capture the tower from now on as a CUDA graph for every number of tiles that repeats, stored in `store`.

        At a few tiles a GPU waits for Python between the kernels.
        """
        self._store, self._pool = weakref.ref(store), pool  # weak: the store ends with its engine
        # A walk over all modules takes a millisecond, so it is done once and not for every request.
        self._parts = list(self.vision_tower.modules())

    @property
    def config(self) -> CLIPVisionConfig:
        return self.vision_tower.config

    @property
    def num_patches_per_side(self) -> int:
        return self.config.image_size // self.config.patch_size

    @property
    def device(self) -> torch.device:
        return self.vision_tower.embeddings.class_embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.vision_tower.embeddings.class_embedding.dtype

    def forward(self, pixel_values: Tensor, wanted: tuple[str, ...] = ()) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Encode tiles [T, 3, H, W], which may be smaller than the tower's: positions are then interpolated. Returns (features [T, P, W], saliency [T, P], the `wanted` states by name).

        saliency: attention from [CLS] to each patch, mean over heads, in float32. A row sums to 1 minus the attention
            of [CLS] to itself.
        wanted: states of the same layer: "hidden" [T, 1 + P, W], the features with [CLS] first; "keys" [T, 1 + P, d],
            the output of k_proj, mean over heads, in float32; "received" [T, P, 2], the attention that each patch
            receives in the middle layer and in that layer, mean over heads and queries, in float32
        """
        pixels = pixel_values.to(self.device, self.dtype)
        # A graph has no gradients and calls no hooks.
        store = None if self._store is None else self._store()
        if store is None or len(pixels) > MAX_CAPTURED_TILES or torch.is_grad_enabled() or not self._unwatched():
            return self._run(pixels, wanted)
        shape = "tower", len(pixels), pixels.shape[-1], wanted
        kept = store.get(shape)
        if kept is None:
            kept = StaticTower(self._run, pixels, wanted, self._pool)
            store.put(shape, kept)
        return kept(pixels)

    def _unwatched(self) -> bool:
        """Return whether no part of the tower has a hook."""
        return not any(part._forward_hooks or part._forward_pre_hooks for part in self._parts)

    def _run(self, pixels: Tensor, wanted: tuple[str, ...]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Run the tower without a graph; arguments and result as in `forward`."""
        tower = self.vision_tower
        hidden = tower.pre_layrnorm(
            tower.embeddings(pixels, interpolate_pos_encoding=pixels.shape[-1] != self.config.image_size)
        )
        *layers, last = tower.encoder.layers
        received: list[Tensor] | None = [] if "received" in wanted else None
        for number, layer in enumerate(layers, start=1):
            hidden = layer(hidden, attention_mask=None, received=received if number == self._middle else None)
        cls_rows: list[Tensor] = []
        mean_keys: list[Tensor] | None = [] if "keys" in wanted else None
        hidden = last(hidden, attention_mask=None, cls_rows=cls_rows, mean_keys=mean_keys, received=received)
        states = {"hidden": hidden} if "hidden" in wanted else {}
        if mean_keys:
            states["keys"] = mean_keys[0]
        if received:
            # In a tower of one layer there is one entry, for both.
            states["received"] = torch.stack([received[0], received[-1]], dim=-1)
        return hidden[:, 1:], cls_rows[0], states


class StaticTower:
    """The tower for one number of tiles, in buffers at fixed addresses.

    The first call runs without a graph: it sets up libraries, which must not happen during a capture. The second call
    captures, and all calls from then on replay.
    """

    busy = False

    def __init__(self, run, pixels: Tensor, wanted: tuple[str, ...], pool: Pool | None = None):
        self._run, self._wanted, self._pool = run, wanted, pool
        self._pixels = torch.empty_like(pixels)
        self._calls, self._captures = 0, True
        self._graph: torch.cuda.CUDAGraph | None = None
        self._found: tuple[Tensor, Tensor, dict[str, Tensor]] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        held = [self._pixels]
        if self._found is not None:
            held += [*self._found[:2], *self._found[2].values()]
        return sum(tensor.nbytes for tensor in held)

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Encode tiles as CLIPVisionTower.forward does; the results are copies that no later call overwrites."""
        self._calls += 1
        if self._graph is None and self._captures and self._calls > 1:
            found: list[tuple] = []
            self._graph = capture(lambda: found.append(self._run(self._pixels, self._wanted)), self._pool)
            self._captures, self._found = self._graph is not None, found[0] if self._graph is not None else None
        if self._graph is None:
            return self._run(pixels, self._wanted)
        self._pixels.copy_(pixels)
        self._graph.replay()
        features, cls_row, states = self._found
        return features.clone(), cls_row.clone(), {name: state.clone() for name, state in states.items()}
