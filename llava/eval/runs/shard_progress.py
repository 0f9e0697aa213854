"""One line of progress over all shards, with rate and remaining time. It is shown on a terminal only, not in a log."""

from __future__ import annotations

import sys
import time
from pathlib import Path


class Progress:
    """Progress of shards, counted by the lines that they append to their answer files.

    title: begins the line; None shows only notes. total: samples to answer. files: the answer files.
    The rate is measured from the first answer on, because the time to load a checkpoint says nothing about the rest.
    """

    def __init__(self, title: str | None, total: int, files: list[Path], shards: int, stream=None):
        self.title, self.total, self.shards = title, total, shards
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        # What earlier starts have answered does not count.
        self._at = {path: path.stat().st_size if path.exists() else 0 for path in files}
        self.done = 0
        self._start = time.monotonic()
        self._first: tuple[float, int] | None = None
        self._shown = self._start
        self._noted: set[str] = set()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._show(final=True)

    def update(self) -> None:
        """Count new answers, and show the line at most twice a second."""
        for path, offset in self._at.items():
            if path.exists() and path.stat().st_size > offset:
                with open(path, "rb") as file:
                    file.seek(offset)
                    new = file.read()
                self.done += new.count(b"\n")
                self._at[path] = offset + len(new)
        if self._first is None and self.done:
            self._first = (time.monotonic(), self.done)
        if time.monotonic() - self._shown >= 0.5:
            self._show()

    def notes(self, texts: list[str]) -> None:
        """Show each text (warnings of shards) once, above the line of progress."""
        for text in texts:
            if text not in self._noted:
                self._noted.add(text)
                # "\r\033[K" erases the line of progress, which is drawn again below the note.
                self.stream.write(("\r\033[K" if self.live else "") + text + "\n")

    def line(self) -> str:
        """Return the line of progress."""
        shards = f"{self.shards} shard" + ("s" if self.shards > 1 else "")
        if self._first is None:
            return f"{self.title}: {shards} loading, {time.monotonic() - self._start:.0f} s"
        since, at_first = self._first
        elapsed = time.monotonic() - since
        text = f"{self.title}: {self.done}/{self.total} on {shards}"
        if self.done > at_first and elapsed > 0:
            rate = (self.done - at_first) / elapsed
            text += f", {rate:.1f}/s, {_duration((self.total - self.done) / rate)} left"
        return text

    def _show(self, final: bool = False) -> None:
        self._shown = time.monotonic()
        if self.title is not None and self.live:
            self.stream.write("\r\033[K" + self.line() + ("\n" if final else ""))
            self.stream.flush()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
