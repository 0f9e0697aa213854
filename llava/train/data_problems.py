"""Problems of a training data file. Samples without anything to learn are counted; missing images are named in one
message."""

from __future__ import annotations

import os
from collections import Counter

from llava.common.errors import UserError
from llava.constants import DEFAULT_IMAGE_TOKEN

NAMED = 100  # images that one message names


class Ignored:
    """Counts the samples of the file `path` that are not learnt, per kind, and keeps the first one of each kind."""

    def __init__(self, path: str, total: int):
        self._path, self._total = path, total
        self._left_out: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        self._partly, self._first_partly = 0, ""

    def leaves_out(self, where: str, turns: list[str], images: int) -> bool:
        """Return whether a sample with `images` images is left out, and count it."""
        answers = turns[1::2]
        placeholders = sum(turn.count(DEFAULT_IMAGE_TOKEN) for turn in turns) if images else 0
        if not any(answers):
            self._count("have no answer", f"{where}: there is no answer, so there is nothing to learn")
        elif placeholders != images:
            why = f"{placeholders} {DEFAULT_IMAGE_TOKEN} in its turns, but {images} images; allowed is one each"
            self._count(f"have not as many images as {DEFAULT_IMAGE_TOKEN}", f"{where}: {why}")
        else:
            if not all(answers):
                self._partly, self._first_partly = self._partly + 1, self._first_partly or where
            return False
        return True

    def _count(self, kind: str, first: str) -> None:
        self._left_out[kind] += 1
        self._first.setdefault(kind, first)

    def note(self) -> str:
        """Return one sentence with all counts; "" if every sample is learnt."""
        parts = []
        if self._left_out:
            kinds = "; ".join(f"{n} {kind} (first: {self._first[kind]})" for kind, n in self._left_out.items())
            parts.append(f"{self._left_out.total()} of {self._total} samples are left out: {kinds}")
        if self._partly:
            parts.append(
                f"{self._partly} of {self._total} samples have an empty answer beside others, which is not learnt (first: "
                f"{self._first_partly})"
            )
        return f"{self._path}: {'; '.join(parts)}" if parts else ""

    def refuse_all(self) -> None:
        """Raise UserError: no sample of the file can be learnt."""
        first = next(iter(self._first.values()))
        if self._total == 1:
            raise UserError(f"{self._path}, {first}")
        raise UserError(f"{self._path}: none of its {self._total} samples can be learnt from; the first is {first}")


class ImageFolder:
    """Finds the images of samples in a folder, and collects the missing ones."""

    def __init__(self, folder: str | None):
        self._folder = folder
        self._paths: dict[str, str] = {}
        self._wrong: list[str] = []

    def path(self, name: str, where: str) -> str:
        """Return the path of the image `name` of the sample `where`."""
        if name not in self._paths:
            if not self._paths:
                self._check_folder(where)
            self._paths[name] = os.path.normpath(os.path.join(self._folder, name))
            problem = self._problem(name, self._paths[name])
            if problem:
                self._wrong.append(f"{where}: image {problem}")
        return self._paths[name]

    def _check_folder(self, where: str) -> None:
        if self._folder is None:
            raise UserError(f"{where}: has an image, but --image_folder does not say where images lie")
        if not os.path.isdir(self._folder):
            raise UserError(f"--image_folder {self._folder}: no such folder")

    def _problem(self, name: str, path: str) -> str | None:
        inside = os.path.join(os.path.normpath(self._folder), "")
        if os.path.isabs(name) or not path.startswith(inside):
            return f"{name} does not lie inside {self._folder}"
        if os.path.isfile(path):
            return None
        return f"{path} is a folder" if os.path.isdir(path) else f"{path} is not there"

    def check(self, data: str) -> None:
        """Raise one UserError that names all missing images of the file `data`."""
        if not self._wrong:
            return
        if len(self._wrong) == 1:
            raise UserError(self._wrong[0])
        named = "; ".join(one.removeprefix(f"{data}, ") for one in self._wrong[:NAMED])
        more = f"; and {len(self._wrong) - NAMED} more" if len(self._wrong) > NAMED else ""
        raise UserError(f"{data}: {len(self._wrong)} images cannot be read: {named}{more}")
