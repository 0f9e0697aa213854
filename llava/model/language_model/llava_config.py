"""Configuration of a LLaVA: the fields beside those of its LLM, with one set of names for both checkpoint formats.

The `mm_*` names are LLaVA's, with three exceptions that are ours. `mm_checkpoint_format` says which code to follow
where LLaVA and transformers differ. `mm_tile_size` is the side of a tile in pixels. `mm_anyres` is the option `anyres`.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import CLIPVisionConfig, LlamaConfig, MistralConfig


@dataclass
class _LlavaFields:
    """Fields of the vision side, with the values for checkpoints that do not name them."""

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
        """Configuration of the whole vision tower."""
        return CLIPVisionConfig(**self.mm_vision_config)

    @property
    def mm_tile_size(self) -> int:
        """Side of a tile in pixels: the input side of the vision tower."""
        return self.mm_vision_config["image_size"]


class LlavaLlamaConfig(_LlavaFields, LlamaConfig):
    """Configuration of a LLaVA with an LLM of Llama's architecture (Vicuna, Yi)."""

    model_type = "llava_llama"


class LlavaMistralConfig(_LlavaFields, MistralConfig):
    """Configuration of a LLaVA with a Mistral LLM."""

    model_type = "llava_mistral"
