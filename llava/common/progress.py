"""The one progress bar of all commands: rate and remaining time on a terminal, nothing elsewhere.

    for sample in progress_bar("answering", samples, unit=" questions"): ...

The launcher's line (llava.eval.runs.shard_progress) counts what other processes answer; everything else is a bar of this file.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

_WATCH = 0.3  # seconds between looks at a folder that is written to


def progress_bar(what: str, over: Iterable | None = None, total: float | None = None, unit: str = "it", **options):
    """A tqdm bar on stderr, quiet where that is no terminal: iterate over it, or `update` it within `with`.

    what: a few words before the bar; over: what to iterate over; total: steps, where `over` does not know its length;
    unit: of the rate; options: for tqdm (disable=True). It is gone when it is done; of several ranks the first shows it.
    """
    quiet = True if os.environ.get("RANK", "0") != "0" else None  # None: where stderr is no terminal
    settings = {"disable": quiet, "leave": False, "dynamic_ncols": True, "unit": unit}
    return tqdm(over, desc=what, total=total, **{**settings, **options})


@contextmanager
def writing_bar(what: str, folder: Path, size: int) -> Iterator[None]:
    """A bar over the `size` bytes that are written into `folder` within it, by code that shows none of its own."""
    with progress_bar(what, total=size, unit="B", unit_scale=True) as bar:
        if bar.disable:
            yield
            return
        before, done = _bytes_in(folder), threading.Event()

        def watch():
            while not done.wait(_WATCH):
                bar.update(max(0, _bytes_in(folder) - before - bar.n))

        watching = threading.Thread(target=watch, daemon=True)
        watching.start()
        try:
            yield
        finally:
            done.set()
            watching.join()
        bar.update(size - bar.n)


def _bytes_in(folder: Path) -> int:
    return sum(entry.stat().st_size for entry in os.scandir(folder) if entry.is_file())
