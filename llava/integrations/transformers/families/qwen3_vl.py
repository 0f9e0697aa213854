"""Qwen3-VL, dense and MoE: as Qwen2-VL, with DeepStack features (arXiv 2511.21631).

DeepStack (arXiv 2406.04334) takes features of several tower blocks and adds them to the hidden states of vision tokens
behind the first LLM layers. A dropped token loses its rows there too.
"""

from __future__ import annotations

from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration

from llava.integrations.transformers.families.qwen2_vl import Qwen2VL


class Qwen3VL(Qwen2VL):
    """The DeepStack features are states beside the vision tokens."""

    name = "Qwen3-VL"
    model_classes = (Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration)

    def beside(self, output) -> list[list[Tensor]]:
        # transformers lists them by tower block and then by image.
        return [list(layers) for layers in zip(*output.deepstack_features, strict=True)]

    def llm_arguments(self, is_image: Tensor, beside: list[Tensor]) -> dict:
        return {"visual_pos_masks": is_image, "deepstack_visual_embeds": [states[is_image] for states in beside]}
