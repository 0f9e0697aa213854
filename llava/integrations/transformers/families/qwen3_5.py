"""Qwen3.5, dense and MoE: the tower of Qwen3-VL without DeepStack, and an LLM with linear attention in most layers.

A linear-attention layer passes every token through its recurrent state, masked ones too. Dropping a token is therefore
not the same as masking it. It is the same as the model's own forward() on the shorter prompt with the old positions.
"""

from __future__ import annotations

from transformers import Qwen3_5ForConditionalGeneration, Qwen3_5MoeForConditionalGeneration

from llava.integrations.transformers.families.qwen2_vl import Qwen2VL


class Qwen35(Qwen2VL):
    """Same inputs and positions as Qwen2-VL."""

    name = "Qwen3.5"
    model_classes = (Qwen3_5ForConditionalGeneration, Qwen3_5MoeForConditionalGeneration)
    inside_llm = ()  # a linear-attention layer has no attention to rank tokens by
