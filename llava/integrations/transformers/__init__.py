"""Fewer vision tokens in plain transformers models: `compress` redirects one model's generate() while a with-block lasts.

    from llava.integrations.transformers import compress
    with compress(model, method="adav", overall_tokens=144) as compression:
        output = model.generate(**processor(images=image, text=prompt, return_tensors="pt"), max_new_tokens=64)
    compression.last_selection        # what was kept, per image

The model keeps its weights, its class and its processor; other models of the process are not touched.
"""

from __future__ import annotations

import os
from importlib import import_module

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.integrations.transformers.base import Compression

# model_type of a model's configuration -> "file:class" of what compresses it.
FAMILIES = {
    "llava": "llava:LlavaCompression",
    "llava_next": "llava:LlavaCompression",
    "qwen2_5_vl": "qwen2_5_vl:QwenCompression",
}


def compress(
    model, config: AdaVConfig | str | os.PathLike | None = None, *, processor=None, **overrides
) -> Compression:
    """A context in which `model`, a transformers model in memory, generates with fewer vision tokens.

    model: of a class that FAMILIES knows by its config.model_type.
    config: an AdaVConfig, or a configuration file as AdaVConfig.load takes it; `overrides` are its keys and override it.
    processor: the model's processor or tokenizer, for settings that need words rather than tokens (text_scope "turn",
        text_tower).
    Raises UserError, here or on entering the block, for what cannot be compressed or configured.
    """
    given = isinstance(config, AdaVConfig)
    config = config.replaced(**overrides) if given else AdaVConfig.load(config, **overrides)
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in FAMILIES:
        raise UserError(
            f'compress() got a {type(model).__name__} of model_type "{kind}", allowed are transformers models of '
            f"model_type {', '.join(FAMILIES)}"
        )
    file, name = FAMILIES[kind].split(":")
    return getattr(import_module(f"{__name__}.{file}"), name)(model, config, processor)
