"""The checkpoint of a run, as far as the launcher must know it: where its files lie and what tells it apart.

Imports no torch. What is wrong with the weights themselves, the worker says (llava.model.checkpoint).
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from llava.common.errors import UserError
from llava.common.files import BASE, REPOSITORY, read_json
from llava.common.hub import checkpoint_folder

_IDENTIFYING = (".json", ".safetensors", ".bin", ".pt", ".pth", ".model", ".txt", ".jinja")
_SAMPLE = 1 << 20  # bytes read at the front, the middle and the end of a weight file


@dataclass(frozen=True)
class EvalCheckpoint:
    """A checkpoint. name: as the user gave it; folder: None for one that is not fetched yet; settings: its config.json."""

    name: str
    folder: Path | None
    settings: dict

    @property
    def short_name(self) -> str:
        """The last part of the name; checkpoint-N folders keep their parent's name in front, as in LLaVA."""
        parts = self.name.rstrip("/").split("/")
        return "_".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]

    @property
    def anyres(self) -> bool:
        """True where images are cut into several tiles (LLaVA 1.6), in either checkpoint format."""
        return self.settings.get("image_aspect_ratio") == "anyres" or self.settings.get("model_type") == "llava_next"

    @property
    def identity(self) -> dict:
        return {"name": self.short_name, "content": self.folder and content_digest(self.folder)}


def find_checkpoint(name: str, fetch: bool = True) -> EvalCheckpoint:
    """A checkpoint by folder (as given, or below the checkout) or hub name; UserError where there is none.

    A hub checkpoint is fetched here, once, so that the shards do not all fetch it at the same time; with fetch=False it
    may come without a folder.
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


def content_digest(folder: Path) -> str:
    """What identifies the content of a checkpoint folder, wherever it lies.

    Small files count whole; of a large one the size and three samples, since 14 GB take minutes to read.
    """
    seen = hashlib.sha256()
    for path in sorted(Path(folder).rglob("*")):
        if not path.is_file() or path.suffix not in _IDENTIFYING:
            continue
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
