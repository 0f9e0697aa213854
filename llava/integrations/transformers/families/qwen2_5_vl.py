"""Qwen2.5-VL: as Qwen2-VL, with a tower that attends inside windows in most blocks (arXiv 2502.13923)."""

from __future__ import annotations

from transformers import Qwen2_5_VLForConditionalGeneration

from llava.integrations.transformers.families.qwen2_vl import Qwen2VL


class Qwen25VL(Qwen2VL):
    """QwenSaliency reads the last block without windows."""

    name = "Qwen2.5-VL"
    model_classes = (Qwen2_5_VLForConditionalGeneration,)
