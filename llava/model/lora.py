"""LoRA adapters as peft saves them, merged into a model: `Adapter.read` reads a folder, `merge` changes the weights."""

from __future__ import annotations

import re
import sys
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from llava.common.errors import UserError, first_line
from llava.model.weight_files import check_file, read_settings_file, without_use
from llava.model.weight_names import trained_name

FILES = ("adapter_model.safetensors", "adapter_model.bin")
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
# peft's levels above a complete weight: of a layer that has an adapter, and of a module that was trained as a whole.
_WHOLE = re.compile(r"\.(?:token_adapter\.)?(?:base_layer|modules_to_save(?:\.default)?)\.")


@dataclass
class Adapter:
    """folder: where it lies; settings: its adapter_config.json.

    whole: complete weights, such as the embeddings of a grown vocabulary; parts: the adapter's own matrices. Both have the
    names of our model.
    """

    folder: Path
    settings: dict
    whole: dict[str, Tensor]
    parts: dict[str, Tensor]

    @classmethod
    def read(cls, folder: Path) -> Adapter:
        """UserError where a file of the adapter is missing or damaged."""
        from peft import load_peft_weights

        settings = read_settings_file(folder / "adapter_config.json", f"{folder}: no adapter_config.json")
        file = next((folder / name for name in FILES if (folder / name).is_file()), None)
        if file is None:
            raise UserError(f"{folder}: no adapter weights, allowed are {' and '.join(FILES)}")
        check_file(file)
        try:
            saved = load_peft_weights(str(folder), device="cpu")
        except Exception as error:  # torch, safetensors and pickle each raise their own
            raise UserError(f"{file}: damaged or cut short ({first_line(error)})") from error
        named = {trained_name(name): value for name, value in saved.items() if ".original_module." not in name}
        parts = {name: value for name, value in named.items() if _part().match(name) and not _WHOLE.search(name)}
        whole = {_WHOLE.sub(".", name): value for name, value in named.items() if name not in parts}
        return cls(folder, settings, whole, parts)

    def splits_embeddings(self, model) -> bool:
        """Return whether word embeddings and head share one tensor in the model, but differ with the adapter."""
        if not model.config.tie_word_embeddings:
            return False
        embedding, head = (self.whole.get(f"{name}.weight") for name in (EMBEDDING, HEAD))
        if embedding is not None and head is not None and not torch.equal(embedding, head):
            return True
        return any(".lora_" in name and _module(name) in (EMBEDDING, HEAD) for name in self.parts)

    def merge(self, model):
        """Add the adapter to the weights of `model`, which has `whole` already. Returns the model."""
        modules = {name for name, _ in model.named_modules()}
        parts = {name: v for name, v in self.parts.items() if _module(name) in modules or not without_use(model, name)}
        self._refuse([name for name in parts if _module(name) not in modules], "have no place in the model")
        rows = {name: value for name, value in parts.items() if name.endswith("trainable_tokens_delta")}
        for name, value in rows.items():
            self._set_rows(model, _module(name), value)
        return self._merge_parts(model, {name: value for name, value in parts.items() if name not in rows})

    def _refuse(self, names: list[str], why: str) -> None:
        if names:
            raise UserError(f"{self.folder}: {len(names)} adapter weights {why}, among them {sorted(names)[0]}")

    def _set_rows(self, model, module: str, rows: Tensor) -> None:
        """Embeddings of single tokens, which adapter_config.json lists (peft's trainable tokens)."""
        listed = self.settings.get("trainable_token_indices") or self.settings.get("token_indices")
        if isinstance(listed, list):
            listed = {EMBEDDING: listed}
        listed = listed.items() if isinstance(listed, dict) else ()
        index = next((own for name, own in listed if f".{module}".endswith(f".{name}")), None)
        weight = model.get_submodule(module).weight
        if index is None and module == HEAD and model.config.tie_word_embeddings:
            return  # the same tensor as the embeddings
        fits = isinstance(index, list) and rows.shape == (len(index), weight.shape[1])
        if not fits or not all(isinstance(i, int) and 0 <= i < len(weight) for i in index):
            raise UserError(
                f"{self.folder}: the token embeddings of {module} do not fit adapter_config.json and the model"
            )
        with torch.no_grad():
            weight[index] = rows.to(weight)

    def _merge_parts(self, model, parts: dict[str, Tensor]):
        from peft import PeftModel, set_peft_model_state_dict

        if not parts:
            return model
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # peft still uses a name that transformers will drop
                adapted = PeftModel(model, self._config(parts))
            saved = {f"base_model.model.{name}": value for name, value in parts.items()}
            result = set_peft_model_state_dict(adapted, saved)
            self._refuse(list(result.unexpected_keys), "have no place in the model")
            self._refuse([name for name in result.missing_keys if _part().match(name)], "are missing")
            return adapted.merge_and_unload(progressbar=sys.stderr.isatty())
        except UserError:
            raise
        except Exception as error:  # peft passes on whatever its parts raise
            why = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"{self.folder}: the LoRA adapter cannot be merged ({why})") from error

    def _config(self, parts: dict[str, Tensor]):
        """peft's configuration for exactly the modules that the file has adapters for; `whole` is in the model already."""
        from peft import PeftConfig

        config = PeftConfig.from_peft_type(**self.settings)
        config.inference_mode = True
        config.target_modules = {_module(name) for name in parts}
        for name in (
            "modules_to_save",
            "trainable_token_indices",
            "exclude_modules",
            "layers_to_transform",
            "layers_pattern",
        ):
            setattr(config, name, None)
        for name in ("rank_pattern", "alpha_pattern"):
            patterns = getattr(config, name, None) or {}
            setattr(config, name, {re.sub(r"vision_model\\?\.", "", key): value for key, value in patterns.items()})
        return config


@cache
def _part() -> re.Pattern:
    """The names of an adapter's own matrices, of any kind that peft knows; group 1 is the module that they change."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    prefixes = "|".join(sorted({*map(re.escape, PEFT_TYPE_TO_PREFIX_MAPPING.values()), "trainable_tokens_"}))
    return re.compile(rf"^(.*?)(?:\.token_adapter)?\.(?:{prefixes})")


def untie(model) -> None:
    """Give the head a tensor of its own, where it shares that of the word embeddings."""
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)


def _module(name: str) -> str:
    return _part().match(name)[1]
