"""Line breaks between words on a terminal, for text that comes in pieces."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable
from typing import TextIO

TAB = 8


class Lines:
    """Writes text that comes in pieces on lines of at most `width` columns; 0 breaks nothing.

    A word is written once it is complete, or as long as a line. end() writes what is left.
    """

    def __init__(self, write: Callable[[str], object], width: int):
        self._write, self._width = write, width
        self._column, self._gap, self._word = 0, "", ""

    def add(self, piece: str) -> None:
        if not self._width:
            self._write(piece)
            return
        for letter in piece:
            if letter == "\n":
                self.end()
                self._write("\n")
                self._column = 0
            elif letter.isspace():
                self._flush()
                self._gap += letter
            elif _columns(letter) == 2:  # of scripts that have no spaces
                self._flush()
                self._word = letter
                self._flush()
            else:
                self._word += letter
                if _columns(self._word) >= self._width:
                    self._flush()

    def end(self) -> None:
        self._flush()
        self._put(self._gap)
        self._gap = ""

    def _flush(self) -> None:
        """Write the word that has come, on a new line where this one has no room for it."""
        if not self._word:
            return
        if self._column and self._column + _columns(self._gap + self._word) > self._width:
            self._gap, self._column = "\n", 0
        self._put(self._gap + self._word)
        self._gap = self._word = ""

    def _put(self, text: str) -> None:
        if text:
            self._write(text)
            self._column += _columns(text)


def broken(text: str, width: int) -> str:
    """A whole text, as Lines writes it."""
    parts: list[str] = []
    lines = Lines(parts.append, width)
    lines.add(text)
    lines.end()
    return "".join(parts)


def width_of(stream: TextIO) -> int:
    """Columns of the terminal that a stream goes to; 0 where it goes elsewhere, or the terminal does not say."""
    try:
        return os.get_terminal_size(stream.fileno()).columns if stream.isatty() else 0
    except (OSError, ValueError):
        return 0


def _columns(text: str) -> int:
    return sum(map(_letter_columns, text))


def _letter_columns(letter: str) -> int:
    if letter == "\t":
        return TAB
    if letter == "\n" or unicodedata.combining(letter):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1
