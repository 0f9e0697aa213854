"""Checkpoint: the files of a checkpoint folder in either format, and the loading of its weights into our model.

`Checkpoint.open` finds the files. `model_config` gives one configuration for both formats. `load` fills the model.
from_pretrained of transformers does the loading (shards, dtypes, device maps); this file maps the names of weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, GenerationConfig, LlamaConfig, LlavaConfig, LlavaNextConfig

from llava.common.errors import UserError, first_line
from llava.common.hub import checkpoint_folder, quiet_loading
from llava.mm_utils import read_pinpoints
from llava.model.language_model.llava_config import LlavaLlamaConfig, LlavaMistralConfig
from llava.model.lora import Adapter, untie
from llava.model.processors import load_image_processor
from llava.model.tower_files import TowerFiles, clip_config, has_config
from llava.model.weight_files import check_file, fill, read_pickle, read_settings_file, weight_files
from llava.model.weight_names import HF_KEYS, ORIGINAL_KEYS, original_name, trained_name

CONFIG_CLASSES = {"llama": LlavaLlamaConfig, "mistral": LlavaMistralConfig}
HF_CLASSES = {"llava": LlavaConfig, "llava_next": LlavaNextConfig}
_BY_WORD = {"model.embed_tokens.weight", "lm_head.weight"}  # one row for each word of the vocabulary


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
        settings = _config_file(folder)
        if (folder / "adapter_config.json").is_file():
            kind = "lora"
        elif weight_files(folder):
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
        base = None if model_base is None else checkpoint_folder(model_base)
        hf = _check_llava(folder, settings, {} if base is None else _config_file(base))
        return cls(folder, base, settings, kind, hf)

    @classmethod
    def of_llm(cls, model_path, **mm_settings) -> Checkpoint:
        """Return an LLM (Vicuna, Llama, Mistral) as the start of a LLaVA: its config.json plus LLaVA's `mm_*` settings.

        UserError for an LLM of another architecture.
        """
        folder = checkpoint_folder(model_path)
        settings = _config_file(folder)
        kind = settings.get("model_type")
        if kind not in CONFIG_CLASSES:
            raise UserError(f'{folder}: model_type is "{kind}", allowed for training are {", ".join(CONFIG_CLASSES)}')
        if not weight_files(folder):
            raise UserError(f"{folder}: no weights, allowed are model*.safetensors, pytorch_model*.bin")
        return cls(folder, None, settings | {"model_type": f"llava_{kind}"} | mm_settings, "llm", False)

    @staticmethod
    def is_llava(folder: Path) -> bool:
        """Whether config.json is that of a LLaVA in either format. A plain LLM gives False."""
        settings = _config_file(folder)
        return settings.get("model_type") not in CONFIG_CLASSES

    @staticmethod
    def read_settings(folder: Path) -> tuple[dict, bool]:
        """config.json of a checkpoint folder, and whether it is in transformers' format; UserError where it is no LLaVA."""
        settings = _config_file(folder)
        return settings, _check_llava(folder, settings, {})

    @cached_property
    def base_settings(self) -> dict:
        """config.json of the model_base; {} where there is none."""
        return {} if self.base is None else _config_file(self.base)

    @property
    def tower(self) -> TowerFiles:
        """The vision tower that the checkpoint names, or its model_base where that is a LLaVA; nothing is looked up yet."""
        named = [() if _is_hf(one) else one.get("mm_vision_tower") for one in (self.settings, self.base_settings)]
        names = dict.fromkeys(name for name in named if name and isinstance(name, str))
        return TowerFiles(tuple(names), tuple(filter(None, (self.folder, self.base))))

    def image_processor(self):
        """Return the image processor of the checkpoint, of its model_base, or of the tower that they name; None if none has one."""
        own = load_image_processor([self.folder, self.base])
        return load_image_processor([self.tower.image_processor_folder()]) if own is None else own

    def _vision_config(self) -> dict:
        """The configuration of the tower, from the checkpoint, from its model_base, or from the tower that they name."""
        stated = self.settings.get("mm_vision_config")
        if stated:
            return CLIPVisionConfig.from_dict(stated).to_dict()
        inside = self.tower.inside(self.folder, has_config)
        if inside is not None:
            return clip_config(inside)
        if _is_hf(self.base_settings):
            return HF_CLASSES[self.base_settings["model_type"]].from_dict(self.base_settings).vision_config.to_dict()
        stated = self.base_settings.get("mm_vision_config")
        return CLIPVisionConfig.from_dict(stated).to_dict() if stated else self.tower.config()

    def model_config(self):
        """Return the configuration, in one form for both formats. UserError for settings that this code cannot run."""
        try:
            config = self._from_hf() if self.hf else self._from_original()
        except (TypeError, ValueError, KeyError, AttributeError, StrictDataclassError) as error:
            raise UserError(f"{self.folder}: config.json cannot be used ({' '.join(str(error).split())})") from error
        self._refuse(config.mm_vision_select_feature, ("patch",), "mm_vision_select_feature")
        self._refuse(config.mm_patch_merge_type, ("flat", "spatial", "spatial_unpad"), "mm_patch_merge_type")
        self._refuse(config.image_aspect_ratio, (None, "square", "crop", "pad", "anyres"), "image_aspect_ratio")
        if config.image_aspect_ratio == "anyres":
            if not config.image_grid_pinpoints:
                raise UserError(
                    f"{self.folder}: image_aspect_ratio is anyres, but config.json has no image_grid_pinpoints"
                )
            name = f"{self.folder}: image_grid_pinpoints"
            config.image_grid_pinpoints = read_pinpoints(config.image_grid_pinpoints, config.mm_tile_size, name)
        if config.mm_hidden_size != config.vision.hidden_size:
            raise UserError(
                f"{self.folder}: mm_hidden_size is {config.mm_hidden_size}, allowed is the width of the vision tower "
                f"that config.json names, {config.vision.hidden_size}"
            )
        return config

    def generation_config(self) -> GenerationConfig:
        """Return the generation settings of the loaded model: those of generation_config.json, else of config.json."""
        try:
            return GenerationConfig.from_pretrained(self.base or self.folder)
        except OSError:
            return GenerationConfig.from_model_config(self.model_config())

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
        values["mm_vision_config"] = self._vision_config()
        values.setdefault("mm_hidden_size", values["mm_vision_config"]["hidden_size"])
        return CONFIG_CLASSES["mistral" if model_type == "llava_mistral" else "llama"].from_dict(values)

    # --- weights ----------------------------------------------------------------------------------------------

    def load(self, model_class, config, device_map, dtype, quantisation=None):
        """The model with all its weights. UserError where they are missing, damaged or of another shape.

        quantisation: quantization_config of from_pretrained, or None
        """
        adapter = Adapter.read(self.folder) if self.kind == "lora" else None
        extra = self._beside_base(adapter)
        rows = next((extra[name].shape[0] for name in _BY_WORD if name in extra), config.vocab_size)
        if self.base is not None:
            config.vocab_size = self._base_vocabulary()  # until the checkpoint's own embeddings arrive
        model, missing = self._load_files(model_class, config, device_map, dtype, quantisation)
        if self.kind == "llm":
            missing -= _start_projector(model)
        if self.kind == "lora" and rows != config.vocab_size:
            if rows > config.vocab_size:  # the added rows are nowhere but in the checkpoint
                missing |= _BY_WORD & model.state_dict().keys()
            model.resize_token_embeddings(rows, mean_resizing=False)
        if any(key.startswith("model.vision_tower.") for key in missing - extra.keys()):
            missing -= self._load_tower(model)
        if adapter is not None and adapter.splits_embeddings(model):
            untie(model)
        missing -= fill(model, extra, self.folder)
        if model.config.tie_word_embeddings and not missing >= _BY_WORD:
            missing -= _BY_WORD  # one tensor, and it is there
        if missing:
            some = ", ".join(sorted(missing)[:3])
            raise UserError(f"{self.folder}: {len(missing)} weights are missing, among them {some}")
        return model if adapter is None else adapter.merge(model)

    def _beside_base(self, adapter: Adapter | None) -> dict[str, torch.Tensor]:
        """The complete weights that the checkpoint has beside its model_base, under their names in our model."""
        if self.base is None:
            return {}
        path = self.folder / ("mm_projector.bin" if adapter is None else "non_lora_trainables.bin")
        if not path.is_file():
            raise UserError(f"{path}: missing, though the checkpoint needs it beside its model_base")
        return read_extra(path) | ({} if adapter is None else adapter.whole)

    def _base_vocabulary(self) -> int:
        settings = self.base_settings
        if _is_hf(settings):
            return HF_CLASSES[settings["model_type"]].from_dict(settings).text_config.vocab_size
        return settings.get("vocab_size", LlamaConfig().vocab_size)

    def _load_files(self, model_class, config, device_map, dtype, quantisation):
        """The model with the weights of the folder that has an LLM, and the names of those that are not there."""
        folder, hf = self.base or self.folder, _is_hf(self.settings if self.base is None else self.base_settings)
        for file in weight_files(folder):
            check_file(file)
        try:
            with quiet_loading():
                model, info = model_class.from_pretrained(
                    folder,
                    config=config,
                    dtype=dtype,
                    device_map=device_map,
                    quantization_config=quantisation,
                    key_mapping=HF_KEYS if hf else ORIGINAL_KEYS,
                    output_loading_info=True,
                    weights_only=True,
                    attn_implementation="sdpa",  # the decoder replaces it by its own (layer_loop.py)
                )
        except Exception as error:  # torch, safetensors, pickle and transformers each raise their own
            raise UserError(f"{folder}: the weights cannot be loaded ({first_line(error)})") from error
        _keep_names(model, hf)
        if info["unexpected_keys"]:
            unknown = sorted(info["unexpected_keys"])
            raise UserError(
                f"{folder}: {len(unknown)} weights have no place in the model that config.json describes, among them "
                f"{', '.join(unknown[:3])}"
            )
        return model, set(info["missing_keys"])

    def _load_tower(self, model) -> set[str]:
        """LLaVA 1.5 keeps no tower weights: they come from the tower that config.json names."""
        tower, folder = self.tower.weights()
        prefix = "model.vision_tower.vision_tower."
        mine = model.state_dict().keys()
        weights = {prefix + key: value for key, value in tower.items()}
        return fill(model, {key: value for key, value in weights.items() if key in mine}, folder)


def load_extra(model, path: Path) -> set[str]:
    """Fill in weights that LLaVA's training saved beside an LLM: projector, newline, perhaps the tower. Returns their names."""
    return fill(model, read_extra(path), path)


def read_extra(path: Path) -> dict[str, torch.Tensor]:
    """Weights that LLaVA's training saved beside an LLM, under their names in our model."""
    return {trained_name(name): value for name, value in read_pickle(path).items()}


def load_whole(model, folder: Path) -> None:
    """Fill a model with the weights of a checkpoint in LLaVA's format that holds all of them (safetensors)."""
    for file in weight_files(folder):
        check_file(file)
        fill(model, {original_name(name): value for name, value in load_file(file).items()}, file)


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


def _keep_names(model, hf: bool) -> None:
    """Keep save_pretrained from undoing the names that are no names of LLaVA: a wrapper's, and transformers' layouts, since
    the model's config.json is LLaVA's."""
    conversions = vars(model).pop("_weight_conversions", None)
    if conversions and not hf:
        model._weight_conversions = [one for one in conversions if any(one.target_patterns)]


def _config_file(folder: Path) -> dict:
    return read_settings_file(folder / "config.json", f"{folder}: no config.json, so this is no checkpoint")


def _check_llava(folder: Path, settings: dict, of_base: dict) -> bool:
    """Return whether a config.json is in transformers' format. UserError if it is not that of a LLaVA.

    of_base: the settings of its model_base, which may name the tower; {} without one.
    """
    hf = _is_hf(settings)
    original = settings.get("model_type") in ("llava", "llava_llama", "llava_mistral") and not hf
    tower = _is_hf(of_base) or any(
        "mm_vision_tower" in one or one.get("mm_vision_config") for one in (settings, of_base)
    )
    if not hf and not (original and tower):
        raise UserError(
            f"{folder}: architecture {settings.get('architectures') or ['unknown']} (model_type "
            f'"{settings.get("model_type")}") is no LLaVA with a vision tower, allowed are LLaVA 1.5 and 1.6 in the '
            f"format of liuhaotian/llava-* or llava-hf/*"
        )
    return hf


def _is_hf(settings: dict) -> bool:
    """Return whether a config.json is that of a LLaVA in transformers' format."""
    return settings.get("model_type") in HF_CLASSES and "text_config" in settings
