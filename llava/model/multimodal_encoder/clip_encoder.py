"""The CLIP vision tower: patch features and the [CLS] row of one layer, in one SDPA pass.

LLaVA reads the features of an inner layer (`mm_vision_select_layer`, -2), so the tower ends there: later layers are
neither built nor run. The [CLS] query's attention in that last layer is what saliency-based selection ranks patches
by. It is one row, so it is computed from the query and keys at hand, and the attention itself stays SDPA. What only some
methods read (the states with [CLS], the keys) comes out of the same pass where it is asked for.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

_ATTENTION = "llava_sdpa_cls_row"


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
        tower = self.vision_tower
        hidden = tower.pre_layrnorm(tower.embeddings(pixel_values.to(self.device, self.dtype)))
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
