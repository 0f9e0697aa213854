"""Tokenizer and image processor of a checkpoint, from the first of its folders that has them."""

from __future__ import annotations

from pathlib import Path

import transformers
from transformers import AutoTokenizer, LlamaConfig

from llava.common.errors import UserError, first_line
from llava.common.files import read_json

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
# The PIL variants, by name: transformers' choice fails without torchvision, and gives other pixel values with it.
_IMAGE_PROCESSORS = {
    "CLIPImageProcessor": "CLIPImageProcessorPil",
    "CLIPFeatureExtractor": "CLIPImageProcessorPil",
    "LlavaImageProcessor": "LlavaImageProcessorPil",
    "LlavaNextImageProcessor": "LlavaNextImageProcessorPil",
}


def load_tokenizer(folders):
    """Return the tokenizer of the first folder that has one; None where none has. UserError for an unreadable one."""
    for folder in filter(None, folders):
        if any((Path(folder) / name).is_file() for name in _TOKENIZER_FILES):
            try:
                # AutoTokenizer does not know our model types. With Llama's it reads a folder with only tokenizer.model.
                return AutoTokenizer.from_pretrained(folder, config=LlamaConfig(), padding_side="left")
            except Exception as error:  # the tokenizers library raises bare Exception for a file it cannot parse
                raise UserError(f"{folder}: the tokenizer cannot be loaded ({first_line(error)})") from error
    return None


def load_image_processor(folders):
    """Return the image processor of the first folder that has one; None where none has.

    UserError for one that cannot be read or is of another class.
    """
    for folder in filter(None, folders):
        settings = _processor_settings(Path(folder))
        if settings is None:
            continue
        return image_processor_of(settings, str(folder))
    return None


def image_processor_of(settings: dict, where: str):
    """Return the image processor with `settings`, which are those of any class of the same kind.

    where: how the message of an error begins. UserError for settings of another kind.
    """
    name = settings.get("image_processor_type") or settings.get("feature_extractor_type") or "CLIPImageProcessor"
    name = name.removesuffix("Fast").removesuffix("Pil")
    if name not in _IMAGE_PROCESSORS:
        raise UserError(f'{where}: image processor "{name}", allowed are {", ".join(_IMAGE_PROCESSORS)}')
    return getattr(transformers, _IMAGE_PROCESSORS[name]).from_dict(settings)


def adopt_padding(config, image_processor) -> None:
    """Make a model's `config` say "pad" where transformers' LlavaImageProcessor pads by itself."""
    if config.image_aspect_ratio == "crop" and getattr(image_processor, "do_pad", False):
        config.image_aspect_ratio = "pad"


def has_image_processor(folder: Path) -> bool:
    """Return whether a folder has the settings of an image processor."""
    return _processor_settings(folder) is not None


def _processor_settings(folder: Path) -> dict | None:
    """Return the settings of a folder's image processor; None where it has none. UserError for broken JSON."""
    # transformers writes them as a file of their own, or as a part of processor_config.json.
    for file, key in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        path = folder / file
        if path.is_file():
            settings = read_json(path)
            if not isinstance(settings, dict):
                raise UserError(f"{path}: found {type(settings).__name__}, allowed is one JSON object")
            settings = settings if key is None else settings.get(key)
            if settings:
                return settings
    return None
