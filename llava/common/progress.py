"""The progress bar of all commands: rate and remaining time on a terminal, nothing elsewhere.

    for sample in progress_bar("answering", samples, unit=" questions"): ...

The only other progress display is the launcher's line (llava.eval.runs.shard_progress), which counts what other
processes answer.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

_WATCH = 0.3  # seconds between two checks of a folder's size


def progress_bar(what: str, over: Iterable | None = None, total: float | None = None, unit: str = "it", **options):
    """A tqdm bar on stderr, silent if stderr is not a terminal. Iterate over it, or call `update` in a `with` block.

    what: a few words before the bar. over: what to iterate over. total: number of steps, if `over` has no length.
    unit: unit of the rate. options: passed to tqdm (disable=True).

    The bar disappears when it is finished. Of several ranks, only rank 0 shows it.
    """
    quiet = True if os.environ.get("RANK", "0") != "0" else None  # None lets tqdm decide: silent without a terminal
    settings = {"disable": quiet, "leave": False, "dynamic_ncols": True, "unit": unit}
    return tqdm(over, desc=what, total=total, **{**settings, **options})


@contextmanager
def writing_bar(what: str, folder: Path, size: int) -> Iterator[None]:
    """Context with a bar over `size` bytes that code without a bar of its own writes into `folder`."""
    with progress_bar(what, total=size, unit="B", unit_scale=True) as bar:
        if bar.disable:
            yield
            return
        before, done = _bytes_in(folder), threading.Event()

        def watch():
            # max: a temporary file that is deleted makes the folder smaller, and tqdm would count backwards.
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
    total = 0
    for entry in os.scandir(folder):
        with suppress(FileNotFoundError):  # a temporary file that is renamed or deleted meanwhile
            total += entry.stat().st_size if entry.is_file() else 0
    return total
