"""Our model on the very modules of a transformers LLaVA in memory: nothing is copied, and nothing of it is changed.

What holds weights is the model's own, whatever it is by now (adapters included). What is ours is what calls them: the tower
up to the layer that is used, attention that shows its rows, the decoder loop.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.model.builder import MODEL_CLASSES, check_config
from llava.model.checkpoint import Checkpoint


def on_weights_of(model, config: AdaVConfig):
    """Our model, in evaluation mode, on the weights of a LlavaForConditionalGeneration or LlavaNextForConditionalGeneration.

    UserError where its weights are quantised or offloaded, or of an architecture that load_pretrained_model would refuse.
    """
    name = Path(model.config._name_or_path or type(model).__name__)
    if getattr(model, "hf_quantizer", None) is not None:
        raise UserError(f"{name}: its weights are quantised, allowed under compress() are those of a float dtype")
    devices = sorted({str(weight.device) for weight in model.parameters()})
    if len(devices) > 1 or devices == ["meta"]:
        raise UserError(
            f"{name}: its weights lie on {' and '.join(devices)}, allowed under compress() is one device with all of them "
            "(meta: offloaded); load_pretrained_model divides a model over several"
        )
    config.check_method_options()
    ours = Checkpoint(name, None, model.config.to_dict(), "full", hf=True).model_config()
    check_config(config, ours)
    with torch.device("meta"):
        twin = MODEL_CLASSES[ours.model_type](ours).eval()
    decoder, theirs = twin.model, model.model
    for part in ("embed_tokens", "layers", "norm", "rotary_emb"):
        _take(decoder, part, getattr(theirs.language_model, part))
    _take(decoder.vision_tower, "vision_tower", theirs.vision_tower)
    projector = theirs.multi_modal_projector
    decoder.mm_projector = nn.Sequential(projector.linear_1, projector.act, projector.linear_2)
    if hasattr(decoder, "image_newline"):
        decoder.image_newline = theirs.image_newline
    twin.lm_head = model.lm_head
    return twin


def _take(parent: nn.Module, name: str, theirs: nn.Module) -> None:
    """Put `theirs` in the place of parent.name where that holds tensors itself; else go on with its parts."""
    ours = getattr(parent, name)
    if ours._parameters or ours._buffers:
        setattr(parent, name, theirs)
    else:
        for part, _ in ours.named_children():
            _take(ours, part, getattr(theirs, part))
