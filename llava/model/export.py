"""Writes a model as a checkpoint that needs no other folder, in either format that `load_pretrained_model` reads.

"llava": names and config.json of liuhaotian/llava-*, the vision tower inside. "llava-hf": transformers' own, for
LlavaForConditionalGeneration and LlavaNextForConditionalGeneration.

    python -m llava.model.export CHECKPOINT FOLDER --layout llava-hf
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaNextConfig, MistralConfig

from llava.common.command_line import Parser
from llava.common.errors import UserError, exits_cleanly
from llava.common.progress import writing_bar
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.mm_utils import grid_pinpoints

LAYOUTS = ("llava", "llava-hf")
_TOWER = "model.vision_tower.vision_tower."
# Names in our model -> names in the files. LLaVA's have "vision_model." in addition, which transformers 5 removed.
_LLAVA_NAMES = {re.escape(_TOWER): _TOWER + "vision_model."}
_HF_NAMES = {
    re.escape(_TOWER): "vision_tower.vision_model.",
    r"model\.mm_projector\.0\.": "multi_modal_projector.linear_1.",
    r"model\.mm_projector\.2\.": "multi_modal_projector.linear_2.",
    r"model\.image_newline$": "image_newline",
    r"model\.": "language_model.model.",
    r"lm_head\.": "language_model.lm_head.",
}


def save_checkpoint(model, tokenizer, image_processor, folder, layout: str = "llava") -> None:
    """Write weights, config.json, tokenizer and image processor into `folder`.

    UserError for an unknown layout, and for a model that `layout` cannot represent.
    """
    if layout not in LAYOUTS:
        raise UserError(f'layout is "{layout}", allowed are {", ".join(LAYOUTS)}')
    folder = Path(folder)
    if layout == "llava":
        write_llava(model.state_dict(), model.config, folder)
        save_processors(tokenizer, image_processor, folder)
    else:
        _write_llava_hf(model, tokenizer, image_processor, folder)


# --- LLaVA's format -----------------------------------------------------------------------------------------------


def write_llava(state: dict[str, Tensor], config, folder: Path) -> None:
    """Write weights `state`, under the names of our model, and config.json in LLaVA's format."""
    _write_weights(_renamed(state, _LLAVA_NAMES), config, folder)
    write_json(folder / "config.json", llava_settings(config, whole=True))


def llava_settings(config, whole: bool) -> dict:
    """Return config.json in LLaVA's format.

    whole: the checkpoint contains the tower. A tower folder inside the checkpoint that was loaded is then not named,
        because the copy does not have it.
    """
    values = config.to_dict()
    values.pop("mm_anyres", None)  # a setting of the run
    values["architectures"] = ["LlavaMistralForCausalLM" if "mistral" in config.model_type else "LlavaLlamaForCausalLM"]
    values["use_cache"] = True  # training switches it off
    tower = values.get("mm_vision_tower")
    if whole and tower and "/" not in tower:
        values.pop("mm_vision_tower")
    return values


def save_processors(tokenizer, image_processor, folder: Path) -> None:
    """Write tokenizer and image processor, where they are not None."""
    for part in (tokenizer, image_processor):
        if part is not None:
            part.save_pretrained(folder)


# --- transformers' format -----------------------------------------------------------------------------------------


def _write_llava_hf(model, tokenizer, image_processor, folder: Path) -> None:
    """Write a checkpoint in transformers' format. UserError for a model that the format cannot represent."""
    # 1. Checks, before any file is written.
    config = model.config
    anyres = config.image_aspect_ratio == "anyres"
    if config.mm_projector_type != "mlp2x_gelu":
        raise UserError(
            f'mm_projector_type is "{config.mm_projector_type}", but a checkpoint in transformers\' format can only hold '
            '"mlp2x_gelu"'
        )
    if anyres and config.mm_patch_merge_type != "spatial_unpad":
        raise UserError(
            f'mm_patch_merge_type is "{config.mm_patch_merge_type}", but transformers\' LlavaNext always does '
            '"spatial_unpad"'
        )
    if tokenizer is None or image_processor is None:
        raise UserError("the checkpoint has no tokenizer or no image processor, and transformers' format needs both")
    # 2. The tokenizer gets an <image> token and a pad token: transformers' processor needs both.
    folder.mkdir(parents=True, exist_ok=True)
    state = dict(model.state_dict())
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.unk_token:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    if DEFAULT_IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [DEFAULT_IMAGE_TOKEN]})
    elif DEFAULT_IMAGE_TOKEN not in tokenizer.get_added_vocab():
        raise UserError("the tokenizer has <image> as a plain word; transformers' format needs it as a special token")
    # 3. Weights: rows for the added tokens, and a norm that transformers' tower has in addition.
    rows = max(len(tokenizer), config.vocab_size)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in state:
            state[name] = _with_rows(state[name], rows)
    settings = _hf_config(config, tokenizer, rows)
    width = settings.vision_config.hidden_size
    state[_TOWER + "post_layernorm.weight"] = torch.ones(width)  # only CLIP's pooled output passes through it
    state[_TOWER + "post_layernorm.bias"] = torch.zeros(width)
    # 4. The files.
    _write_weights(_renamed(state, _HF_NAMES), config, folder)
    settings.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _write_hf_processor(config, image_processor, settings, folder)


def _with_rows(weight: Tensor, rows: int) -> Tensor:
    """Return `weight` with rows for added tokens: the mean of the others, so an added token is never the argmax."""
    added = weight.float().mean(dim=0, keepdim=True).to(weight.dtype).expand(rows - weight.shape[0], -1)
    return torch.cat([weight, added])


def _hf_config(config, tokenizer, rows: int):
    """Return the configuration in transformers' format."""
    # 1. The LLM.
    text_class = MistralConfig if "mistral" in config.model_type else LlamaConfig
    known = text_class().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
    text = text_class(
        **{name: value for name, value in config.to_dict().items() if name in known} | {"vocab_size": rows}
    )
    text.use_cache = True
    # 2. The vision tower. Like ours it ends at the layer whose output is used, so that layer is -1 in this format.
    vision = CLIPVisionConfig(**config.mm_vision_config)
    layer = config.mm_vision_select_layer
    vision.num_hidden_layers = layer if layer >= 0 else vision.num_hidden_layers + 1 + layer
    # 3. The whole model.
    common = {
        "text_config": text.to_dict(),
        "vision_config": vision.to_dict(),
        "image_token_index": tokenizer.convert_tokens_to_ids(DEFAULT_IMAGE_TOKEN),
        "pad_token_id": tokenizer.pad_token_id,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": config.mm_projector_act,
        "multimodal_projector_bias": config.mm_projector_bias,
        "tie_word_embeddings": config.tie_word_embeddings,
        "image_seq_length": (vision.image_size // vision.patch_size) ** 2,
    }
    if config.image_aspect_ratio == "anyres":
        # LLaVA has (width, height), transformers (height, width). The order of the list stays: it decides ties.
        settings = LlavaNextConfig(**common, image_grid_pinpoints=[[h, w] for w, h in grid_pinpoints(config)])
        settings.architectures = ["LlavaNextForConditionalGeneration"]
    else:
        settings = LlavaConfig(**common)
        settings.architectures = ["LlavaForConditionalGeneration"]
    settings.dtype = config.dtype
    return settings


def _write_hf_processor(config, image_processor, settings, folder: Path) -> None:
    """Write the two files of transformers' image processor and processor."""
    # Names with an underscore are internal to the processor class that was loaded.
    values = image_processor.to_dict()
    values = {name: value for name, value in values.items() if not name.startswith("_")}
    kind = "Llava"
    if config.image_aspect_ratio == "anyres":
        kind = "LlavaNext"
        values |= {"image_grid_pinpoints": settings.image_grid_pinpoints, "do_pad": True}
    elif config.image_aspect_ratio == "pad":
        values |= {"do_pad": True}
    write_json(folder / "preprocessor_config.json", values | {"image_processor_type": f"{kind}ImageProcessor"})
    processor = {
        "processor_class": f"{kind}Processor",
        "image_token": DEFAULT_IMAGE_TOKEN,
        "patch_size": settings.vision_config.patch_size,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,  # [CLS], which "default" drops again
    }
    write_json(folder / "processor_config.json", processor)


# --- files --------------------------------------------------------------------------------------------------------


def _renamed(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Return `state` with renamed weights; the first pattern of `names` that matches counts, so order matters."""
    renamed = {}
    for name, value in state.items():
        for ours, theirs in names.items():
            if re.match(ours, name):
                name = re.sub("^" + ours, theirs, name)
                break
        renamed[name] = value
    return renamed


def _write_weights(state: dict[str, Tensor], config, folder: Path) -> None:
    """Write the weights as safetensors shards."""
    # A tied head is the embedding itself, so it is not written a second time.
    if config.tie_word_embeddings:
        state = {name: value for name, value in state.items() if not name.endswith("lm_head.weight")}
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: _alone(value) for name, value in state.items()}
    with writing_bar(f"writing {folder.name}", folder, sum(value.nbytes for value in state.values())):
        save_torch_state_dict(state, folder)


def _alone(value: Tensor) -> Tensor:
    """Return the tensor on the CPU with storage of its own."""
    # ZeRO-3 and merge_projections make weights views of one buffer, and safetensors refuses shared storage.
    value = value.detach().cpu().contiguous()
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


def write_json(path: Path, content: dict) -> None:
    """Write `content` as an indented JSON file."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_and_save(checkpoint: str, base: str | None, folder: str, layout: str, dtype: str) -> None:
    """Load a checkpoint of any kind (with `base`, where it needs one) and write a complete copy into `folder`."""
    from llava.model.builder import load_pretrained_model

    tokenizer, model, image_processor, _ = load_pretrained_model(checkpoint, base, device_map="cpu", torch_dtype=dtype)
    save_checkpoint(model, tokenizer, image_processor, folder, layout)


def argument_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options of every command that calls `load_and_save`."""
    parser = Parser(description=description)
    parser.add_argument("--model-base", help="the model under a LoRA or projector-only checkpoint")
    parser.add_argument("--layout", default="llava", choices=LAYOUTS, help="default: llava")
    parser.add_argument("--dtype", default="float16", help="of the written weights (default float16)")
    return parser


@exits_cleanly
def main() -> None:
    """Run the command `python -m llava.model.export`."""
    parser = argument_parser(__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="folder or hub name")
    parser.add_argument("folder", help="where the copy goes")
    args = parser.parse_args()
    load_and_save(args.checkpoint, args.model_base, args.folder, args.layout, args.dtype)
    print(f"checkpoint written to {args.folder}")


if __name__ == "__main__":
    main()
