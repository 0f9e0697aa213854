"""Our model on the modules of a transformers LLaVA in memory. No weight is copied, and that model is not changed.

Modules that hold weights are the model's own, in their present state (with adapters, if there are any). The code that
calls them is ours: the tower up to the layer that is used, attention that shows its rows, and the decoder loop.
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
    """Our model, in evaluation mode, on the weights of `model`.

    model: a LlavaForConditionalGeneration or a LlavaNextForConditionalGeneration.
    UserError for weights that are offloaded or on several devices, and for an architecture that load_pretrained_model
    refuses. Quantised modules are taken as they are.
    """
    # 1. Check the model. Hooks of accelerate would be lost, because our code calls the parts of a layer.
    name = Path(model.config._name_or_path or type(model).__name__)
    devices = sorted({str(weight.device) for weight in model.parameters()})
    if len(devices) > 1 or devices == ["meta"]:
        raise UserError(
            f"{name}: its weights lie on {' and '.join(devices)}, allowed under compress() is one device with all of them "
            "(meta: offloaded); load_pretrained_model divides a model over several"
        )
    # 2. Build our model on the meta device: its own weights would take as much memory again.
    config.check_method_options()
    ours = Checkpoint(name, None, model.config.to_dict(), "full", hf=True).model_config()
    check_config(config, ours)
    with torch.device("meta"):
        twin = MODEL_CLASSES[ours.model_type](ours).eval()
    # 3. Put the model's modules into it.
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
    """Replace parent.name by `theirs` if it holds tensors itself; otherwise do the same with each of its parts.

    Modules without tensors stay ours, because they have our code, for example attention that returns rows.
    """
    ours = getattr(parent, name)
    if ours._parameters or ours._buffers:
        setattr(parent, name, theirs)
    else:
        for part, _ in ours.named_children():
            _take(ours, part, getattr(theirs, part))
