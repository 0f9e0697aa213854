"""transformers' own LLaVA class with the weights of a checkpoint. `self_check` compares our model with it.

transformers itself loads a `llava-hf` checkpoint. For an original checkpoint the class is built here, and its weights
are read from the files without our loader, so that an error of our loader shows. Only weights that are not on disk (a
LoRA merged into its base) come from the model that our loader made.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
)

from llava.common.errors import UserError
from llava.common.hub import quiet_loading
from llava.model.checkpoint import Checkpoint
from llava.model.weight_names import WRAPPER

CLASSES = {"llava": LlavaForConditionalGeneration, "llava_next": LlavaNextForConditionalGeneration}

# Prefixes of LLaVA's weight names -> prefixes of transformers' names. The first match counts, so "model." comes late.
_NAMES = (
    (r"model\.vision_tower\.vision_tower\.(?:vision_model\.)?", "model.vision_tower."),
    (r"model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"model\.image_newline$", "model.image_newline"),
    (r"model\.", "model.language_model."),
    (r"lm_head\.", "lm_head."),
)
# Buffers that old checkpoints contain. transformers computes them and has no place for them in its state dict.
_BUFFERS = re.compile(r"rotary_emb\.inv_freq$|position_ids$")


def kind_of(config) -> str:
    """Key of CLASSES ("llava" or "llava_next") whose class computes the same as a checkpoint with our `config`.

    UserError if no class of transformers does.
    """
    anyres, merge = config.image_aspect_ratio == "anyres", config.mm_patch_merge_type
    if config.mm_projector_type != "mlp2x_gelu" or (anyres, merge) not in ((True, "spatial_unpad"), (False, "flat")):
        raise UserError(
            f"transformers has no class for projector {config.mm_projector_type}, image_aspect_ratio "
            f"{config.image_aspect_ratio} and mm_patch_merge_type {merge}, so there is nothing to compare with"
        )
    return "llava_next" if anyres else "llava"


def build_reference(source: Checkpoint, config, merged: dict[str, Tensor] | None, dtype: torch.dtype, device_map):
    """transformers' model for the checkpoint `source`, in evaluation mode.

    config: configuration of our model. merged: weights of our model, for a source that is no full checkpoint.
    Raises UserError for missing weights.
    """
    # 1. transformers' own format.
    if source.hf:
        with quiet_loading():
            loaded = CLASSES[source.settings["model_type"]].from_pretrained(
                source.folder, dtype=dtype, device_map=device_map, attn_implementation="sdpa"
            )
        return loaded.eval()
    # 2. Weights of the original format under transformers' names.
    kind = kind_of(config)
    weights = merged if source.kind != "full" else _read_weights(source.folder)
    weights = {_rename(name): value.to(dtype) for name, value in weights.items() if not _BUFFERS.search(name)}
    # LLaVA's checkpoints often have no tower: it is a CLIP checkpoint of its own.
    if not any(name.startswith("model.vision_tower.") for name in weights):
        tower, _ = source.tower.weights()
        weights |= {"model.vision_tower." + name: value.to(dtype) for name, value in tower.items()}
    settings = source.settings | {"tie_word_embeddings": config.tie_word_embeddings}
    reference = _empty(settings, kind, config, weights)
    reference.load_state_dict(weights, strict=False, assign=True)
    reference.tie_weights()
    # strict=False allows names that the class does not have, so missing weights are found here.
    empty = [name for name, value in reference.named_parameters() if value.is_meta]
    if empty:
        raise UserError(f"{source.folder}: {len(empty)} weights are missing, among them {empty[0]}")
    if isinstance(device_map, str) and device_map not in ("auto", "cpu"):
        reference.to(device_map)
    elif device_map == "auto" and torch.cuda.is_available():
        reference.to("cuda")
    return reference.eval()


def share_weights(model):
    """transformers' model on the tensors of our `model`, in evaluation mode. No weight is copied.

    It serves to measure both models side by side. Its tower has all layers, because transformers runs all of them. Our
    tower ends at the layer whose features are used. The layers above do not change the output, so they share the
    weights of our last layer.
    """
    weights = {_rename(name): value for name, value in model.state_dict().items() if not _BUFFERS.search(name)}
    ours = model.get_vision_tower().config.num_hidden_layers
    for layer in range(ours, model.config.vision.num_hidden_layers):
        prefix, last = (f"model.vision_tower.encoder.layers.{number}." for number in (layer, ours - 1))
        weights |= {prefix + name.removeprefix(last): weights[name] for name in list(weights) if name.startswith(last)}
    reference = _empty(model.config.to_dict(), kind_of(model.config), model.config, weights)
    reference.load_state_dict(weights, strict=True, assign=True)
    return reference.to(model.device).eval()


def _empty(settings: dict, kind: str, config, weights: dict[str, Tensor]):
    """transformers' model without weights: parameters are on the meta device, buffers are computed.

    settings: config.json of the LLM. weights: under transformers' names; missing norms of the tower are added to it.
    """
    # 1. Configuration of the LLM. Keys of LLaVA and keys that name another class must not reach from_dict.
    text_class = MistralConfig if settings["model_type"] == "llava_mistral" else LlamaConfig
    skipped = ("model_type", "architectures", "torch_dtype", "dtype", "transformers_version")
    settings = {k: v for k, v in settings.items() if not k.startswith("mm_") and k not in skipped}
    text = text_class.from_dict(settings)
    # The file may state another size: tokens can be added to the embedding without an update of config.json.
    text.vocab_size = weights["model.language_model.embed_tokens.weight"].shape[0]
    # 2. Configuration of the tower: as many layers as there are weights for.
    vision = dict(config.mm_vision_config)
    layers = [int(m[1]) for m in (re.match(r"model\.vision_tower\.encoder\.layers\.(\d+)\.", k) for k in weights) if m]
    feature_layer = config.mm_vision_select_layer
    if max(layers) + 1 < vision["num_hidden_layers"]:
        # Our model keeps the tower only up to the layer whose features are used, so the features are its last output.
        vision["num_hidden_layers"], feature_layer = max(layers) + 1, -1
    for name in ("weight", "bias"):
        like = weights["model.vision_tower.pre_layrnorm.weight"]
        weights.setdefault(f"model.vision_tower.post_layernorm.{name}", torch.zeros_like(like))
    # 3. Both together.
    common = {"vision_config": vision, "text_config": text.to_dict(), "vision_feature_layer": feature_layer}
    common["tie_word_embeddings"] = text.tie_word_embeddings
    if kind == "llava_next":
        # transformers lists canvas sizes as (height, width), LLaVA as (width, height).
        full = LlavaNextConfig(**common, image_grid_pinpoints=[[h, w] for w, h in config.image_grid_pinpoints])
    else:
        full = LlavaConfig(**common)
    # Buffers are in no file, so they must be computed: on the meta device the rotary frequencies would have no values.
    with init_empty_weights(include_buffers=False):
        return CLASSES[kind](full)


def _rename(name: str) -> str:
    name = re.sub(WRAPPER, "", name)
    for pattern, replacement in _NAMES:
        match = re.match(pattern, name)
        if match:
            return replacement + name[match.end() :]
    raise UserError(f'the checkpoint has a weight "{name}", which no LLaVA has')


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a checkpoint folder by name, from safetensors files if there are any, else from .bin files."""
    files = sorted(folder.glob("model*.safetensors"))
    tensors: dict[str, Tensor] = {}
    for file in files or sorted(folder.glob("pytorch_model*.bin")):
        # weights_only: a pickle from the hub could otherwise run code.
        read = load_file(file) if files else torch.load(file, map_location="cpu", weights_only=True)
        tensors.update(read)
    return tensors
