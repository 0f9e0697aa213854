"""Images from files to pixel tensors, on GPU machines ahead of time and in processes of their own.

Decoding and resizing a photograph takes longer on a core than a GPU takes to answer a question about it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from llava.common.pictures import rgb
from llava.eval.runs.work_order import WorkOrder
from llava.inference.loaded_checkpoint import LoadedCheckpoint, Pixels
from llava.mm_utils import process_images

# Images that each process is ahead of the model.
AHEAD = 8


class UnreadableImage(Exception):
    """An image file that is there but cannot be decoded."""


def read_image(path: Path, convert: Callable[[Image.Image], Image.Image] = rgb) -> Image.Image:
    """An RGB image; UnreadableImage says why not. A decoder may raise almost anything on a damaged file."""
    try:
        with Image.open(path) as image:
            return convert(image)
    except MemoryError:
        raise
    except Exception as error:
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error


@dataclass
class ImageFiles(Dataset):
    """Images of a folder by their place in `names`: (name, Pixels), or (name, why it is unreadable)."""

    folder: Path
    names: Sequence[str]
    image_processor: object
    model_config: object
    anyres: str

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, at: int) -> tuple[str, Pixels | str]:
        try:
            return self.names[at], self.read(self.names[at])
        except UnreadableImage as error:
            return self.names[at], str(error)

    def read(self, name: str) -> Pixels:
        image = read_image(self.folder / name)
        (pixels,) = process_images([image], self.image_processor, self.model_config, self.anyres)
        return Pixels(pixels, image.size)

    @classmethod
    def from_order(cls, order: WorkOrder, loaded: LoadedCheckpoint) -> ImageFiles:
        """The images of a work order, as the checkpoint wants them. (The checkpoint itself does not go to other processes.)"""
        names = list(dict.fromkeys(sample.image for sample in order.samples if sample.image is not None))
        anyres = order.config.option("anyres")
        return cls(order.image_folder, names, loaded.image_processor, loaded.model.config, anyres)


class ImageReader:
    """The images of a run, asked for about in the order of `files.names`.

    workers: processes that read ahead; with 0 an image is read when it is asked for.
    """

    def __init__(self, files: ImageFiles, workers: int):
        self._files, self._waiting = files, {}
        self._ahead: Iterator = iter(())
        if workers and len(files):
            pin = torch.cuda.is_available()  # so that pixels travel to the GPU while the host goes on
            self._ahead = iter(
                DataLoader(files, batch_size=None, num_workers=workers, prefetch_factor=AHEAD, pin_memory=pin)
            )

    def get(self, name: str) -> Pixels:
        """UnreadableImage says why there is none. What was read ahead is handed out once; asked for again, it is read again."""
        while name not in self._waiting:
            found = next(self._ahead, None)
            if found is None:
                return self._files.read(name)
            self._waiting[found[0]] = found[1]
        image = self._waiting.pop(name)
        if isinstance(image, str):
            raise UnreadableImage(image)
        return image
