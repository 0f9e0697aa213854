"""Reading of images: from files to pixel tensors.

On a machine with a GPU, worker processes read images ahead of time. One CPU core needs longer to decode and resize a
photograph than a GPU needs to answer a question about it.
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

# Images that each process may read ahead. The queues hold pixels of all tiles, so the number bounds host memory.
AHEAD = 8


class UnreadableImage(Exception):
    """An image file exists but cannot be decoded."""


def read_image(path: Path, convert: Callable[[Image.Image], Image.Image] = rgb) -> Image.Image:
    """An RGB image; UnreadableImage says why not. A decoder may raise almost anything on a damaged file."""
    try:
        with Image.open(path) as image:
            return convert(image)
    except MemoryError:
        # The machine's problem, not the file's: the image must not be recorded as unreadable.
        raise
    # Pillow's decoders raise many types on a damaged file (OSError, SyntaxError, ValueError, struct.error, ...).
    except Exception as error:
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error


@dataclass
class ImageFiles(Dataset):
    """Data set of image files. Item i is (names[i], Pixels), or (names[i], reason) for an unreadable image."""

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
            # Returned as text: an exception in a DataLoader worker would end the iteration over all images.
            return self.names[at], str(error)

    def read(self, name: str) -> Pixels:
        """Return the pixels of one image. Raises UnreadableImage."""
        image = read_image(self.folder / name)
        (pixels,) = process_images([image], self.image_processor, self.model_config, self.anyres)
        return Pixels(pixels, image.size)

    @classmethod
    def from_order(cls, order: WorkOrder, loaded: LoadedCheckpoint) -> ImageFiles:
        """Return the images of a work order, each once, in the order in which the samples need them."""
        # Only the image processor and the model's config are kept: the items of this class are made in worker
        # processes, and the model itself must not be copied into them.
        names = list(dict.fromkeys(name for sample in order.samples for name in sample.images))
        anyres = order.config.option("anyres")
        return cls(order.image_folder, names, loaded.image_processor, loaded.model.config, anyres)


class ImageReader:
    """Reader of the images of a run. Calls of `get` should follow the order of `files.names`.

    workers: processes that read ahead. With 0, `get` reads the image itself.
    """

    def __init__(self, files: ImageFiles, workers: int):
        self._files, self._waiting, self._handed_out = files, {}, set()
        self._ahead: Iterator = iter(())
        if workers and len(files):
            # Pinned memory: the copy to the GPU is asynchronous only from pinned memory.
            pin = torch.cuda.is_available()
            # batch_size=None: items come one by one, uncollated. Their tile counts differ, so they cannot be stacked.
            self._ahead = iter(
                DataLoader(files, batch_size=None, num_workers=workers, prefetch_factor=AHEAD, pin_memory=pin)
            )

    def get(self, name: str) -> Pixels:
        """Return the pixels of one image. Raises UnreadableImage with the reason.

        An image that was read ahead is handed out once. A second call for it reads the file again.
        """
        # Read ahead are the names once each: looking there again would read all that is left into memory.
        if name in self._handed_out:
            return self._files.read(name)
        self._handed_out.add(name)
        # Images that come before `name` are kept in _waiting until they are asked for.
        while name not in self._waiting:
            found = next(self._ahead, None)
            if found is None:
                return self._files.read(name)
            self._waiting[found[0]] = found[1]
        image = self._waiting.pop(name)
        if isinstance(image, str):
            raise UnreadableImage(image)
        return image
