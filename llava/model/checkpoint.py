"""Checkpoint: the files of a checkpoint folder in either format, and the loading of its weights into our model.

`Checkpoint.open` finds the files. `model_config` gives one configuration for both formats. `load` fills the model.
from_pretrained of transformers does the loading (shards, dtypes, device maps); this file maps the names of weights.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModel, LlavaConfig, LlavaNextConfig

from llava.common.errors import UserError, first_line
from llava.common.hub import checkpoint_folder, quiet_loading
from llava.model.language_model.llava_config import LlavaLlamaConfig, LlavaMistralConfig

CONFIG_CLASSES = {"llama": LlavaLlamaConfig, "mistral": LlavaMistralConfig}
HF_CLASSES = {"llava": LlavaConfig, "llava_next": LlavaNextConfig}

# Names in the files -> names in our model: those of LLaVA without "vision_model.", which transformers 5 removed.
ORIGINAL_KEYS = {r"vision_tower\.vision_tower\.vision_model\.": r"vision_tower.vision_tower."}
# transformers has saved its LLaVA models in two layouts, with and without a leading "model.".
HF_KEYS = {
    r"^(?:model\.)?language_model\.model\.": r"model.",
    r"^language_model\.lm_head\.": r"lm_head.",
    r"^model\.language_model\.": r"model.",
    r"^(?:model\.)?vision_tower\.(?:vision_model\.)?": r"model.vision_tower.vision_tower.",
    r"^(?:model\.)?multi_modal_projector\.linear_1\.": r"model.mm_projector.0.",
    r"^(?:model\.)?multi_modal_projector\.linear_2\.": r"model.mm_projector.2.",
    r"^(?:model\.)?image_newline$": r"model.image_newline",
}


@dataclass
class Checkpoint:
    """A checkpoint on disk (`open` downloads hub names).

    folder: the checkpoint; base: folder of its model_base, None where it needs none; settings: its config.json
    kind: "full", "lora" (adapter_config.json), "projector" (mm_projector.bin), or "llm": an LLM at the start of
        training, which has no projector yet
    hf: whether it is in transformers' format
    """

    folder: Path
    base: Path | None
    settings: dict
    kind: str
    hf: bool

    @classmethod
    def open(cls, model_path, model_base=None) -> Checkpoint:
        """Return the checkpoint in a folder or under a hub name. UserError where files are missing or are no LLaVA."""
        folder = checkpoint_folder(model_path)
        settings, hf = cls.read_settings(folder)
        # LoRA first: an adapter folder may have weight files of its own.
        if (folder / "adapter_config.json").is_file():
            kind = "lora"
        elif _weight_files(folder):
            kind = "full"
        elif (folder / "mm_projector.bin").is_file():
            kind = "projector"
        else:
            raise UserError(
                f"{folder}: no weights, allowed are model*.safetensors, pytorch_model*.bin, mm_projector.bin"
            )
        if kind == "full" and model_base is not None:
            raise UserError(f"{folder}: has all its weights, so model_base ({model_base}) must not be given")
        if kind != "full" and model_base is None:
            what = {"lora": "a LoRA adapter", "projector": "only a projector"}[kind]
            raise UserError(f"{folder}: is {what}, so model_base must name the model that it was trained on")
        return cls(folder, checkpoint_folder(model_base) if model_base is not None else None, settings, kind, hf)

    @classmethod
    def of_llm(cls, model_path, **mm_settings) -> Checkpoint:
        """Return an LLM (Vicuna, Llama, Mistral) as the start of a LLaVA: its config.json plus LLaVA's `mm_*` settings.

        UserError for an LLM of another architecture.
        """
        folder = checkpoint_folder(model_path)
        settings = _read_json(folder / "config.json", f"{folder}: no config.json, so this is no checkpoint")
        kind = settings.get("model_type")
        if kind not in CONFIG_CLASSES:
            raise UserError(f'{folder}: model_type is "{kind}", allowed for training are {", ".join(CONFIG_CLASSES)}')
        if not _weight_files(folder):
            raise UserError(f"{folder}: no weights, allowed are model*.safetensors, pytorch_model*.bin")
        return cls(folder, None, settings | {"model_type": f"llava_{kind}"} | mm_settings, "llm", False)

    @staticmethod
    def is_llava(folder: Path) -> bool:
        """Return whether config.json is that of a LLaVA in either format, and not that of a plain LLM."""
        settings = _read_json(folder / "config.json", f"{folder}: no config.json, so this is no checkpoint")
        return settings.get("model_type") not in CONFIG_CLASSES

    @staticmethod
    def read_settings(folder: Path) -> tuple[dict, bool]:
        """Return config.json of a checkpoint folder, and whether it is in transformers' format.

        UserError where it is no LLaVA.
        """
        settings = _read_json(folder / "config.json", f"{folder}: no config.json, so this is no checkpoint")
        hf = settings.get("model_type") in HF_CLASSES and "text_config" in settings
        original = settings.get("model_type") in ("llava", "llava_llama", "llava_mistral") and not hf
        if not hf and not (original and ("mm_vision_tower" in settings or settings.get("mm_vision_config"))):
            raise UserError(
                f"{folder}: architecture {settings.get('architectures') or ['unknown']} (model_type "
                f'"{settings.get("model_type")}") is no LLaVA with a vision tower, allowed are LLaVA 1.5 and 1.6 in the '
                f"format of liuhaotian/llava-* or llava-hf/*"
            )
        return settings, hf

    @property
    def tower_folder(self) -> Path | None:
        """Folder of the vision tower that LLaVA's format names; None where the checkpoint itself has everything."""
        name = self.settings.get("mm_vision_tower")
        if self.hf or not name:
            return None
        inside = self.folder / name
        return inside if inside.is_dir() else checkpoint_folder(name, weights=False)

    def model_config(self):
        """Return the configuration, in one form for both formats. UserError for settings that this code cannot run."""
        try:
            config = self._from_hf() if self.hf else self._from_original()
        except (TypeError, ValueError, KeyError, AttributeError, StrictDataclassError) as error:
            raise UserError(f"{self.folder}: config.json cannot be used ({' '.join(str(error).split())})") from error
        self._refuse(config.mm_vision_select_feature, ("patch",), "mm_vision_select_feature")
        self._refuse(config.mm_patch_merge_type, ("flat", "spatial", "spatial_unpad"), "mm_patch_merge_type")
        self._refuse(config.image_aspect_ratio, (None, "square", "crop", "pad", "anyres"), "image_aspect_ratio")
        if config.image_aspect_ratio == "anyres" and not config.image_grid_pinpoints:
            raise UserError(f"{self.folder}: image_aspect_ratio is anyres, but config.json has no image_grid_pinpoints")
        if config.mm_hidden_size != config.vision.hidden_size:
            raise UserError(
                f"{self.folder}: mm_hidden_size is {config.mm_hidden_size}, allowed is the width of the vision tower "
                f"that config.json names, {config.vision.hidden_size}"
            )
        return config

    def _refuse(self, value, allowed, name: str) -> None:
        """Raise UserError unless the setting `name` has one of the allowed values."""
        if value not in allowed:
            words = ", ".join("null" if a is None else f'"{a}"' for a in allowed)
            raise UserError(f'{self.folder}: {name} is "{value}", allowed are {words}')

    def _from_hf(self):
        """Return our configuration of a checkpoint in transformers' format."""
        # 1. Checks.
        source = HF_CLASSES[self.settings["model_type"]].from_dict(self.settings)
        text, vision = source.text_config, source.vision_config
        if text.model_type not in CONFIG_CLASSES or vision.model_type != "clip_vision_model":
            raise UserError(
                f"{self.folder}: a {text.model_type} LLM with a {vision.model_type} tower, allowed are "
                f"{' or '.join(CONFIG_CLASSES)} with clip_vision_model"
            )
        if not isinstance(source.vision_feature_layer, int):
            raise UserError(
                f"{self.folder}: vision_feature_layer is {source.vision_feature_layer}, allowed is one layer"
            )
        # 2. The settings of the LLM, and transformers' names translated to LLaVA's.
        feature = {"default": "patch", "full": "cls_patch"}.get(source.vision_feature_select_strategy)
        values = {k: v for k, v in text.to_dict().items() if k not in ("architectures", "model_type", "_name_or_path")}
        values.update(
            tie_word_embeddings=source.tie_word_embeddings or text.tie_word_embeddings,
            dtype=source.dtype or text.dtype,
            mm_vision_config=vision.to_dict(),
            mm_vision_select_layer=source.vision_feature_layer,
            mm_vision_select_feature=feature or source.vision_feature_select_strategy,
            mm_hidden_size=vision.hidden_size,
            mm_projector_type="mlp2x_gelu",
            mm_projector_act=source.projector_hidden_act,
            mm_projector_bias=getattr(source, "multimodal_projector_bias", True),
            mm_checkpoint_format="llava_hf",
            image_aspect_ratio="crop",
        )
        # 3. LLaVA-1.6.
        if source.model_type == "llava_next":
            values.update(
                image_aspect_ratio="anyres",
                mm_patch_merge_type="spatial_unpad",
                # transformers has (height, width), LLaVA (width, height). The order of the list stays: it decides ties.
                image_grid_pinpoints=[[w, h] for h, w in source.image_grid_pinpoints],
            )
        # Files of transformers may have the pad token on the outer level only.
        if values.get("pad_token_id") is None:
            values["pad_token_id"] = getattr(source, "pad_token_id", None)
        return CONFIG_CLASSES[text.model_type](**values)

    def _from_original(self):
        """Return our configuration of a checkpoint in LLaVA's format."""
        # model_type and architectures are those of LLaVA's classes. Our configuration class sets its own.
        values = dict(self.settings)
        model_type = values.pop("model_type")
        values.pop("architectures", None)
        if values.get("mm_use_im_start_end"):
            raise UserError(
                f"{self.folder}: mm_use_im_start_end is true, allowed is false (no LLaVA from 1.5 on has it)"
            )
        if not values.get("mm_vision_config"):
            values["mm_vision_config"] = _tower_config(self.tower_folder)
        values.setdefault("mm_hidden_size", values["mm_vision_config"]["hidden_size"])
        return CONFIG_CLASSES["mistral" if model_type == "llava_mistral" else "llama"].from_dict(values)

    # --- weights ----------------------------------------------------------------------------------------------

    def load(self, model_class, config, device_map, dtype):
        """Return the model with all its weights. UserError where weights are missing, damaged or of another shape."""
        # 1. The folder with most of the weights. A broken download is found here, so that the error names its file.
        folder, hf = self.base or self.folder, self.hf
        for file in _weight_files(folder):
            _check_file(file)
        if self.base is not None:
            # The model starts with the vocabulary of the base. It is resized when the checkpoint's own rows are loaded.
            of_base = _read_json(folder / "config.json", f"{folder}: no config.json")
            hf = of_base.get("model_type") in HF_CLASSES and "text_config" in of_base
            vocabulary = of_base["text_config"].get("vocab_size") if hf else of_base.get("vocab_size")
            wanted, config.vocab_size = config.vocab_size, vocabulary or config.vocab_size
        # 2. from_pretrained.
        try:
            with quiet_loading():
                model, info = model_class.from_pretrained(
                    folder,
                    config=config,
                    dtype=dtype,
                    device_map=device_map,
                    key_mapping=HF_KEYS if hf else ORIGINAL_KEYS,
                    output_loading_info=True,
                    weights_only=True,
                    attn_implementation="sdpa",  # the decoder replaces it by its own (layer_loop.py)
                )
        except Exception as error:  # torch, safetensors, pickle and transformers each raise their own
            raise UserError(f"{folder}: the weights cannot be loaded ({first_line(error)})") from error
        if hf:
            # save_pretrained would apply HF_KEYS backwards, though its config.json is in LLaVA's format.
            vars(model).pop("_weight_conversions", None)
        if info["unexpected_keys"]:
            unknown = sorted(info["unexpected_keys"])
            raise UserError(
                f"{folder}: {len(unknown)} weights have no place in the model that config.json describes, among them "
                f"{', '.join(unknown[:3])}"
            )
        # 3. Weights that are elsewhere. Those that no file has are an error: from_pretrained leaves them random.
        missing = set(info["missing_keys"])
        if self.kind == "projector":
            missing -= self._load_extra(model, "mm_projector.bin")
        elif self.kind == "lora":
            if wanted != config.vocab_size:
                if wanted > config.vocab_size:  # only the checkpoint has the added rows
                    missing |= {"model.embed_tokens.weight", "lm_head.weight"} & model.state_dict().keys()
                model.resize_token_embeddings(wanted, mean_resizing=False)
            missing -= self._load_extra(model, "non_lora_trainables.bin")
            model = self._merge_lora(model)
        elif self.kind == "llm":
            missing -= _start_projector(model)
        if any(key.startswith("model.vision_tower.") for key in missing):
            missing -= self._load_tower(model)
        if missing:
            some = ", ".join(sorted(missing)[:3])
            raise UserError(f"{self.folder}: {len(missing)} weights are missing, among them {some}")
        return model

    def _load_extra(self, model, name: str) -> set[str]:
        """Load a file that the checkpoint needs beside its base; return the names of its weights."""
        path = self.folder / name
        if not path.is_file():
            raise UserError(f"{path}: missing, though the checkpoint needs it beside its model_base")
        return load_extra(model, path)

    def _merge_lora(self, model):
        """Return the model with the LoRA adapter merged. UserError where an adapter weight has no place in it."""
        from peft import PeftModel, get_peft_model_state_dict, load_peft_weights

        try:
            with warnings.catch_warnings():
                # The tower's projections have the names of the LLM's, so peft expects adapters there that do not exist.
                warnings.filterwarnings("ignore", message="Found missing adapter keys")
                warnings.simplefilter("ignore", FutureWarning)  # peft still uses a name that transformers will drop
                adapted = PeftModel.from_pretrained(model, str(self.folder))
            # peft ignores weights without a place, and the model would silently miss them.
            in_file = load_peft_weights(str(self.folder), device="cpu").keys()
            unused = sorted(in_file - get_peft_model_state_dict(adapted, save_embedding_layers=False).keys())
            if unused:
                raise UserError(
                    f"{self.folder}: {len(unused)} adapter weights have no place in the model, among them {unused[0]}"
                )
            return adapted.merge_and_unload(progressbar=sys.stderr.isatty())
        except UserError:
            raise
        except Exception as error:  # peft raises the errors of all its parts
            raise UserError(f"{self.folder}: the LoRA adapter cannot be merged ({first_line(error)})") from error

    def _load_tower(self, model) -> set[str]:
        """Load the tower that config.json names (LLaVA-1.5 has no tower weights); return the names of the weights."""
        name = self.settings.get("mm_vision_tower")
        if not name:
            raise UserError(
                f"{self.folder}: has no weights for its vision tower, and config.json names no mm_vision_tower"
            )
        folder = self.tower_folder if _weight_files(self.tower_folder) else checkpoint_folder(name)
        try:
            with quiet_loading():
                tower = CLIPVisionModel.from_pretrained(folder, weights_only=True)
        except Exception as error:  # as above
            raise UserError(f"{folder}: the vision tower cannot be loaded ({first_line(error)})") from error
        prefix = "model.vision_tower.vision_tower."
        mine = model.state_dict().keys()
        weights = {prefix + key: value for key, value in tower.state_dict().items()}
        # Our tower ends early, so the weights of later layers have no place (clip_encoder.py).
        return _fill(model, {key: value for key, value in weights.items() if key in mine}, folder)


def load_extra(model, path: Path) -> set[str]:
    """Load the weights that LLaVA's training saves beside an LLM, and return their names.

    These are the projector, the newline token and sometimes the tower. UserError for a damaged file.
    """
    _check_file(path)
    try:
        saved = dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch, zipfile and pickle each raise their own
        raise UserError(f"{path}: damaged or cut short ({first_line(error)})") from error
    saved = {key.removeprefix("base_model."): value for key, value in saved.items()}
    if any(key.startswith("model.model.") for key in saved):  # peft wraps the whole model in one more level
        saved = {key.removeprefix("model."): value for key, value in saved.items()}
    weights = {}
    for key, value in saved.items():
        key = key if key.startswith(("model.", "lm_head.")) else "model." + key
        weights[key.replace("vision_tower.vision_tower.vision_model.", "vision_tower.vision_tower.")] = value
    return _fill(model, weights, path)


def load_whole(model, folder: Path) -> None:
    """Load all weights of a complete checkpoint in LLaVA's format (safetensors) into a model."""
    for file in _weight_files(folder):
        _check_file(file)
        weights = load_file(file)
        for theirs, ours in ORIGINAL_KEYS.items():
            weights = {re.sub(theirs, ours, name): value for name, value in weights.items()}
        _fill(model, weights, file)


def _start_projector(model) -> set[str]:
    """Set the random weights at the start of LLaVA's training, and return their names.

    The projector gets the initialisation of torch.nn.Linear; the newline token is normal with deviation 1 /
    sqrt(width).
    """
    # from_pretrained initialises missing weights in transformers' way, so this is done again here.
    for module in model.model.mm_projector.modules():
        if isinstance(module, torch.nn.Linear):
            module.reset_parameters()
    names = {name for name in model.state_dict() if name.startswith("model.mm_projector.")}
    newline = getattr(model.model, "image_newline", None)
    if newline is not None:
        torch.nn.init.normal_(newline, std=newline.shape[0] ** -0.5)
        names.add("model.image_newline")
    return names


def _fill(model, weights: dict, where: Path) -> set[str]:
    """Copy named weights into the model and return the names. UserError where a name or shape does not fit."""
    try:
        unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    except RuntimeError as error:
        raise UserError(f"{where}: weights do not fit the model ({' '.join(str(error).split())[:200]})") from error
    if unknown:
        raise UserError(f"{where}: {len(unknown)} weights have no place in the model, among them {unknown[0]}")
    return set(weights)


def _tower_config(folder: Path) -> dict:
    """Return the settings of the vision tower in `folder`, which may be a whole CLIP. UserError for other models."""
    settings = _read_json(folder / "config.json", f"{folder}: no config.json, so this is no vision tower")
    if settings.get("model_type") not in ("clip", "clip_vision_model"):
        raise UserError(f'{folder}: vision tower of model_type "{settings.get("model_type")}", allowed is CLIP')
    return CLIPVisionConfig.from_pretrained(folder).to_dict()


def _weight_files(folder: Path) -> list[Path]:
    """Return the files that from_pretrained reads, safetensors before .bin; [] where there are none."""
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            shards = _read_json(folder / index, "").get("weight_map", {})
            return [folder / name for name in sorted(set(shards.values()))]
    return []


def _check_file(path: Path) -> None:
    """Raise UserError for a missing file, and for one whose header cannot be read (a broken download)."""
    if not path.is_file():
        raise UserError(f"{path}: missing, though the checkpoint's index names it")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        elif not _is_torch_file(path):
            raise ValueError("no PyTorch file")
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: damaged or cut short ({first_line(error)})") from error


def _is_torch_file(path: Path) -> bool:
    """Return whether a file begins like one of torch.save: a zip archive ("PK"), or a pickle in old versions."""
    with open(path, "rb") as file:
        head = file.read(2)
    return head == b"PK" or head[:1] == b"\x80"


def _read_json(path: Path, missing: str) -> dict:
    """Return the JSON object in a file. UserError with the sentence `missing` where there is no file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(missing) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: found {type(value).__name__}, allowed is one JSON object")
    return value
