"""TowerFiles: where the files of a vision tower lie that are not in the checkpoint itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava.common.errors import UserError, first_line
from llava.common.hub import checkpoint_folder, quiet_loading
from llava.model.processors import has_image_processor
from llava.model.weight_files import read_settings_file, weight_files


@dataclass(frozen=True)
class TowerFiles:
    """The tower that a checkpoint names. Nothing is looked up before a file of it is wanted.

    names: `mm_vision_tower` of the checkpoint, then of its model_base; folders: the checkpoint's, then its model_base's,
    in which a relative name is looked for first.
    """

    names: tuple[str, ...]
    folders: tuple[Path, ...]

    def inside(self, folder: Path, has: Callable[[Path], bool]) -> Path | None:
        """A named tower that lies in `folder` and has what is wanted."""
        found = (folder / name for name in self.names)
        return next((path for path in found if path.is_dir() and has(path)), None)

    def _find(self, what: str, has: Callable[[Path], bool], weights: bool = False) -> Path | None:
        """The first tower folder that has what is wanted; folders on this machine come before the hub.

        None where a named tower is there without it, or none is named; UserError where none of the names leads anywhere.
        """
        for folder in self.folders:
            found = self.inside(folder, has)
            if found is not None:
                return found
        errors = []
        for name in self.names:
            try:
                found = checkpoint_folder(name, weights)
            except UserError as error:
                errors.append(error)
                continue
            if has(found):
                return found
        if errors and len(errors) == len(self.names):
            raise UserError(f"{self.folders[0]}: has no {what} for its vision tower ({errors[0]})") from errors[0]
        return None

    def _refuse(self, what: str) -> None:
        named = (
            f"the mm_vision_tower {self.names[0]} has none" if self.names else "config.json names no mm_vision_tower"
        )
        raise UserError(f"{self.folders[0]}: has no {what} for its vision tower, and {named}")

    def config(self) -> dict:
        """The configuration of the tower, as CLIPVisionConfig takes it."""
        folder = self._find("configuration", has_config)
        return self._refuse("configuration") if folder is None else clip_config(folder)

    def image_processor_folder(self) -> Path | None:
        """The folder with the tower's image processor; None where the tower has none."""
        return self._find("image processor", has_image_processor)

    def weights(self) -> tuple[dict[str, Tensor], Path]:
        """The tower's weights under their own names, and the folder that they come from."""
        folder = self._find("weights", lambda path: bool(weight_files(path)), weights=True)
        if folder is None:
            self._refuse("weights")
        try:
            with quiet_loading():
                config = CLIPVisionConfig(**clip_config(folder))
                return CLIPVisionModel.from_pretrained(folder, config=config, weights_only=True).state_dict(), folder
        except UserError:
            raise
        except Exception as error:  # torch, safetensors, pickle and transformers each raise their own
            raise UserError(f"{folder}: the vision tower cannot be loaded ({first_line(error)})") from error


def has_config(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def clip_config(folder: Path) -> dict:
    """The vision part of a CLIP's config.json, every default filled in. UserError where it is none."""
    settings = read_settings_file(folder / "config.json", f"{folder}: no config.json, so this is no vision tower")
    if settings.get("model_type") not in ("clip", "clip_vision_model"):
        raise UserError(f'{folder}: vision tower of model_type "{settings.get("model_type")}", allowed is CLIP')
    vision = settings.get("vision_config") if settings["model_type"] == "clip" else settings
    return CLIPVisionConfig.from_dict(vision or {}).to_dict()
