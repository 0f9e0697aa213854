"""Locks on the folder of a run: only one start of a run may work at a time.

Worker processes and ranks on other machines count as part of that start, also after the launcher is gone.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from llava.common.errors import UserError
from llava.common.files import as_user_error_on_write


def hold(path: Path) -> int:
    """Lock the file `path`, which is made if needed; return its file descriptor.

    The lock lasts until this descriptor and every copy that a child process inherited are closed.
    Raises UserError if another process holds the lock.
    """
    with as_user_error_on_write(path):
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        # flock, not lockf: an flock lock belongs to the open file, so children share it by inheriting the descriptor.
        # A lockf lock belongs to one process and would end with the launcher, while its workers still write.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise UserError(f"{path.parent}: another process is at work on this very run; wait for it, or end it") from None
    except OSError:
        # A file system without locks (some NFS). There the user must take care not to start a run twice.
        pass
    return file


def hold_folder(folder: Path) -> int:
    """Lock the folder of a run; return the file descriptor.

    Raises UserError if another start of the run is at work, or a rank that such a start left behind.
    """
    file = hold(folder / "lock")
    # Ranks on other machines cannot inherit the lock of rank 0, so each holds a file of its own (hold_for_rank).
    try:
        for path in folder.glob("lock-*"):
            os.close(hold(path))
    except UserError:
        os.close(file)
        raise
    return file


def hold_for_rank(folder: Path, rank: int) -> int:
    """Lock the file of a rank other than 0 while it answers; rank 0 holds the lock on the folder."""
    return hold(folder / f"lock-{rank}")
