"""Locks on a run's folder: at most one start of a run at a time, its worker processes and its other machines included."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from llava.common.errors import UserError
from llava.common.files import told_when_unwritable


def hold(path: Path) -> int:
    """Lock `path` (made where it is not there) until the file descriptor, and every copy that a child inherited, is closed.

    Raises UserError where another process holds it.
    """
    with told_when_unwritable(path):
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise UserError(f"{path.parent}: another process is at work on this very run; wait for it, or end it") from None
    except OSError:
        pass  # a file system without locks (some NFS): that no second launcher comes is the user's to see to
    return file


def hold_folder(folder: Path) -> int:
    """Lock a run's folder. Raises UserError where another start of the run, or a rank that it left behind, is at work."""
    file = hold(folder / "lock")
    try:
        for path in folder.glob("lock-*"):
            os.close(hold(path))
    except UserError:
        os.close(file)
        raise
    return file


def hold_for_rank(folder: Path, rank: int) -> int:
    """Lock what a rank other than 0 holds while it answers, beside rank 0's lock on the folder."""
    return hold(folder / f"lock-{rank}")
