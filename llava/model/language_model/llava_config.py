"""What a LLaVA checkpoint's configuration says beside its LLM's: one set of names for both checkpoint formats.

The `mm_*` names are LLaVA's own. `mm_checkpoint_format`, `mm_tile_size` and `mm_anyres` are ours: which original
to follow where the two differ (design decision 9), the side of a tile in pixels, and the tile path.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import CLIPVisionConfig, LlamaConfig, MistralConfig


@dataclass
class _LlavaFields:
    mm_vision_config: dict | None = None
    mm_vision_select_layer: int = -2
    mm_vision_select_feature: str = "patch"
    mm_hidden_size: int | None = None
    mm_projector_type: str = "linear"
    mm_projector_act: str = "gelu"
    mm_projector_bias: bool = True
    mm_patch_merge_type: str = "flat"
    mm_checkpoint_format: str = "llava"
    mm_anyres: str = "official"
    image_aspect_ratio: str | None = None
    image_grid_pinpoints: list | str | None = None

    @property
    def vision(self) -> CLIPVisionConfig:
        """The tower's configuration."""
        return CLIPVisionConfig(**self.mm_vision_config)

    @property
    def mm_tile_size(self) -> int:
        """Side of a tile in pixels: the input side of the vision tower."""
        return self.mm_vision_config["image_size"]


class LlavaLlamaConfig(_LlavaFields, LlamaConfig):
    """A LLaVA with a Llama-shaped LLM (Vicuna, Yi)."""

    model_type = "llava_llama"


class LlavaMistralConfig(_LlavaFields, MistralConfig):
    """A LLaVA with a Mistral LLM."""

    model_type = "llava_mistral"
