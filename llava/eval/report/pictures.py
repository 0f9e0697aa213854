"""Pictures of a run as small data URLs, so that a page needs no other file."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

from llava.common.errors import UserError, first_line
from llava.eval.benchmarks.questions import Sample, check_images
from llava.eval.report.runs import RecordedRun

LONGEST = 320  # pixels of a picture's longer side
MOST = 150  # pictures in a page: about 3 MB
QUALITY = 82  # of JPEG


class Pictures:
    """The pictures of a page; each is read once, and there are at most `MOST`."""

    def __init__(self):
        self._known: dict[Path, tuple[str, int, int]] = {}

    def get(self, run: RecordedRun, sample: Sample) -> tuple[str, int, int]:
        """(data URL, width, height) of the picture of a sample that `run` was judged on. UserError says why there is none."""
        folder = run.benchmark.image_folder
        path = folder / sample.image
        if path not in self._known:
            check_images([sample], folder, run.benchmark.question_file)
            if len(self._known) == MOST:
                raise UserError(f"not shown: a page holds at most {MOST} pictures")
            self._known[path] = _small(path)
        return self._known[path]


def _small(path: Path) -> tuple[str, int, int]:
    buffer = io.BytesIO()
    try:
        with Image.open(path) as file:
            file.draft("RGB", (LONGEST, LONGEST))  # a large JPEG is decoded at the size that is needed
            image = file.convert("RGB")
        image.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
        image.save(buffer, "JPEG", quality=QUALITY)
    except Exception as error:  # a decoder may raise almost anything on a damaged file
        raise UserError(f'image "{path.name}" cannot be read ({first_line(error)})') from None
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(), *image.size
