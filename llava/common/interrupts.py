"""Ctrl-C that is not lost."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interrupts_kept() -> Iterator[None]:
    """Raise KeyboardInterrupt at the latest when the block ends, if Ctrl-C came during it. For the main thread.

    C code that asks for an attribute or a key may swallow the exception, and imports of large libraries are full of such
    code. Without this, a program whose loading was interrupted goes on as if nothing had happened.
    """
    heard = False

    def hear(number, frame):
        nonlocal heard
        heard = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if heard:
        raise KeyboardInterrupt
