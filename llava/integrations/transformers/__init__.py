"""`compress`: plain transformers models generate with fewer vision tokens inside a with-block.

    from llava.integrations.transformers import compress
    with compress(model, method="adav", overall_tokens=144) as compression:
        output = model.generate(**processor(images=image, text=prompt, return_tensors="pt"), max_new_tokens=64)
    compression.last_selection        # what was kept, per image

The model keeps its weights, its class and its processor. Other models of the process are not changed.
"""

from __future__ import annotations

import os
from importlib import import_module

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.integrations.transformers.base import Compression

# model_type of a model's configuration -> where its family is. They are strings, so that only the file that is needed
# is imported. A family is a class in families/, except for LLaVA's own models, which run on this repository's model.
FAMILIES = {
    "llava": "own_model:OwnModel",
    "llava_next": "own_model:OwnModel",
    "qwen2_vl": "families.qwen2_vl:Qwen2VL",
    "qwen2_5_vl": "families.qwen2_5_vl:Qwen25VL",
    "qwen3_vl": "families.qwen3_vl:Qwen3VL",
    "qwen3_vl_moe": "families.qwen3_vl:Qwen3VL",
    "qwen3_5": "families.qwen3_5:Qwen35",
    "qwen3_5_moe": "families.qwen3_5:Qwen35",
    "internvl": "families.internvl:InternVL",
    "llava_onevision": "families.llava_onevision:LlavaOnevision",
}


def compress(
    model, config: AdaVConfig | str | os.PathLike | None = None, *, processor=None, **overrides
) -> Compression:
    """A context manager in which `model`, a transformers model in memory, generates with fewer vision tokens.

    model: a model whose config.model_type is a key of FAMILIES, alone or in the wrapper of torch.compile or PEFT.
    config: an AdaVConfig, or a configuration file as AdaVConfig.load takes it. overrides: keys that override it.
    processor: the model's processor or tokenizer, for settings that need words and not token ids (text_scope "turn",
        text_tower).
    Raises UserError, here or when the block is entered, for a model or a configuration that cannot be used.
    """
    given = isinstance(config, AdaVConfig)
    # With None, AdaVConfig.load reads $ADAV_CONFIG or the repository's file, as the commands do.
    config = config.replaced(**overrides) if given else AdaVConfig.load(config, **overrides)
    model = _unwrapped(model)
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in FAMILIES:
        raise UserError(
            f'compress() got a {type(model).__name__} of model_type "{kind}", allowed are transformers models of '
            f"model_type {', '.join(FAMILIES)}"
        )
    file, name = FAMILIES[kind].split(":")
    found = getattr(import_module(f"{__name__}.{file}"), name)
    if issubclass(found, Compression):
        return found(model, config, processor)
    return import_module(f"{__name__}.compression").FamilyCompression(found, model, config, processor)


def _unwrapped(model):
    """The transformers model inside the wrappers of torch.compile and PEFT. They call its generate() and forward()."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model
