"""Names of weights in checkpoint files -> names in our model. LLaVA's names are ours, but for the level "vision_model",
which transformers 5 removed."""

from __future__ import annotations

import re

# DistributedDataParallel and DeepSpeed put this before every name of a model that was saved without being unwrapped.
WRAPPER = r"^(?:module\.)+"
ORIGINAL_KEYS = {WRAPPER: "", r"vision_tower\.vision_tower\.vision_model\.": r"vision_tower.vision_tower."}
# transformers has written its LLaVA models in two layouts, with and without a leading "model.".
HF_KEYS = {
    WRAPPER: "",
    r"^(?:model\.)?language_model\.model\.": r"model.",
    r"^language_model\.lm_head\.": r"lm_head.",
    r"^model\.language_model\.": r"model.",
    r"^(?:model\.)?vision_tower\.(?:vision_model\.)?": r"model.vision_tower.vision_tower.",
    r"^(?:model\.)?multi_modal_projector\.linear_1\.": r"model.mm_projector.0.",
    r"^(?:model\.)?multi_modal_projector\.linear_2\.": r"model.mm_projector.2.",
    r"^(?:model\.)?image_newline$": r"model.image_newline",
}
# peft's level around a model, and that of a wrapper inside or outside it.
_LEVELS = r"^(?:module\.|base_model\.|model\.(?=model\.|module\.|base_model\.|lm_head\.))+"


def original_name(name: str) -> str:
    """The name in our model of a weight in a whole checkpoint of LLaVA's format."""
    for theirs, ours in ORIGINAL_KEYS.items():
        name = re.sub(theirs, ours, name)
    return name


def trained_name(name: str) -> str:
    """The name in our model of a weight that LLaVA's training or peft saved beside a model_base."""
    name = original_name(re.sub(_LEVELS, "", name))
    return name if name.startswith(("model.", "lm_head.")) else "model." + name
