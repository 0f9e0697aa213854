"""Writes a trained demo model as a checkpoint in LLaVA's original format, and reads it for further training."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from llava.common.errors import UserError
from llava.shapes.tokenizer import MAX_LENGTH, save_tokenizer, vocabulary
from llava.shapes.training.model import CLIP_MEAN, CLIP_STD, DemoModel, llm_config, tower_config

_TOWER = "model.vision_tower.vision_tower.vision_model."


def checkpoint_tensors(model, dtype=torch.float16):
    """State dictionary under the names of LLaVA's own checkpoints, without the tied LM head."""
    # clone: safetensors refuses tensors that share memory. position_ids: a buffer that newer CLIP classes do not save.
    named = {f"model.{k}": v for k, v in model.llm.model.state_dict().items()}
    named |= {_TOWER + k: v for k, v in model.tower.state_dict().items() if not k.endswith("position_ids")}
    named |= {f"model.mm_projector.{k}": v for k, v in model.projector.state_dict().items()}
    named["model.image_newline"] = model.image_newline
    return {k: v.detach().to(dtype).contiguous().clone() for k, v in named.items()}


def write_checkpoint(model, recipe, folder):
    """Write config, weights (float16), tokenizer, vision tower folder and generation config into `folder`."""
    folder = Path(folder)
    tensors = checkpoint_tensors(model)
    if not recipe.pinpoints:
        tensors.pop("model.image_newline")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", llava_config(recipe))
    ids = vocabulary()
    tokens = {"bos_token_id": ids["<s>"], "eos_token_id": ids["</s>"], "pad_token_id": ids["<pad>"]}
    _write_json(folder / "generation_config.json", {**tokens, "do_sample": False})
    tower = folder / "vision_tower"
    tower.mkdir(exist_ok=True)
    vision = tower_config(recipe.sizes).to_diff_dict() | {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
    }
    _write_json(tower / "config.json", vision)
    _write_json(tower / "preprocessor_config.json", preprocessor_config(recipe.sizes))
    save_tokenizer(folder)


def llava_config(recipe):
    """Dictionary for config.json, with the keys of LLaVA's own checkpoints."""
    sizes = recipe.sizes
    llama = llm_config(sizes).to_dict()
    keys = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
        "max_position_embeddings rms_norm_eps tie_word_embeddings attention_bias bos_token_id eos_token_id pad_token_id"
    )
    config = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        **{key: llama[key] for key in keys.split()},
        # Llama's default, as in LLaVA's files. Training starts from another value (llm_config), but nothing reads this.
        "initializer_range": 0.02,
        "rope_theta": sizes.rope_theta,
        "torch_dtype": "float16",
        "use_cache": True,
        "mm_vision_tower": "vision_tower",
        "mm_hidden_size": sizes.width,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "tokenizer_model_max_length": MAX_LENGTH,
        "image_aspect_ratio": "anyres" if recipe.pinpoints else "pad",
        "mm_patch_merge_type": "spatial_unpad" if recipe.pinpoints else "flat",
    }
    if recipe.pinpoints:
        config["image_grid_pinpoints"] = [list(point) for point in recipe.pinpoints]
    return config


def preprocessor_config(sizes):
    """Settings of CLIPImageProcessor for tiles of this size."""
    side = sizes.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,  # bicubic, as in CLIP
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "do_convert_rgb": True,
    }


def load_demo_model(folder, sizes):
    """DemoModel (float32) from a folder that write_checkpoint wrote. UserError if the folder has no weights.

    A newline token that the checkpoint does not have starts from random numbers, as v1.6 does on the weights of v1.5.
    """
    path = Path(folder) / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{folder}: no model.safetensors there; train that checkpoint first")
    tensors = {k: v.float() for k, v in load_file(path).items()}
    model = DemoModel(sizes)
    state = model.state_dict()
    renamed = {"llm.lm_head.weight": tensors["model.embed_tokens.weight"]}
    for name, tensor in tensors.items():
        if name.startswith(_TOWER):
            renamed["tower." + name.removeprefix(_TOWER)] = tensor
        elif name.startswith("model.mm_projector."):
            renamed["projector." + name.removeprefix("model.mm_projector.")] = tensor
        elif name == "model.image_newline":
            renamed["image_newline"] = tensor
        else:
            renamed["llm." + name] = tensor
    # `state` first, for the newline token; strict=True still refuses names that the model does not have.
    model.load_state_dict({**state, **renamed}, strict=True)
    return model


def _write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
