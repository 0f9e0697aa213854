"""Files of weights and settings in a checkpoint folder: which there are, whether they can be read, and how a model is filled."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from llava.common.errors import UserError, first_line
from llava.common.files import read_json


def read_settings_file(path: Path, missing: str) -> dict:
    """The object of a JSON file. missing: what the UserError says where there is no such file."""
    if not path.is_file():
        raise UserError(missing)
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: found {type(value).__name__}, allowed is one JSON object")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The files that from_pretrained would read, safetensors first; [] where there are none."""
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            shards = read_settings_file(folder / index, "").get("weight_map")
            if not isinstance(shards, dict):
                raise UserError(
                    f"{folder / index}: has no weight_map, allowed is one that names a file for each weight"
                )
            return [folder / name for name in sorted(set(shards.values()))]
    return []


def check_file(path: Path) -> None:
    """UserError for a file that is not there or whose header cannot be read (a download that broke off)."""
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
    with open(path, "rb") as file:
        head = file.read(2)
    return head == b"PK" or head[:1] == b"\x80"


def read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .bin file, without running any code that it may hold."""
    check_file(path)
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch, zipfile and pickle each raise their own
        raise UserError(f"{path}: damaged or cut short ({first_line(error)})") from error


def without_use(model, name: str) -> bool:
    """Return whether the model knows weights of this name but does not use them, such as the tower's last layer."""
    layer = re.search(r"vision_tower\..*encoder\.layers\.(\d+)\.", name)
    if layer is not None:
        return int(layer[1]) >= model.get_vision_tower().config.num_hidden_layers
    return any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_unexpected)


def fill(model, weights: dict[str, torch.Tensor], where: Path) -> set[str]:
    """Copy named weights into the model; UserError where a name or shape does not fit. Returns the names."""
    try:
        unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    except RuntimeError as error:
        raise UserError(f"{where}: weights do not fit the model ({' '.join(str(error).split())[:200]})") from error
    unknown = [name for name in unknown if not without_use(model, name)]
    if unknown:
        raise UserError(f"{where}: {len(unknown)} weights have no place in the model, among them {unknown[0]}")
    return set(weights)
