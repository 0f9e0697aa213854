"""The CLIP vision tower: patch features and the [CLS] row of one layer, in one SDPA pass.

LLaVA reads the features of an inner layer (`mm_vision_select_layer`, -2), so the tower ends there: later layers are
neither built nor run. The [CLS] query's attention in that last layer is what saliency-based selection ranks patches
by. It is one row, so it is computed from the query and keys at hand, and the attention itself stays SDPA. What only some
methods read (the states with [CLS], the keys) comes out of the same pass where it is asked for.
"""

from __future__ import annotations

import copy
import weakref

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from llava.model.graphs import Store, capture

_ATTENTION = "llava_sdpa_cls_row"
# Tiles up to which the tower is captured: with more its kernels take longer than Python does to launch them.
CAPTURED_TILES = 16


def _sdpa_and_cls_row(
    module, query, key, value, attention_mask, scaling, dropout=0.0, cls_rows=None, mean_keys=None, **kwargs
):
    """SDPA; where the caller passes a list as `cls_rows`, it also gets the head-mean [CLS] row [T, patches], and where
    it passes one as `mean_keys`, the head-mean keys [T, 1 + patches, d]."""
    if cls_rows is not None:
        scores = (query[:, :, :1].float() @ key.float().transpose(-1, -2)) * scaling
        cls_rows.append(scores.softmax(dim=-1)[:, :, 0, 1:].mean(dim=1))
    if mean_keys is not None:
        mean_keys.append(key.float().mean(dim=1))
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, is_causal=False
    )


AttentionInterface.register(_ATTENTION, _sdpa_and_cls_row)


def layers_used(num_hidden_layers: int, select_layer: int) -> int:
    """How many encoder layers run so that the output is hidden_states[select_layer] (0 = the embeddings)."""
    return select_layer if select_layer >= 0 else num_hidden_layers + 1 + select_layer


class CLIPVisionTower(nn.Module):
    """CLIP's vision transformer up to the layer whose features LLaVA uses.

    vision_config: of the whole tower; select_layer: index into its hidden states, as LLaVA's
    `mm_vision_select_layer` and transformers' `vision_feature_layer` count them.
    """

    def __init__(self, vision_config: CLIPVisionConfig, select_layer: int = -2):
        super().__init__()
        used = layers_used(vision_config.num_hidden_layers, select_layer)
        if not 1 <= used <= vision_config.num_hidden_layers:
            raise ValueError(
                f"select_layer is {select_layer}, but the tower has {vision_config.num_hidden_layers} layers"
            )
        config = copy.deepcopy(vision_config)
        config.num_hidden_layers = used
        config._attn_implementation = _ATTENTION
        self.vision_tower = CLIPVisionModel(config)
        # Only CLIP's pooled output passes through it, and nobody reads that here.
        self.vision_tower.post_layernorm = nn.Identity()
        self._store: weakref.ref[Store] | None = None
        self._pool = None

    def capture_with(self, store: Store, pool=None) -> None:
        """From now on the tower is captured as a CUDA graph for every number of tiles that comes again, and kept in `store`:
        at a few tiles a GPU waits for Python between its kernels."""
        self._store, self._pool = weakref.ref(store), pool  # the store is the engine's, and goes with it

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
        """[T, 3, H, W] -> patch features [T, P, width], head-mean [CLS]->patch attention [T, P] in float32, and the
        `wanted` states of the same layer.

        A row of the attention sums to one minus what [CLS] pays to itself.
        wanted: "hidden" [T, 1 + P, width], the features with [CLS] first; "keys" [T, 1 + P, d], what k_proj gives, mean
        over heads, in float32
        """
        pixels = pixel_values.to(self.device, self.dtype)
        store = None if self._store is None else self._store()
        if store is None or len(pixels) > CAPTURED_TILES or torch.is_grad_enabled() or not self._unwatched():
            return self._run(pixels, wanted)
        shape = "tower", len(pixels), wanted
        kept = store.get(shape)
        if kept is None:
            kept = StaticTower(self._run, pixels, wanted, self._pool)
            store.put(shape, kept)
        return kept(pixels)

    def _unwatched(self) -> bool:
        """Whether nobody listens to a call of any part of the tower: a replayed graph would not call them."""
        return not any(part._forward_hooks or part._forward_pre_hooks for part in self.vision_tower.modules())

    def _run(self, pixels: Tensor, wanted: tuple[str, ...]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        tower = self.vision_tower
        hidden = tower.pre_layrnorm(tower.embeddings(pixels))
        *layers, last = tower.encoder.layers
        for layer in layers:
            hidden = layer(hidden, attention_mask=None)
        cls_rows: list[Tensor] = []
        mean_keys: list[Tensor] | None = [] if "keys" in wanted else None
        hidden = last(hidden, attention_mask=None, cls_rows=cls_rows, mean_keys=mean_keys)
        states = {"hidden": hidden} if "hidden" in wanted else {}
        if mean_keys:
            states["keys"] = mean_keys[0]
        return hidden[:, 1:], cls_rows[0], states


class StaticTower:
    """The tower for one number of tiles in buffers that stay. The first call runs plainly (it sets up libraries, which must
    not happen under capture), the second captures, and from there on the graph is replayed."""

    busy = False

    def __init__(self, run, pixels: Tensor, wanted: tuple[str, ...], pool=None):
        self._run, self._wanted, self._pool = run, wanted, pool
        self._pixels = torch.empty_like(pixels)
        self._calls, self._captures = 0, True
        self._graph: torch.cuda.CUDAGraph | None = None
        self._found: tuple[Tensor, Tensor, dict[str, Tensor]] | None = None

    @property
    def nbytes(self) -> int:
        held = [self._pixels]
        if self._found is not None:
            held += [*self._found[:2], *self._found[2].values()]
        return sum(tensor.nbytes for tensor in held)

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """As CLIPVisionTower.forward; what it returns is the caller's own, not the buffers."""
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
