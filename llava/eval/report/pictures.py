"""Images of a run as small data URLs, so that the page needs no other file."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

from llava.common.errors import UserError, first_line
from llava.eval.benchmarks.questions import Sample, check_images
from llava.eval.report.runs import RecordedRun

LONGEST = 320  # pixels of the longer side
MOST = 150  # images in a page, about 3 MB
QUALITY = 82  # JPEG quality


class Pictures:
    """The images of a page. Each is read once, and there are at most `MOST`."""

    def __init__(self):
        self._known: dict[Path, tuple[str, int, int]] = {}

    def get(self, run: RecordedRun, sample: Sample) -> tuple[str, int, int]:
        """Return (data URL, width, height) of the image of a sample of `run`.

        Raises UserError if it is missing, unreadable, outside the image folder, or above the limit of `MOST`.
        """
        folder = run.benchmark.image_folder
        path = folder / sample.image
        if path not in self._known:
            # A path that leads out of the image folder would put any file of this machine into the page.
            check_images([sample], folder, run.benchmark.question_file)
            if len(self._known) == MOST:
                raise UserError(f"not shown: a page holds at most {MOST} pictures")
            self._known[path] = _small(path)
        return self._known[path]


def _small(path: Path) -> tuple[str, int, int]:
    """Return (data URL, width, height) of an image, made small. Raises UserError if it cannot be read."""
    buffer = io.BytesIO()
    try:
        with Image.open(path) as file:
            # For a large JPEG, the decoder itself can give a half, a quarter or an eighth of the size, which is faster.
            file.draft("RGB", (LONGEST, LONGEST))
            image = file.convert("RGB")
        image.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
        image.save(buffer, "JPEG", quality=QUALITY)
    except Exception as error:  # a decoder may raise almost anything on a damaged file
        raise UserError(f'image "{path.name}" cannot be read ({first_line(error)})') from None
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(), *image.size
