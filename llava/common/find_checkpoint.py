"""The launcher's view of a checkpoint: its folder, its config.json and its identity.

Imports no torch. The worker reports errors of the weights themselves (llava.model.checkpoint).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

from llava.common.errors import UserError
from llava.common.files import BASE, REPOSITORY, read_json
from llava.common.hub import checkpoint_folder

# Suffixes of the files that change what a checkpoint answers: settings, weights, tokenizer, chat template.
_IDENTIFYING = (".json", ".safetensors", ".bin", ".pt", ".pth", ".model", ".txt", ".jinja")
_SAMPLE = 1 << 20  # bytes that are read at the start, in the middle and at the end of a large weight file


@dataclass(frozen=True)
class EvalCheckpoint:
    """A checkpoint as the launcher sees it.

    name: as the user gave it. folder: None if the checkpoint is not downloaded yet. settings: its config.json.
    """

    name: str
    folder: Path | None
    settings: dict

    @property
    def short_name(self) -> str:
        """The last part of the name. For checkpoint-N folders the parent's name comes first, as in LLaVA."""
        parts = self.name.rstrip("/").split("/")
        return "_".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]

    @property
    def anyres(self) -> bool:
        """True if images are cut into several tiles (LLaVA-1.6), in either checkpoint format."""
        return self.settings.get("image_aspect_ratio") == "anyres" or self.settings.get("model_type") == "llava_next"

    @property
    def parameters(self) -> int | None:
        """Number of parameters of its weight files; None if it is not downloaded yet."""
        return self.folder and sum(
            map(_parameters, sorted(self.folder.glob("*.safetensors")) or self.folder.glob("*.bin"))
        )

    @property
    def identity(self) -> dict:
        return {"name": self.short_name, "content": self.folder and content_digest(self.folder)}


def find_checkpoint(name: str, fetch: bool = True) -> EvalCheckpoint:
    """A checkpoint by folder (as given, or below the checkout) or hub name; UserError where there is none.

    A hub checkpoint is downloaded here, once, so that the shards do not all download it at the same time. With
    fetch=False nothing is downloaded, and the checkpoint may have no folder.
    """
    for folder in (Path(name), BASE / name):
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                raise UserError(f"{name}: has no config.json, so this is no checkpoint folder")
            settings = read_json(folder / "config.json")
            if not isinstance(settings, dict):
                raise UserError(
                    f"{folder / 'config.json'}: found {type(settings).__name__}, allowed is one JSON object"
                )
            return EvalCheckpoint(str(name), folder.resolve(), settings)
    if REPOSITORY and (REPOSITORY / str(name).partition("/")[0]).exists():  # a path below it was meant
        raise UserError(f"{name}: no such checkpoint folder")
    folder = checkpoint_folder(name, fetch=fetch)
    if folder is None:
        return EvalCheckpoint(str(name), None, {})
    return EvalCheckpoint(str(name), folder, read_json(folder / "config.json"))


def _parameters(file: Path) -> int:
    """Return the number of parameters of a weight file. Damaged files are the worker's affair, and count as empty."""
    if file.suffix != ".safetensors":
        return os.path.getsize(file) // 2  # a pickle does not say it; published ones have 16 bits per parameter
    # The format: eight bytes with the length of a JSON header, then the header with the shape of every tensor.
    try:
        with open(file, "rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, MemoryError, OverflowError):
        return 0


def content_digest(folder: Path) -> str:
    """Ten hex digits that identify the content of a checkpoint folder, independent of where the folder is.

    Files up to 16 MiB are hashed whole. Of a larger file, the size and three samples are hashed, because reading 14 GB
    takes minutes.
    """
    seen = hashlib.sha256()
    for path in sorted(Path(folder).rglob("*")):
        if not path.is_file() or path.suffix not in _IDENTIFYING:
            continue
        # The relative path is hashed, so that a copy of the folder elsewhere has the same digest.
        size = os.path.getsize(path)
        seen.update(f"{path.relative_to(folder)}\0{size}\0".encode())
        with open(path, "rb") as file:
            if size <= 16 * _SAMPLE:
                seen.update(file.read())
                continue
            for start in (0, size // 2, size - _SAMPLE):
                file.seek(start)
                seen.update(file.read(_SAMPLE))
    return seen.hexdigest()[:10]
